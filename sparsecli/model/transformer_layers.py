"""The layers of encoders and decoders, built from the architecture: attention and feed-forward with their residuals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sparsecli.model.layers.attention import (
    Attention,
    SeparateProjection,
    dense_projection,
    multiplicative_projection,
)
from sparsecli.model.layers.cross_attention import CrossAttention
from sparsecli.model.layers.dropout import shared_dropout
from sparsecli.model.layers.feed_forward import DenseFeedForward, MixtureFeedForward, SparseFeedForward
from sparsecli.model.layers.layer_cache import RecurrentCache
from sparsecli.model.layers.lsh import LshAttention
from sparsecli.model.layers.multiplicative import (
    ConvolutionProjection,
    MultiplicativeConvolution,
    MultiplicativeDense,
)
from sparsecli.model.layers.normalization import normalization
from sparsecli.model.layers.patches import PatchGrid, PatchProjection
from sparsecli.model.layers.positions import (
    AxialPositions,
    DigitPositions,
    LearnedPositions,
    RotaryPositions,
    SinusoidalPositions,
)
from sparsecli.model.layers.quantized import PrecisionFeedForward, SelectorFeedForward, linear
from sparsecli.model.layers.reversible import Half
from sparsecli.model.layers.spark import SparkFeedForward
from sparsecli.model.layers.sru import RecurrentBranch
from sparsecli.model.layers.token_chunks import in_chunks
from sparsecli.model.rotary import rotary_frequencies
from sparsecli.spec.attention import AttentionSpec, CrossAttentionSpec
from sparsecli.spec.feed_forward import FeedForwardSpec
from sparsecli.spec.model import ModelSpec

FEED_FORWARDS: dict[str, Callable[..., nn.Module]] = {
    "dense": DenseFeedForward,
    "sparse": SparseFeedForward,
    "selector": SelectorFeedForward,
    "precision": PrecisionFeedForward,
    "mixture": MixtureFeedForward,
    "spark": SparkFeedForward,
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


def build_rotary(spec: ModelSpec) -> RotaryPositions | None:
    """Angles of rotary positions; None where there are none."""
    if spec.positions != "rotary":
        return None
    switch = spec.rotary_switch
    return RotaryPositions(
        rotary_frequencies(spec).tolist(),
        rotary_frequencies(spec, "long").tolist() if switch else None,
        switch or 0,
        spec.rotary_attention_factor,
    )


def build_sliding_rotary(spec: ModelSpec) -> RotaryPositions | None:
    """Those of layers with a window; None where they are the others' (`build_rotary`)."""
    return RotaryPositions(rotary_frequencies(spec, "sliding").tolist()) if spec.sliding_rotary_base else None


def build_norm(spec: ModelSpec, width: int | None = None) -> nn.Module:
    """The norm of `spec` over `width` features, by default those of the residual stream."""
    return normalization(spec.normalization, width or spec.d_model, spec.normalization_epsilon)


def build_norm_at(spec: ModelSpec, place: str) -> nn.Module:
    """The norm `before` or `after` attention or a feed-forward layer; nothing where `spec` has none there."""
    return build_norm(spec) if spec.norm_placement in (place, "around") else nn.Identity()


def build_attention(
    spec: ModelSpec,
    attention: AttentionSpec,
    causal: bool = True,
    layer_idx: int = 0,
    grid: PatchGrid | None = None,
) -> Attention:
    """The layer that `attention` asks for, in the widths of `spec`; encoders' layers are not causal.

    Layers with LSH draw rotations that differ by `layer_idx`. With a `grid`, tokens are patches of an image.
    """
    return Attention(
        build_projection(spec, attention, grid),
        build_output_projection(spec, attention),
        heads=spec.heads,
        key_value_heads=attention.key_value_heads,
        dropout=spec.dropout,
        causal=causal,
        share_query_key=attention.share_query_key,
        lsh=LshAttention(attention.hashing, layer_idx, causal) if attention.hashing else None,
        scale=attention.scale,
        softcap=attention.logit_softcap,
    )


def build_projection(
    spec: ModelSpec, attention: AttentionSpec, grid: PatchGrid | None = None
) -> SeparateProjection | ConvolutionProjection | PatchProjection:
    """What makes queries, keys and values."""
    modules, share_query_key = attention.modules or spec.heads, attention.share_query_key
    if attention.projection == "dense":
        ranks = None
        if attention.query_key_rank and spec.query_rank and spec.key_rank:
            ranks = spec.query_rank, spec.key_rank
        return dense_projection(
            spec.d_model,
            heads=spec.heads,
            key_value_heads=attention.key_value_heads or spec.heads,
            head_width=spec.width_of_head,
            bias=attention.bias,
            bits=spec.quantization.projection,
            ranks=ranks,
            share_query_key=share_query_key,
            norm_epsilon=spec.normalization_epsilon if attention.query_key_norm else None,
            norm_over=attention.query_key_norm_over,
        )
    if attention.projection == "multiplicative":
        return multiplicative_projection(spec.d_model, modules, share_query_key=share_query_key)
    if attention.projection == "multiplicative_conv":
        shared: nn.Module = MultiplicativeDense(spec.d_model, spec.d_model, modules)
    else:
        shared = nn.Linear(spec.d_model, spec.d_model, attention.bias)
    count_area = spec.initialization == "fan"
    if grid:
        return PatchProjection(shared, spec.d_model, modules, attention.kernel, grid, count_area)
    return ConvolutionProjection(
        shared,
        spec.d_model,
        modules=modules,
        kernel=attention.kernel,
        value_concat=attention.value_concat,
        count_area=count_area,
        share_query_key=share_query_key,
    )


def build_output_projection(spec: ModelSpec, attention: AttentionSpec) -> nn.Module | None:
    """What follows the merged heads; None for nothing."""
    d_model, modules = spec.d_model, attention.modules or spec.heads
    match attention.output:
        case "dense":
            bias = attention.bias if attention.output_bias is None else attention.output_bias
            return linear(spec.attention_width, d_model, bias, spec.quantization.projection)
        case "multiplicative":
            return MultiplicativeDense(d_model, d_model, modules)
        case "multiplicative_conv":
            count_area = spec.initialization == "fan"
            return MultiplicativeConvolution(d_model, modules, attention.kernel, count_area)
    return None


def build_cross_attention(spec: ModelSpec, cross: CrossAttentionSpec) -> CrossAttention:
    """The attention of a decoder layer to the encoder's output, as wide as its self-attention."""
    return CrossAttention(
        spec.d_model,
        heads=spec.heads,
        width=spec.attention_width,
        bias=spec.attention.bias,
        dropout=spec.dropout,
        query_modules=cross.query_modules,
        kernel=spec.attention.kernel,
        count_area=spec.initialization == "fan",
    )


def build_feed_forward(spec: ModelSpec, feed_forward: FeedForwardSpec, layer_idx: int) -> nn.Module:
    """The feed-forward layer that `feed_forward` asks for in layer `layer_idx`."""
    fields: dict[str, Any] = feed_forward.model_dump(exclude={"kind", "gate"})
    if isinstance(chosen := fields.get("units_per_block"), list):
        fields["units_per_block"] = chosen[layer_idx]
    if feed_forward.kind == "sparse":
        fields["probability_gate"] = feed_forward.gate == "probability"
    if feed_forward.kind == "mixture":
        fields["probability_gate"] = None if feed_forward.gate == "none" else feed_forward.gate
    return FEED_FORWARDS[feed_forward.kind](spec.d_model, dropout=spec.dropout, **fields)


def build_recurrence(spec: ModelSpec) -> RecurrentBranch | None:
    """The branch beside a feed-forward layer; None where `spec` has none."""
    if spec.sru is None:
        return None
    norm = spec.normalization, spec.normalization_epsilon
    return RecurrentBranch(spec.d_model, spec.sru.width, spec.sru.layers, *norm)


class WithFeedForward(nn.Module):
    """The end of every layer: a feed-forward layer, and the recurrent branch beside it that reads the same x.

    A base class: subclasses call `_add_feed_forward` after they have added their attention.
    """

    attention_norm: nn.Module
    feed_forward_norm: nn.Module | None
    feed_forward: nn.Module
    feed_forward_post_norm: nn.Module
    sru: RecurrentBranch | None

    def _add_feed_forward(self, spec: ModelSpec, feed_forward: FeedForwardSpec, layer_idx: int) -> None:
        self.feed_forward_norm = None if spec.shared_norm else build_norm_at(spec, "before")
        self.feed_forward = build_feed_forward(spec, feed_forward, layer_idx)
        self.feed_forward_post_norm = build_norm_at(spec, "after")
        self.sru = build_recurrence(spec)
        self.chunk = spec.feed_forward_chunk

    def feed_forward_branch(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        layer_cache: RecurrentCache | None = None,
        start: int = 0,
    ) -> Tensor:
        """post_norm(feed_forward(norm(x))) + sru(x) of x (B, T, d), the residual stream.

        Args:
            valid: bool (B, T), false at padding.
            layer_cache: keeps the recurrent states; `start` is the position of the first token of x.
        """
        norm = self.attention_norm if self.feed_forward_norm is None else self.feed_forward_norm
        y = in_chunks(self.feed_forward, norm(x), self.chunk)
        y = self.feed_forward_post_norm(y)
        return y if self.sru is None else y + self.sru(x, valid, layer_cache, start)


class DecoderLayer(WithFeedForward, GradientCheckpointingLayer):
    """x += dropout(attention(norm(x))); x += feed_forward(norm(x)), which has its own dropout.

    In a parallel layer both read the same x. Cross-attention, where there is an encoder, comes between the two. Norms
    may also come behind each part, and a factor on what they add.
    """

    def __init__(self, spec: ModelSpec, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = build_norm_at(spec, "before")
        self.attention = build_attention(spec, spec.attention, layer_idx=layer_idx)
        self.attention_post_norm = build_norm_at(spec, "after")
        self.cross_attention: CrossAttention | None = None
        if spec.encoder and spec.encoder.read_by.kind == "cross_attention":
            self.cross_attention_norm = build_norm(spec)
            self.cross_attention = build_cross_attention(spec, spec.encoder.read_by)
        self._add_feed_forward(spec, spec.feed_forward, layer_idx)
        self.dropout = spec.dropout
        self.layer_idx = layer_idx
        self.parallel = spec.parallel
        self.residual_scale = spec.residual_scale

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_valid: Tensor | None = None,
        layer_cache: Any = None,
    ) -> Tensor:
        """x (B, T, d) -> (B, T, d).

        Args:
            mask, valid, angles: see `Attention`.
            encoder_hidden_states, encoder_valid: see `CrossAttention`. No dataclass: a reentrant checkpoint takes
                gradients of tensors that are arguments themselves.
            layer_cache: this layer's part of the cache.
        """
        start = layer_cache.get_seq_length() if layer_cache is not None else 0
        y = self.attention(self.attention_norm(x), mask, valid, angles, layer_cache)
        y = self.attention_post_norm(y)
        y = x + self._scaled(shared_dropout(y, self.dropout, self.training, (-2,)))
        if self.cross_attention is not None:
            assert encoder_hidden_states is not None
            read = self.cross_attention(
                self.cross_attention_norm(y), encoder_hidden_states, encoder_valid, valid, layer_cache
            )
            y = y + shared_dropout(read, self.dropout, self.training, (-2,))
        return y + self._scaled(
            self.feed_forward_branch(x if self.parallel else y, valid, layer_cache, start)
        )

    @property
    def adds_plainly(self) -> bool:
        """Whether what the feed-forward layer computes is added to the stream as it is."""
        return isinstance(self.feed_forward_post_norm, nn.Identity) and self.residual_scale == 1

    def _scaled(self, y: Tensor) -> Tensor:
        return y if self.residual_scale == 1 else y * self.residual_scale


class EncoderLayer(WithFeedForward, GradientCheckpointingLayer):
    """A layer that looks both ways: of `spec.encoder`, or of a model that is nothing but an encoder.

    Args:
        grid: where tokens lie that are patches of an image.
    """

    def __init__(self, spec: ModelSpec, layer_idx: int, grid: PatchGrid | None = None) -> None:
        super().__init__()
        encoder = spec.encoder
        attention = encoder.attention if encoder else spec.attention
        feed_forward = (encoder.feed_forward if encoder else None) or spec.feed_forward
        self.attention_norm = build_norm(spec)
        self.attention = build_attention(spec, attention, causal=False, layer_idx=layer_idx, grid=grid)
        self._add_feed_forward(spec, feed_forward, layer_idx)
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
        return x + self.feed_forward_branch(x, valid)


class ReversibleLayer(WithFeedForward):
    """Halves of a reversible stack: attention layers, then the feed-forward layer with what is beside it.

    It has no forward of its own: `layers.reversible.reversible_stack` runs the halves of all layers, so that nothing
    but the last pair of streams is stored for the backward pass.

    Args:
        of_encoder: a layer of `spec.encoder`: it looks both ways and has one attention layer.
    """

    def __init__(self, spec: ModelSpec, layer_idx: int, of_encoder: bool = False) -> None:
        super().__init__()
        encoder = spec.encoder if of_encoder else None
        attention = encoder.attention if encoder else spec.attention
        self.attention_norm = build_norm(spec)
        self.attention = build_attention(spec, attention, causal=not encoder, layer_idx=layer_idx)
        if spec.attention_layers == 2 and not encoder:
            self.second_attention_norm = build_norm(spec)
            self.second_attention = build_attention(spec, attention, layer_idx=spec.layers + layer_idx)
        feed_forward = (encoder.feed_forward if encoder else None) or spec.feed_forward
        self._add_feed_forward(spec, feed_forward, layer_idx)
        self.last_swap = encoder is None or encoder.two_swaps
        # The original drops outputs of the layers that share queries and keys, and none of plain attention.
        self.dropout = spec.dropout if attention.shares_query_key else 0.0

    def halves(
        self,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        layer_caches: Sequence[RecurrentCache] | None = None,
    ) -> list[Half]:
        """The layer's halves: [attention; swap] once or twice, then [feed-forward; swap].

        Args:
            mask, valid, angles: see `Attention`.
            layer_caches: one for each attention layer; the first keeps the recurrent states too.
        """
        pairs = [(self.attention_norm, self.attention)]
        if hasattr(self, "second_attention"):
            pairs.append((self.second_attention_norm, self.second_attention))
        found = []
        for index, (norm, attention) in enumerate(pairs):
            layer_cache = layer_caches[index] if layer_caches is not None else None
            attend = partial(self._attend, norm, attention, mask, valid, angles, layer_cache)
            found.append(Half(attend, [*norm.parameters(), *attention.parameters()]))
        layer_cache = layer_caches[0] if layer_caches is not None else None
        start = layer_cache.get_seq_length() if layer_cache is not None else 0
        layers = [self.feed_forward_norm, self.feed_forward, self.sru]
        weights = [weight for layer in layers if layer is not None for weight in layer.parameters()]
        branch = partial(self.feed_forward_branch, valid=valid, layer_cache=layer_cache, start=start)
        return [*found, Half(branch, weights, self.last_swap)]

    def _attend(
        self,
        norm: nn.Module,
        attention: Attention,
        mask: Tensor | None,
        valid: Tensor | None,
        angles: tuple[Tensor, Tensor] | None,
        layer_cache: RecurrentCache | None,
        x: Tensor,
    ) -> Tensor:
        y = attention(norm(x), mask, valid, angles, layer_cache)
        return shared_dropout(y, self.dropout, self.training, (-2,))


def run_halves(
    halves: Sequence[Sequence[Half]],
    streams: tuple[Tensor, Tensor],
    run: Callable[[Sequence[Half], Tensor, Tensor], tuple[Tensor, Tensor]],
    keep_streams: bool,
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Two streams (B, T, d) after the halves of all layers, computed by `run`, and their mean before each layer.

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
