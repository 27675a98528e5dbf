"""Importance of the inputs of a dense model's linear layers: their mean squares on calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from sparsecli.console import progress
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM


@torch.no_grad()
def input_importance(
    model: ScalingTransformerForCausalLM, batches: Sequence[Tensor]
) -> dict[str, np.ndarray]:
    """Mean square of every input (cols,), float32, of every linear layer of the blocks, by the layer's name.

    An error of a weight changes an output by the error times the input. So the squared error of an output is, on
    average, the squared errors of its weights, each times this mean square, where inputs are uncorrelated.

    Args:
        batches: token ids (B, T) of the calibration text.
    """
    sums: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(partial(_add_squares, sums, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    ]
    try:
        with progress("measuring the importance of inputs", len(batches)) as bar:
            for batch in batches:
                model.model(batch, use_cache=False)
                bar.advance()
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(batch.numel() for batch in batches)
    return {name: (total / tokens).float().numpy() for name, total in sums.items()}


def _add_squares(sums: dict[str, Tensor], name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    found = inputs[0].flatten(0, -2).float().square().sum(0, dtype=torch.float64)  # (B, T, cols) -> (cols,)
    sums[name] = sums[name] + found if name in sums else found
