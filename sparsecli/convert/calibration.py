"""What the dense layers see: inputs of every feed-forward layer on calibration text."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.layers.feed_forward import DenseFeedForward


@torch.no_grad()
def feed_forward_inputs(
    model: ScalingTransformerForCausalLM, batches: Iterable[Tensor], tokens: int
) -> list[Tensor]:
    """Inputs (tokens, d) of each dense feed-forward layer, from token ids (B, T) until `tokens` are reached."""
    layers = [layer for layer in model.modules() if isinstance(layer, DenseFeedForward)]
    collected: list[list[Tensor]] = [[] for _ in layers]
    hooks = []
    for layer, inputs in zip(layers, collected, strict=True):

        def keep(layer: nn.Module, arguments: tuple[Tensor, ...], inputs: list[Tensor] = inputs) -> None:
            inputs.append(arguments[0].flatten(0, -2))

        hooks.append(layer.register_forward_pre_hook(keep))
    try:
        seen = 0
        for batch in batches:
            model.model(batch, use_cache=False)
            seen += batch.numel()
            if seen >= tokens:
                break
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(inputs)[:tokens] for inputs in collected]
