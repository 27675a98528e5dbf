"""Attention layers as data: projections, LSH hashing, and how a decoder attends to an encoder's output."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sparsecli.spec.base import DEEP, Depth, Size, Spec, Whole, Width, fault

Factor = Annotated[Whole, Field(ge=2, le=2**15)]
"""Hash values that one set of axes gives."""
MOST_BUCKETS = 2**30
"""Hash values of tokens are kept as 32-bit numbers."""


class LshSpec(Spec):
    """Attention within chunks of tokens that were sorted by a hash of their shared query and key (Reformer)."""

    rounds: Depth = 2
    """Hash rounds; each attends on its own, and they are weighed by the mass they found."""
    chunk_length: Width = 64
    """Tokens of a chunk."""
    chunks_before: Annotated[int, Field(ge=0), DEEP] = 1
    """Chunks before its own that a token sees too, around the end."""
    chunks_after: Annotated[int, Field(ge=0), DEEP] = 0
    """Chunks after its own that a token sees too, around the end."""
    buckets: Factor | Annotated[list[Factor], Field(min_length=1)] | None = None
    """Hash values, or factors of their number; by default two for every chunk, in two factors above 128."""

    @property
    def most_keys(self) -> int:
        """Keys that a token reads, itself among them, where others are held already."""
        return self.rounds * self.chunk_length * (1 + self.chunks_before)

    @model_validator(mode="after")
    def _check(self) -> LshSpec:
        factors = self.buckets if isinstance(self.buckets, list) else [self.buckets or 2]
        for factor in factors:
            if factor % 2:
                raise fault("buckets", f"{factor} is odd; a rotation and its opposite give two values")
        if (buckets := math.prod(factors)) > MOST_BUCKETS:
            raise fault("buckets", f"{buckets} in all are more than {MOST_BUCKETS}")
        return self


class AttentionSpec(Spec):
    """Attention and the projections that feed it (paper section 3.2)."""

    kind: Literal["full", "lsh"] = "full"
    """Which positions a token attends to: all that it may see, or those that hash alike (`lsh`)."""
    lsh: LshSpec | None = None
    """How `kind: lsh` hashes; by default as `LshSpec` says."""
    share_query_key: bool = False
    """One projection for queries and keys, keys scaled to unit length, a token seeing itself last (Reformer).
    With `kind: lsh` and without it, the mean of the two projections is shared, as when a model is fine-tuned."""
    projection: Literal["dense", "multiplicative", "dense_conv", "multiplicative_conv"] = "dense"
    """How queries, keys and values are made; the `_conv` kinds share one projection, then convolve it."""
    output_projection: Literal["none", "dense", "multiplicative", "multiplicative_conv"] | None = None
    """What follows the heads; by default `none` after a convolution, else the same kind as `projection`."""
    modules: Width | None = None
    """S: slices of the multiplicative layer and of the convolution; defaults to the number of heads."""
    kernel: Depth = 3
    """Length of the convolution over past positions."""
    value_concat: Literal["none", "modules", "whole"] = "none"
    """What joins the values' input: nothing, x per module, or x as a whole (original implementation's options)."""
    key_value_heads: Width | None = None
    """Heads of keys and values (grouped queries); defaults to the number of heads; `dense` projection only."""
    bias: bool = True
    """Biases on dense projections; the paper's have them."""
    output_bias: bool | None = None
    """A bias on a dense output projection; by default as `bias` says."""
    query_key_norm: bool = False
    """RMS norms over every head of queries and keys, before rotary positions (as in Qwen 3)."""
    query_key_norm_over: Literal["head", "projection"] = "head"
    """What such a norm is over: each head, or all heads together (as in OLMo 2 and OLMoE)."""
    query_key_rank: Width | None = None
    """Rank of queries, which two dense layers then make; keys keep as large a share of their weights. By default of
    full rank. `dense` projection only."""
    window: Size | None = None
    """Positions that a token sees, itself the last of them (a sliding window); by default it sees all before it."""
    sliding_layers: list[bool] | None = None
    """Which layers have the window (as in Gemma 2); by default every layer. The others see everything."""
    scale: Annotated[float, Field(gt=0)] | None = None
    """Factor on the scores; by default 1 / sqrt(width of a head)."""
    logit_softcap: Annotated[float, Field(gt=0)] | None = None
    """Limit c of the scores s, which become c * tanh(s / c) before the softmax (as in Gemma 2)."""

    @property
    def hashing(self) -> LshSpec | None:
        """How tokens are hashed; None for full attention."""
        return (self.lsh or LshSpec()) if self.kind == "lsh" else None

    @property
    def shares_query_key(self) -> bool:
        """Whether queries are keys, by one projection or by the mean of two."""
        return self.share_query_key or self.kind == "lsh"

    @property
    def output(self) -> Literal["none", "dense", "multiplicative", "multiplicative_conv"]:
        """`output_projection` with its default filled in."""
        if self.output_projection is not None:
            return self.output_projection
        if self.projection == "dense" or self.projection == "multiplicative":
            return self.projection
        return "none"

    @property
    def dense(self) -> bool:
        """Whether heads may be of any width: all projections are dense, and one leads back to d_model."""
        return (self.projection, self.output) == ("dense", "dense")

    @property
    def in_modules(self) -> bool:
        """Whether any projection is cut into modules."""
        return self.projection != "dense" or self.output.startswith("multiplicative")

    @property
    def plain_softmax(self) -> dict[str, bool]:
        """Fields that only softmax attention of dense queries and keys to earlier tokens has, and whether they are
        set."""
        return {
            "window": self.window is not None,
            "scale": self.scale is not None,
            "logit_softcap": self.logit_softcap is not None,
        }

    @model_validator(mode="after")
    def _check(self) -> AttentionSpec:
        conv = self.projection.endswith("_conv")
        if self.lsh is not None and self.kind != "lsh":
            raise fault("lsh", "needs kind: lsh")
        if self.shares_query_key and self.key_value_heads is not None:
            raise fault("key_value_heads", "queries and keys that are shared have the same heads")
        if self.shares_query_key and (self.query_key_norm or self.query_key_rank):
            raise fault("share_query_key", "goes with plain projections of queries and keys")
        if self.value_concat != "none" and not conv:
            raise fault("value_concat", "needs a projection with a convolution")
        if self.key_value_heads is not None and self.projection != "dense":
            raise fault("key_value_heads", "grouped queries need projection: dense")
        if self.query_key_norm and self.projection != "dense":
            raise fault("query_key_norm", "norms of queries and keys need projection: dense")
        if self.query_key_rank is not None and self.projection != "dense":
            raise fault("query_key_rank", "needs projection: dense")
        if self.query_key_norm_over != "head" and not self.query_key_norm:
            raise fault("query_key_norm_over", "needs query_key_norm: true")
        if self.sliding_layers is not None and self.window is None:
            raise fault("sliding_layers", "needs a window")
        for field in (name for name, given in self.plain_softmax.items() if given):
            if self.kind == "lsh":
                raise fault(field, "needs kind: full")
            if self.share_query_key:
                raise fault(field, "goes with plain projections of queries and keys")
            if not self.dense:
                raise fault(field, "needs dense projections")
        return self


class CrossAttentionSpec(Spec):
    """Dense attention of every decoder layer to the encoder's output."""

    kind: Literal["cross_attention"] = "cross_attention"
    query_modules: Width | None = None
    """Make queries by a multiplicative layer and a convolution with so many modules, and leave the output projection
    out; by default both are dense."""


class PrefixSpec(Spec):
    """The encoder's output is a prefix of the decoder's sequence; there is no cross-attention (Terraformer)."""

    kind: Literal["prefix"] = "prefix"
    streams: Literal[1, 2] = 2
    """Streams of the reversible encoder that the decoder continues with: both, or their mean after a linear layer."""
