"""The time of a training step, from a few steps on random tokens."""

from __future__ import annotations

import statistics
import time

import psutil
import torch

from sparsecli.console import say
from sparsecli.model.auto import build_network
from sparsecli.model.bfloat16 import has_bfloat16
from sparsecli.model.sizes import count_parameters
from sparsecli.recipe.data import CopyTask
from sparsecli.recipe.schema import Recipe

WARMUP, MEASURED = 1, 3
BYTES_PER_PARAMETER = 16
"""Weights, gradients and AdamW's two averages, in float32."""


def step_seconds(recipe: Recipe) -> float | None:
    """Seconds of one optimizer step of a recipe on running text; None if memory is too small.

    The optimizer is AdamW, whatever the recipe says: its share of a step is small.
    """
    assert recipe.model
    assert recipe.train
    assert recipe.data
    assert not isinstance(recipe.data, CopyTask)
    train, vocabulary = recipe.train, recipe.model.vocabulary.size
    shape = train.per_device_train_batch_size, recipe.data.sequence_length
    logits = 3 * shape[0] * shape[1] * vocabulary  # with their softmax and their gradient
    needed = count_parameters(recipe.model).total * BYTES_PER_PARAMETER + 4 * logits
    if needed > psutil.virtual_memory().available:
        return None
    say("measuring a step")
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    bf16 = train.bf16 and has_bfloat16(device.type)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = build_network(recipe.model).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.randint(vocabulary, shape, device=device)
        seconds = []
        for _ in range(WARMUP + MEASURED):
            start = time.perf_counter()
            for _ in range(train.gradient_accumulation_steps):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for the device
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARMUP:])
