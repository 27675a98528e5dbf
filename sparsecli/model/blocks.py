"""Blocks of layers, built from the architecture: what encoders and decoders of every kind are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sparsecli.model.layers.attention import Attention, build_attention
from sparsecli.model.layers.chunking import in_chunks
from sparsecli.model.layers.cross_attention import CrossAttention, Source
from sparsecli.model.layers.dropout import shared_dropout
from sparsecli.model.layers.feed_forward import DenseFeedForward, MixtureFeedForward, SparseFeedForward
from sparsecli.model.layers.lsh import HashedAttention
from sparsecli.model.layers.normalization import normalization
from sparsecli.model.layers.positions import (
    AxialPositions,
    DigitPositions,
    LearnedPositions,
    SinusoidalPositions,
)
from sparsecli.model.layers.quantized import PrecisionFeedForward, SelectorFeedForward
from sparsecli.model.layers.reversible import Half
from sparsecli.model.layers.sru import RecurrentBranch, StateMemory
from sparsecli.spec.attention import AttentionSpec, CrossAttentionSpec
from sparsecli.spec.feed_forward import FeedForwardSpec
from sparsecli.spec.model import ModelSpec

FEED_FORWARDS: dict[str, Callable[..., nn.Module]] = {
    "dense": DenseFeedForward,
    "sparse": SparseFeedForward,
    "selector": SelectorFeedForward,
    "precision": PrecisionFeedForward,
    "mixture": MixtureFeedForward,
}


def build_positions(spec: ModelSpec, max_positions: int) -> nn.Module | None:
    """What is added to embeddings (B, T, d) for positions (B, T); None where nothing is (rotary positions)."""
    match spec.positions:
        case "learned":
            return LearnedPositions(max_positions, spec.d_model)
        case "sinusoidal":
            return SinusoidalPositions(spec.d_model)
        case "digits":
            return DigitPositions(spec.d_model)
        case "axial":
            assert spec.axial
            return AxialPositions(spec.axial.shape, spec.axial.widths)
    return None


def build_norm(spec: ModelSpec, width: int | None = None) -> nn.Module:
    """The norm of `spec` over `width` features, by default those of the residual stream."""
    return normalization(spec.normalization, width or spec.d_model, spec.normalization_epsilon)


def build_attention_layer(
    spec: ModelSpec, attention: AttentionSpec, causal: bool = True, layer: int = 0
) -> Attention:
    """The layer that `attention` asks for, in the widths of `spec`; encoders' layers are not causal.

    Layers that hash differ by their number `layer`.
    """
    hashing = attention.hashing
    return build_attention(
        spec.d_model,
        spec.heads,
        attention.key_value_heads or spec.heads,
        attention.projection,
        attention.output,
        attention.modules or spec.heads,
        attention.kernel,
        attention.value_concat,
        attention.bias,
        spec.dropout,
        count_area=spec.initialization == "fan",
        head_width=spec.head_width,
        output_bias=attention.output_bias,
        query_key_norm=spec.normalization_epsilon if attention.query_key_norm else None,
        bits=spec.quantization.projection,
        ranks=(spec.query_rank, spec.key_rank)
        if attention.query_key_rank and spec.query_rank and spec.key_rank
        else None,
        causal=causal,
        share_query_key=attention.share_query_key,
        hashing=HashedAttention(hashing, layer, causal) if hashing else None,
    )


def build_cross_attention(spec: ModelSpec, cross: CrossAttentionSpec) -> CrossAttention:
    """The attention of a decoder block to the source, as wide as that to the target."""
    return CrossAttention(
        spec.d_model,
        spec.heads,
        spec.attention_width,
        spec.attention.bias,
        spec.dropout,
        cross.query_modules,
        spec.attention.kernel,
        count_area=spec.initialization == "fan",
    )


def build_feed_forward(spec: ModelSpec, feed_forward: FeedForwardSpec, layer: int) -> nn.Module:
    """The layer that `feed_forward` asks for in block `layer`."""
    fields: dict[str, Any] = feed_forward.model_dump(exclude={"kind", "gate"})
    if isinstance(chosen := fields.get("units_per_block"), list):
        fields["units_per_block"] = chosen[layer]
    if feed_forward.kind in ("sparse", "mixture"):
        fields["probability_gate"] = feed_forward.gate == "probability"
    return FEED_FORWARDS[feed_forward.kind](spec.d_model, dropout=spec.dropout, **fields)


def build_recurrence(spec: ModelSpec) -> RecurrentBranch | None:
    """The branch beside a feed-forward layer; None where `spec` has none."""
    if spec.sru is None:
        return None
    norm = spec.normalization, spec.normalization_epsilon
    return RecurrentBranch(spec.d_model, spec.sru.width, spec.sru.layers, *norm)


class Units(nn.Module):
    """What every block ends with: a feed-forward layer, and the recurrent branch beside it that reads the same x.

    A base class: subclasses call `_add_units` where the layers have their place among the others.
    """

    feed_forward_norm: nn.Module
    feed_forward: nn.Module
    sru: RecurrentBranch | None

    def _add_units(self, spec: ModelSpec, feed_forward: FeedForwardSpec, layer: int) -> None:
        self.feed_forward_norm = build_norm(spec)
        self.feed_forward = build_feed_forward(spec, feed_forward, layer)
        self.sru = build_recurrence(spec)
        self.chunk = spec.feed_forward_chunk

    def units(
        self, x: Tensor, valid: Tensor | None = None, memory: StateMemory | None = None, start: int = 0
    ) -> Tensor:
        """feed_forward(norm(x)) + sru(x) of x (B, T, d), the residual stream.

        Args:
            valid: bool (B, T), false at padding.
            memory: keeps the recurrent states; `start` is the position of the first token of x.
        """
        y = in_chunks(self.feed_forward, self.feed_forward_norm(x), self.chunk)
        return y if self.sru is None else y + self.sru(x, valid, memory, start)


class ScalingTransformerBlock(Units, GradientCheckpointingLayer):
    """x += dropout(attention(norm(x))); x += feed_forward(norm(x)), which has its own dropout.

    In a parallel block both read the same x. Attention to a source, where there is one, comes between the two.
    """

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.attention_norm = build_norm(spec)
        self.attention = build_attention_layer(spec, spec.attention, layer=layer)
        self.cross_attention: CrossAttention | None = None
        if spec.encoder and spec.encoder.read_by.kind == "cross_attention":
            self.cross_attention_norm = build_norm(spec)
            self.cross_attention = build_cross_attention(spec, spec.encoder.read_by)
        self._add_units(spec, spec.feed_forward, layer)
        self.dropout = spec.dropout
        self.parallel = spec.parallel

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        source: Tensor | None = None,
        source_valid: Tensor | None = None,
        memory: Any = None,
    ) -> Tensor:
        """x (B, T, d) -> (B, T, d); `memory` is this block's layer of the cache.

        `source` and `source_valid` are a `Source`'s, as tensors of their own: a reentrant checkpoint takes gradients of
        no other arguments.
        """
        start = memory.get_seq_length() if memory is not None else 0
        y = self.attention(self.attention_norm(x), mask, valid, angles, memory)
        y = x + shared_dropout(y, self.dropout, self.training, (-2,))
        if self.cross_attention is not None:
            assert source is not None
            read = self.cross_attention(
                self.cross_attention_norm(y), Source(source, source_valid), valid, memory
            )
            y = y + shared_dropout(read, self.dropout, self.training, (-2,))
        return y + self.units(x if self.parallel else y, valid, memory, start)


class EncoderBlock(Units, GradientCheckpointingLayer):
    """A block of `spec.encoder`, which looks both ways."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        assert spec.encoder
        self.attention_norm = build_norm(spec)
        self.attention = build_attention_layer(spec, spec.encoder.attention, causal=False, layer=layer)
        self._add_units(spec, spec.encoder.feed_forward or spec.feed_forward, layer)
        self.dropout = spec.dropout

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x (B, T, d) -> (B, T, d).

        Args:
            mask: bool (B, 1, 1, T), true where there is something to see; None means everywhere.
            valid: the same as (B, T), for what does not attend.
        """
        y = self.attention(self.attention_norm(x), mask, valid, angles)
        x = x + shared_dropout(y, self.dropout, self.training, (-2,))
        return x + self.units(x, valid)


class ReversibleBlock(Units):
    """Halves of a reversible stack: attention layers, then the feed-forward layer with what is beside it.

    It has no forward of its own: `layers.reversible.reversible_stack` runs the halves of all blocks, so that nothing
    but the last pair of streams is stored for the backward pass.

    Args:
        of_encoder: a block of `spec.encoder`: it looks both ways and has one attention layer.
    """

    def __init__(self, spec: ModelSpec, layer: int, of_encoder: bool = False) -> None:
        super().__init__()
        encoder = spec.encoder if of_encoder else None
        attention = encoder.attention if encoder else spec.attention
        self.attention_norm = build_norm(spec)
        self.attention = build_attention_layer(spec, attention, causal=not encoder, layer=layer)
        if spec.attention_layers == 2 and not encoder:
            self.second_attention_norm = build_norm(spec)
            self.second_attention = build_attention_layer(spec, attention, layer=spec.layers + layer)
        units = (encoder.feed_forward if encoder else None) or spec.feed_forward
        self._add_units(spec, units, layer)
        self.last_swap = encoder is None or encoder.two_swaps
        # The original drops outputs of the layers that share queries and keys, and none of plain attention.
        self.dropout = spec.dropout if attention.shares_query_key else 0.0

    def halves(
        self,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        memories: Sequence[StateMemory] | None = None,
    ) -> list[Half]:
        """The block's halves: [attention; swap] once or twice, then [feed-forward; swap].

        Args:
            mask, valid, angles: see `Attention`.
            memories: one for each attention layer; the first keeps the recurrent states too.
        """
        pairs = [(self.attention_norm, self.attention)]
        if hasattr(self, "second_attention"):
            pairs.append((self.second_attention_norm, self.second_attention))
        found = []
        for index, (norm, attention) in enumerate(pairs):
            memory = memories[index] if memories is not None else None
            attend = partial(self._attend, norm, attention, mask, valid, angles, memory)
            found.append(Half(attend, [*norm.parameters(), *attention.parameters()]))
        memory = memories[0] if memories is not None else None
        start = memory.get_seq_length() if memory is not None else 0
        layers = [self.feed_forward_norm, self.feed_forward, *([self.sru] if self.sru else [])]
        weights = [weight for layer in layers for weight in layer.parameters()]
        units = partial(self.units, valid=valid, memory=memory, start=start)
        return [*found, Half(units, weights, self.last_swap)]

    def _attend(
        self,
        norm: nn.Module,
        attention: Attention,
        mask: Tensor | None,
        valid: Tensor | None,
        angles: tuple[Tensor, Tensor] | None,
        memory: StateMemory | None,
        x: Tensor,
    ) -> Tensor:
        y = attention(norm(x), mask, valid, angles, memory)
        return shared_dropout(y, self.dropout, self.training, (-2,))


def run_halves(
    halves: Sequence[Sequence[Half]],
    streams: tuple[Tensor, Tensor],
    run: Callable[[Sequence[Half], Tensor, Tensor], tuple[Tensor, Tensor]],
    keep_streams: bool,
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """What the halves of each block make of two streams (B, T, d), by `run`, and the mean before each block.

    All halves are one stack, unless streams in between are wanted.
    """
    kept, (a, b) = [], streams
    for stack in halves if keep_streams else [list(chain(*halves))]:
        if keep_streams:
            # One stream taken twice is itself, not a mean of two: so it has a gradient.
            kept.append(a if a is b else merged(a, b, "mean").to(streams[0].dtype))
        a, b = run(stack, a, b)
    return (a, b), kept


def merged(a: Tensor, b: Tensor, how: str) -> Tensor:
    """Two streams (B, T, d) as one: their `mean` (B, T, d), or `concatenate`d (B, T, 2 d)."""
    return (a + b) / 2 if how == "mean" else torch.cat((a, b), dim=-1)
