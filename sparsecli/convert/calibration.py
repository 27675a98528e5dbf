"""Calibration text on its way through the dense and the converted model, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.transformer_layers import DecoderLayer


class _Reached(Exception):
    """The first block is reached; nothing behind it needs to be computed."""


class Streams:
    """The residual stream of every calibration batch, before one block of a model."""

    def __init__(self, model: ScalingTransformerForCausalLM, batches: list[Tensor]) -> None:
        """Before the first block, for token ids (B, T)."""
        self.x: list[Tensor] = []
        self.arguments: list[tuple[Any, ...]] = []

        def reached(block: nn.Module, arguments: tuple[Any, ...]) -> None:
            self.x.append(arguments[0])
            self.arguments.append(arguments[1:])
            raise _Reached

        handle = model.model.layers[0].register_forward_pre_hook(reached)
        try:
            for batch in batches:
                try:
                    model.model(batch, use_cache=False)
                except _Reached:
                    continue
        finally:
            handle.remove()

    def through(self, block: DecoderLayer) -> list[Tensor]:
        """The stream behind `block`, for every batch (B, T, d)."""
        found = []
        for x, arguments in zip(self.x, self.arguments, strict=True):
            found.append(block(x, *arguments))
        return found


@contextmanager
def inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What `layer` reads while open: (tokens, width) for each call, float32."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].flatten(0, -2).float())
    )
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def blockwise(
    dense: ScalingTransformerForCausalLM,
    model: ScalingTransformerForCausalLM,
    batches: list[Tensor],
    fit: Callable[[DecoderLayer, DecoderLayer, Streams, list[Tensor]], None],
    with_dense: bool,
) -> Tensor:
    """Call `fit` for every block of `model`, with the streams that the blocks before it, already fitted, give.

    `fit` gets the dense and the converted block, the converted model's streams before it, and, `with_dense`, the dense
    model's streams behind it (else nothing). Returns what the logits of the converted model read (tokens, d).
    """
    wanted, given = Streams(dense, batches if with_dense else []), Streams(model, batches)
    for theirs, ours in zip(dense.model.layers, model.model.layers, strict=True):
        assert isinstance(theirs, DecoderLayer)
        assert isinstance(ours, DecoderLayer)
        wanted.x = wanted.through(theirs)
        fit(theirs, ours, given, wanted.x)
        given.x = given.through(ours)
    return model.model.norm(torch.cat([x.flatten(0, 1) for x in given.x])).float()
