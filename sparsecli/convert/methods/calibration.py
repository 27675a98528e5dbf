"""Calibration activations: the residual stream of the dense and the converted model, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.decoder import AttentionInputs, count_positions
from sparsecli.model.transformer_layers import DecoderLayer


class ResidualStreams:
    """The residual stream of every calibration batch, at the input of one layer of a model."""

    def __init__(self, model: ScalingTransformerForCausalLM, batches: list[Tensor]) -> None:
        """At the first layer, for token ids (B, T)."""
        self.x: list[Tensor] = []
        self.arguments: list[list[AttentionInputs]] = []  # of each layer
        for batch in batches:
            position_ids = count_positions(None, 0, batch.shape[1], batch.device)
            x = model.model.add_positions(model.model.embed(batch).float(), position_ids, 0)
            self.x.append(x)
            self.arguments.append(model.model.attention_inputs(x, None, position_ids, 0))

    def through(self, layer: DecoderLayer) -> list[Tensor]:
        """The stream after `layer`, for every batch (B, T, d)."""
        found = []
        for x, arguments in zip(self.x, self.arguments, strict=True):
            found.append(layer(x, *arguments[layer.layer_idx]))
        return found


@contextmanager
def record_inputs(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Record the inputs of `layer` while open: (tokens, width) for each call, float32."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].flatten(0, -2).float())
    )
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def fit_layerwise(
    dense: ScalingTransformerForCausalLM,
    model: ScalingTransformerForCausalLM,
    batches: list[Tensor],
    fit: Callable[[DecoderLayer, DecoderLayer, ResidualStreams, list[Tensor]], None],
    with_dense: bool,
) -> Tensor:
    """Call `fit` for every layer of `model`, on the outputs of the layers before it, which are fitted already.

    `fit` gets the dense and the converted layer, the converted model's streams at its input, and, `with_dense`, the
    dense model's streams at its output (else nothing). Returns the inputs of the converted model's logits (tokens, d).
    """
    dense_streams, streams = (
        ResidualStreams(dense, batches if with_dense else []),
        ResidualStreams(model, batches),
    )
    for theirs, ours in zip(dense.model.layers, model.model.layers, strict=True):
        assert isinstance(theirs, DecoderLayer)
        assert isinstance(ours, DecoderLayer)
        dense_streams.x = dense_streams.through(theirs)
        fit(theirs, ours, streams, dense_streams.x)
        streams.x = streams.through(ours)
    return model.model.norm(torch.cat([x.flatten(0, 1) for x in streams.x])).float()
