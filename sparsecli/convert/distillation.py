"""Recovery: train the sparse model towards the dense one's predictions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from sparsecli.data.packing import Windows
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.layers.feed_forward import SparseFeedForward
from sparsecli.recipe.schema import DistillationSpec


def distil(
    student: ScalingTransformerForCausalLM,
    teacher: ScalingTransformerForCausalLM,
    windows: Windows,
    spec: DistillationSpec,
    generator: torch.Generator,
    advance: Callable[[float], None],
) -> None:
    """Minimise KL(teacher || student), the sparse layers choosing hard and without noise, as they will decode.

    Args:
        generator: draws one order of the windows, gone through again when they run out.
        advance: called after each step with the loss in nats per token.
    """
    layers = [layer for layer in student.modules() if isinstance(layer, SparseFeedForward)]
    behaviour = [(layer.hard_fraction, layer.temperature) for layer in layers]
    for layer in layers:
        layer.hard_fraction, layer.temperature = 1.0, 0.0
    decayed = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(decayed, lr=spec.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    student.train()
    try:
        order = torch.randperm(len(windows), generator=generator)
        for step in range(spec.max_steps):
            rows = [int(order[(step * spec.batch_size + i) % len(order)]) for i in range(spec.batch_size)]
            batch = torch.stack([windows[row]["input_ids"] for row in rows])
            optimizer.param_groups[0]["lr"] = (
                0.5 * spec.learning_rate * (1 + math.cos(math.pi * step / spec.max_steps))
            )
            with torch.autocast(batch.device.type, torch.bfloat16):
                with torch.no_grad():
                    target = teacher(batch, use_cache=False).logits
                logits = student(batch, use_cache=False).logits
            loss = F.kl_div(
                logits.float().flatten(0, 1).log_softmax(-1),
                target.float().flatten(0, 1).log_softmax(-1),
                log_target=True,
                reduction="batchmean",
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(decayed, 1.0)
            optimizer.step()
            advance(loss.item())
    finally:
        student.eval()
        for layer, (hard_fraction, temperature) in zip(layers, behaviour, strict=True):
            layer.hard_fraction, layer.temperature = hard_fraction, temperature
