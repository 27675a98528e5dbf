"""The time of a training step, from a few steps on random tokens."""

from __future__ import annotations

import statistics
import time

import psutil
import torch

from sparsecli.console import say
from sparsecli.model.auto import build
from sparsecli.model.bfloat16 import has_bfloat16
from sparsecli.model.sizes import count_parameters
from sparsecli.recipe.data import CopyTask, ImagesSpec
from sparsecli.recipe.schema import Recipe
from sparsecli.spec.vision import CHANNELS, AnySpec, VisionSpec

WARMUP, MEASURED = 1, 3
BYTES_PER_PARAMETER = 16
"""Weights, gradients and AdamW's two averages, in float32."""


def step_seconds(recipe: Recipe) -> float | None:
    """Seconds of one optimizer step of a recipe on running text or on images; None if memory is too small.

    The optimizer is AdamW, whatever the recipe says: its share of a step is small.
    """
    assert recipe.model
    assert recipe.train
    assert recipe.data
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        train, batch = recipe.train, _random_batch(recipe)
    logits = 3 * batch["labels"].numel() * _choices(recipe.model)  # with their softmax and their gradient
    needed = count_parameters(recipe.model).total * BYTES_PER_PARAMETER + 4 * logits
    if needed > psutil.virtual_memory().available:
        return None
    say("measuring a step")
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    bf16 = train.bf16 and has_bfloat16(device.type)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = build(recipe.model).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        batch = {name: values.to(device) for name, values in batch.items()}
        seconds = []
        for _ in range(WARMUP + MEASURED):
            start = time.perf_counter()
            for _ in range(train.gradient_accumulation_steps):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss = model(**batch, use_cache=False).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for the device
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARMUP:])


def _choices(spec: AnySpec) -> int:
    return spec.classes if isinstance(spec, VisionSpec) else spec.vocabulary.size


def _random_batch(recipe: Recipe) -> dict[str, torch.Tensor]:
    """A batch of random tokens, or of random images."""
    assert recipe.model
    assert recipe.train
    examples = recipe.train.per_device_train_batch_size
    if isinstance(recipe.model, VisionSpec):
        size = recipe.model.image_size
        labels = torch.randint(recipe.model.classes, (examples,))
        return {"pixel_values": torch.randn(examples, CHANNELS, size, size), "labels": labels}
    assert recipe.data
    assert not isinstance(recipe.data, CopyTask | ImagesSpec)
    ids = torch.randint(recipe.model.vocabulary.size, (examples, recipe.data.sequence_length))
    return {"input_ids": ids, "labels": ids}
