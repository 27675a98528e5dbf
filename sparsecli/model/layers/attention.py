"""Attention over projections that are dense, multiplicative, or convolved (paper section 3.2)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecli.model.layers.lsh import BucketMemory, HashedAttention
from sparsecli.model.layers.multiplicative import (
    ConvolutionProjection,
    MultiplicativeConvolution,
    MultiplicativeDense,
)
from sparsecli.model.layers.positions import rotate
from sparsecli.model.layers.quantized import linear
from sparsecli.model.layers.shared_query_key import attend_shared, unit_keys


class Memory(Protocol):
    """What attention keeps between calls; `cache.DecodeLayer` is the implementation."""

    def get_seq_length(self) -> int:
        """Positions already held."""

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H, T, d_head); return all of them."""

    def extend(self, name: str, rows: Tensor, start: int, before: int) -> Tensor:
        """Store rows (B, T, width) at `start`; return them with the `before` rows that precede them."""


def with_history(rows: Tensor, before: int, memory: Memory | None, name: str, start: int) -> Tensor:
    """Put the `before` rows that precede `rows` (B, T, width) in front of them; zeros before the first position."""
    if memory is None:
        return F.pad(rows, (0, 0, before, 0))
    return memory.extend(name, rows, start, before)


class LowRank(nn.Module):
    """A linear map as two, with `rank` numbers between them.

    Args:
        bias: after the second.
        bits: of the weights; None for floating point.
    """

    def __init__(self, width_in: int, width_out: int, rank: int, bias: bool, bits: int | None) -> None:
        super().__init__()
        self.rank = rank
        self.first = linear(width_in, rank, False, bits)
        self.second = linear(rank, width_out, bias, bits)

    @property
    def weight(self) -> Tensor:
        """The matrix (width_out, width_in) that they are together."""
        second, first = self.second.weight, self.first.weight
        assert isinstance(second, Tensor)
        assert isinstance(first, Tensor)
        return second @ first

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width_in) -> (..., width_out)."""
        return self.second(self.first(x))


class SeparateProjection(nn.Module):
    """Queries, keys and values by one layer each (dense, of low rank, or multiplicative).

    Args:
        key: None where queries serve as keys.
        norms: of every head of queries and of keys, or None.
    """

    def __init__(
        self,
        query: nn.Module,
        key: nn.Module | None,
        value: nn.Module,
        norms: tuple[nn.RMSNorm, nn.RMSNorm] | None = None,
    ) -> None:
        super().__init__()
        self.query, self.key, self.value = query, key, value
        self.query_norm = norms[0] if norms else None
        self.key_norm = norms[1] if norms else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d) -> q (B, T, heads * d_head), k and v (B, T, key_value_heads * d_head)."""
        q = self.query(x)
        k = q if self.key is None else self.key(x)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = _norm_heads(self.query_norm, q), _norm_heads(self.key_norm, k)
        return q, k, self.value(x)


def _norm_heads(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return norm(x.unflatten(-1, (-1, *norm.normalized_shape))).flatten(-2)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d_head)) v, with grouped queries; or with queries that are keys too (Reformer).

    Args:
        heads, key_value_heads: each head of keys and values serves heads / key_value_heads heads of queries.
        projection: makes q, k, v.
        output: follows the merged heads; None for no output projection.
        dropout: of the attention weights, when training.
        causal: a token sees none after it; otherwise, as in encoders, all that `mask` allows.
        shared: one vector serves as query and as key: the mean of those that the projection makes.
        hashing: attend to tokens that hash alike; the vectors are shared.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        key_value_heads: int,
        projection: SeparateProjection | ConvolutionProjection,
        output: nn.Module | None,
        dropout: float = 0.0,
        causal: bool = True,
        shared: bool = False,
        hashing: HashedAttention | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.key_value_heads = heads, key_value_heads
        self.projection = projection
        self.output = output
        self.dropout = dropout
        self.causal = causal
        self.shared = shared or hashing is not None
        self.hashing = hashing

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """x (B, T, d) -> (B, T, d).

        Args:
            mask: bool (B, 1, T or 1, positions held + T), true where a query may look; None means plainly causal, or
                everywhere where attention is not causal. Hashing does without.
            valid: bool (B, T), false at padding, whose rows the convolutions must read as zeros and hashing hides.
            angles: rotary cosine and sine, see `rotary_angles`.
            memory: earlier positions; extended in place.
        """
        start = memory.get_seq_length() if memory is not None else 0
        if isinstance(self.projection, ConvolutionProjection):
            q, k, v = self.projection(
                self._remembered(self.projection, x, valid, memory, "projection", start)
            )
        else:
            q, k, v = self.projection(x)
        if self.shared:
            q = k = q if k is q else (q + k) / 2
        # (B, T, heads * d_head) -> (B, heads, T, d_head)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = k.unflatten(-1, (self.key_value_heads, -1)).transpose(1, 2)
        v = v.unflatten(-1, (self.key_value_heads, -1)).transpose(1, 2)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if self.shared:
            k = unit_keys(k)
        if memory is not None:
            k, v = memory.update(k, v)
        y = self._attend(q, k, v, mask, valid, memory)
        y = y.transpose(1, 2).flatten(-2)  # (B, T, heads * d_head)
        if self.output is None:
            return y
        if isinstance(self.output, MultiplicativeConvolution):
            return self.output(self._remembered(self.output, y, valid, memory, "output", start))
        return self.output(y)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        valid: Tensor | None,
        memory: Memory | None,
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if self.hashing is not None:
            assert memory is None or isinstance(memory, BucketMemory)
            return self.hashing(q, k, v, valid, dropout, memory)
        if self.shared:
            return attend_shared(q, k, v, mask, self.causal, dropout)
        plainly_causal = False
        if (
            self.causal and mask is None and q.shape[2] == k.shape[2]
        ):  # a new token behind others sees them all
            plainly_causal = True  # and no comparison, which would be a symbol where lengths are
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=plainly_causal,
            enable_gqa=self.heads != self.key_value_heads,
        )

    @staticmethod
    def _remembered(
        layer: ConvolutionProjection | MultiplicativeConvolution,
        x: Tensor,
        valid: Tensor | None,
        memory: Memory | None,
        name: str,
        start: int,
    ) -> Tensor:
        rows = layer.remember(x)
        if valid is not None:
            rows = rows * valid.unsqueeze(-1).to(rows.dtype)
        return with_history(rows, layer.kernel - 1, memory, name, start)


def build_attention(
    d_model: int,
    heads: int,
    key_value_heads: int,
    projection: str,
    output_projection: str,
    modules: int,
    kernel: int,
    value_concat: str,
    bias: bool,
    dropout: float,
    count_area: bool,
    head_width: int | None = None,
    output_bias: bool | None = None,
    query_key_norm: float | None = None,
    bits: int | None = None,
    ranks: tuple[int, int] | None = None,
    causal: bool = True,
    share_query_key: bool = False,
    hashing: HashedAttention | None = None,
) -> Attention:
    """Attention whose projections are named by `projection` and `output_projection` (see `AttentionSpec`).

    Args:
        head_width: of dense projections; d_model / heads where it is None.
        output_bias: of a dense output projection; as `bias` where it is None.
        query_key_norm: epsilon of the norms of queries and keys; None for no norms.
        bits: of the weights of dense projections but the values'; None for floating point.
        ranks: of dense projections of queries and of keys; None for one map each.
        causal: see `Attention`.
        share_query_key: make no keys; queries serve as such.
        hashing: see `Attention`.
    Raises:
        ValueError: a size does not divide.
    """
    if (head_width is None and d_model % heads) or heads % key_value_heads:
        raise ValueError(
            f"heads {heads} and key_value_heads {key_value_heads} do not divide d_model {d_model}"
        )
    head_width = d_model // heads if head_width is None else head_width
    width, held = heads * head_width, key_value_heads * head_width

    def multiplicative() -> MultiplicativeDense:
        return MultiplicativeDense(d_model, d_model, modules)

    norms = None
    if query_key_norm is not None:
        norms = nn.RMSNorm(head_width, eps=query_key_norm), nn.RMSNorm(head_width, eps=query_key_norm)
    made: SeparateProjection | ConvolutionProjection
    if projection == "dense":
        key: nn.Module | None = None
        if ranks:
            query: nn.Module = LowRank(d_model, width, ranks[0], bias, bits)
            key = LowRank(d_model, held, ranks[1], bias, bits)
        else:
            query = linear(d_model, width, bias, bits)
            key = None if share_query_key else linear(d_model, held, bias, bits)
        made = SeparateProjection(query, key, nn.Linear(d_model, held, bias), norms)
    elif projection == "multiplicative":
        query, key = multiplicative(), None if share_query_key else multiplicative()
        made = SeparateProjection(query, key, multiplicative())
    else:
        shared = (
            multiplicative() if projection == "multiplicative_conv" else nn.Linear(d_model, d_model, bias)
        )
        made = ConvolutionProjection(
            shared,
            d_model,
            modules,
            kernel,
            value_concat,  # type: ignore[arg-type]
            count_area,
            share_query_key,
        )
    output: nn.Module | None = None
    if output_projection == "dense":
        output = linear(width, d_model, bias if output_bias is None else output_bias, bits)
    elif output_projection == "multiplicative":
        output = multiplicative()
    elif output_projection == "multiplicative_conv":
        output = MultiplicativeConvolution(d_model, modules, kernel, count_area)
    return Attention(d_model, heads, key_value_heads, made, output, dropout, causal, share_query_key, hashing)


def causal_mask(valid: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor:
    """Bool (B or 1, 1, queries, keys): a query sees valid keys up to itself, and itself whatever it is.

    A padding row sees itself alone: its output means nothing, but it is finite.

    Args:
        valid: bool (B, keys), or None where there is no padding.
    """
    position = torch.arange(keys, device=device)
    query = position[keys - queries :, None]
    causal = position <= query
    if valid is None:
        return causal[None, None]
    return (causal & valid[:, None, None, :]) | (position == query)
