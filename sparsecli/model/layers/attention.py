"""Attention over projections that are dense, multiplicative, or convolved (paper section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecli.model.layers.layer_cache import LayerCache, LshCache, with_conv_state
from sparsecli.model.layers.lsh import LshAttention
from sparsecli.model.layers.multiplicative import (
    ConvolutionProjection,
    MultiplicativeConvolution,
    MultiplicativeDense,
)
from sparsecli.model.layers.patches import PatchProjection
from sparsecli.model.layers.positions import rotate
from sparsecli.model.layers.quantized import linear
from sparsecli.model.layers.shared_query_key import attend_shared, unit_keys
from sparsecli.model.layers.tracing import tracing

LONGEST_PRODUCTS = 512
"""Positions up to which attention is trained by plain products: with more, the scores take too much memory."""
QUERIES = 128
"""Queries of one such product."""


class LowRank(nn.Module):
    """A linear layer of low rank: two linear layers with `rank` features between them.

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
        norms: of queries and of keys, over each head or over all together, or None.
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
    """softmax(scale q k^T) v, with grouped queries; or with queries that are keys too (Reformer).

    Args:
        projection: makes q, k, v.
        output: follows the merged heads; None for no output projection.
        heads, key_value_heads: each head of keys and values serves heads / key_value_heads heads of queries; by
            default there are as many of both.
        dropout: of the attention weights, when training.
        causal: a token sees none after it; otherwise, as in encoders, all that `mask` allows.
        share_query_key: one vector serves as query and as key: the mean of those that the projection makes.
        lsh: attend to tokens in the same hash bucket; queries and keys are then shared.
        scale: factor on the scores; by default 1 / sqrt(d_head). Unused where queries and keys are shared.
        softcap: limit c of the scores s, which become c * tanh(s / c); None for none.
    Raises:
        ValueError: key_value_heads do not divide heads.
    """

    def __init__(
        self,
        projection: SeparateProjection | ConvolutionProjection | PatchProjection,
        output: nn.Module | None,
        *,
        heads: int,
        key_value_heads: int | None = None,
        dropout: float = 0.0,
        causal: bool = True,
        share_query_key: bool = False,
        lsh: LshAttention | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.key_value_heads = heads, key_value_heads or heads
        if heads % self.key_value_heads:
            raise ValueError(f"key_value_heads {key_value_heads} do not divide heads {heads}")
        self.projection = projection
        self.output = output
        self.dropout = dropout
        self.causal = causal
        self.shares_query_key = share_query_key or lsh is not None
        self.lsh = lsh
        self.scale = scale
        self.softcap = softcap

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        layer_cache: LayerCache | None = None,
    ) -> Tensor:
        """x (B, T, d) -> (B, T, d).

        Args:
            mask: bool (B, 1, T or 1, past + T), true where a query may look; None means plainly causal, or
                everywhere where attention is not causal. LSH needs none.
            valid: bool (B, T), false at padding, whose rows the convolutions must read as zeros and LSH hides.
            angles: rotary cosine and sine, see `rotary_angles`.
            layer_cache: past positions; extended in place.
        """
        start = layer_cache.get_seq_length() if layer_cache is not None else 0
        if isinstance(self.projection, ConvolutionProjection):
            q, k, v = self.projection(
                self._convolution_input(self.projection, x, valid, layer_cache, "projection", start)
            )
        else:
            q, k, v = self.projection(x)
        if self.shares_query_key:
            q = k = q if k is q else (q + k) / 2
        # (B, T, heads * d_head) -> (B, heads, T, d_head)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = k.unflatten(-1, (self.key_value_heads, -1)).transpose(1, 2)
        v = v.unflatten(-1, (self.key_value_heads, -1)).transpose(1, 2)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if self.shares_query_key:
            k = unit_keys(k)
        if layer_cache is not None:
            k, v = layer_cache.update(k, v)
        y = self._attend(q, k, v, mask, valid, layer_cache)
        y = y.transpose(1, 2).flatten(-2)  # (B, T, heads * d_head)
        if self.output is None:
            return y
        if isinstance(self.output, MultiplicativeConvolution):
            return self.output(self._convolution_input(self.output, y, valid, layer_cache, "output", start))
        return self.output(y)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        valid: Tensor | None,
        layer_cache: LayerCache | None,
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if self.lsh is not None:
            assert layer_cache is None or isinstance(layer_cache, LshCache)
            return self.lsh(q, k, v, valid, dropout, layer_cache)
        if self.shares_query_key:
            return attend_shared(q, k, v, mask, self.causal, dropout)
        plainly_causal = False
        if (
            self.causal and mask is None and q.shape[2] == k.shape[2]
        ):  # a new token behind others sees them all
            plainly_causal = True  # and no comparison, which would be a symbol where lengths are
        if self.softcap is not None:
            if plainly_causal:
                mask = causal_mask(None, q.shape[2], k.shape[2], q.device)
            return attend_capped(q, k, v, mask, self.scale, self.softcap, dropout)
        if self.training and plainly_causal and dropout == 0 and by_products(q, k):
            return attend_by_products(q, k, v, self.scale)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=plainly_causal,
            scale=self.scale,
            enable_gqa=self.heads != self.key_value_heads,
        )

    @staticmethod
    def _convolution_input(
        layer: ConvolutionProjection | MultiplicativeConvolution,
        x: Tensor,
        valid: Tensor | None,
        layer_cache: LayerCache | None,
        name: str,
        start: int,
    ) -> Tensor:
        rows = layer.conv_input(x)
        if valid is not None:
            rows = rows * valid.unsqueeze(-1).to(rows.dtype)
        return with_conv_state(rows, layer.kernel - 1, layer_cache, name, start)


def dense_projection(
    d_model: int,
    *,
    heads: int,
    key_value_heads: int,
    head_width: int,
    bias: bool = True,
    bits: int | None = None,
    ranks: tuple[int, int] | None = None,
    share_query_key: bool = False,
    norm_epsilon: float | None = None,
    norm_over: str = "head",
) -> SeparateProjection:
    """Queries, keys and values by dense layers.

    Args:
        bits: of the weights of queries and keys; None for floating point.
        ranks: of low-rank queries and keys; None for full rank.
        share_query_key: make no keys; queries serve as such.
        norm_epsilon: of RMS norms of queries and keys; None for no norms.
        norm_over: what they are over: each `head`, or the whole `projection`.
    """
    query_width, key_width = heads * head_width, key_value_heads * head_width
    key: nn.Module | None = None
    if ranks:
        query: nn.Module = LowRank(d_model, query_width, ranks[0], bias, bits)
        key = LowRank(d_model, key_width, ranks[1], bias, bits)
    else:
        query = linear(d_model, query_width, bias, bits)
        key = None if share_query_key else linear(d_model, key_width, bias, bits)
    norms = None
    if norm_epsilon is not None:
        widths = (query_width, key_width) if norm_over == "projection" else (head_width, head_width)
        norms = nn.RMSNorm(widths[0], eps=norm_epsilon), nn.RMSNorm(widths[1], eps=norm_epsilon)
    return SeparateProjection(query, key, nn.Linear(d_model, key_width, bias), norms)


def multiplicative_projection(
    d_model: int, modules: int, *, share_query_key: bool = False
) -> SeparateProjection:
    """Queries, keys and values by multiplicative layers; without keys where queries serve as such."""
    query = MultiplicativeDense(d_model, d_model, modules)
    key = None if share_query_key else MultiplicativeDense(d_model, d_model, modules)
    return SeparateProjection(query, key, MultiplicativeDense(d_model, d_model, modules))


def attend_capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, softcap: float, dropout: float
) -> Tensor:
    """Attention of queries (B, H, T, d_head) whose scores s become softcap * tanh(s / softcap), as (B, H, T, d_head).

    Args:
        k, v: (B, key_value_heads, past + T, d_head), each head for H / key_value_heads heads of queries.
        mask: bool (B or 1, 1, T, past + T), false where a query may not look; None means everywhere.
        scale: factor on the scores, by default 1 / sqrt(d_head).
        dropout: of the attention weights.
    """
    k, v = (held.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for held in (k, v))
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v


def by_products(q: Tensor, k: Tensor) -> bool:
    """Whether `attend_by_products` is faster than `scaled_dot_product_attention`: see there."""
    if q.device.type != "cpu" or tracing() or torch.compiler.is_compiling():
        return False
    bfloat16 = q.dtype == torch.bfloat16
    if torch.is_autocast_enabled("cpu"):
        bfloat16 = torch.get_autocast_dtype("cpu") == torch.bfloat16
    return bfloat16 and q.shape[1] == k.shape[1] and q.shape[2] <= LONGEST_PRODUCTS


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Causal attention of (B, H, T, d_head) in bfloat16: twin of `scaled_dot_product_attention`.

    On a CPU that one is written for long texts: its backward pass takes most of the time of attention, and for short
    texts plain products take half as long. They keep the scores, rounded to bfloat16, for the backward pass.
    """
    batch, heads, length, width = q.shape
    with torch.autocast("cpu", enabled=False):
        # (B, H, T, d_head) -> (B * H, T, d_head)
        q, k, v = (part.bfloat16().reshape(batch * heads, length, -1) for part in (q, k, v))
        q = q * (width**-0.5 if scale is None else scale)
        hidden = q.new_full((length, length), -torch.inf).triu_(1)
        rows = []
        for start in range(
            0, length, QUERIES
        ):  # few queries at a time need no products with keys behind them
            end = min(start + QUERIES, length)
            scores = torch.baddbmm(hidden[start:end, :end], q[:, start:end], k[:, :end].transpose(1, 2))
            rows.append(scores.softmax(dim=-1) @ v[:, :end])
        return torch.cat(rows, dim=1).unflatten(0, (batch, heads))


def causal_mask(
    valid: Tensor | None, queries: int, keys: int, device: torch.device, window: int | None = None
) -> Tensor:
    """Bool (B or 1, 1, queries, keys): a query sees valid keys up to itself, and itself whatever it is.

    A padding row sees itself alone: its output means nothing, but it is finite.

    Args:
        valid: bool (B, keys), or None where there is no padding.
        window: positions that a query sees, its own the last of them; None for all.
    """
    position = torch.arange(keys, device=device)
    query = position[keys - queries :, None]
    causal = position <= query
    if window is not None:
        causal = causal & (position > query - window)
    if valid is None:
        return causal[None, None]
    return (causal & valid[:, None, None, :]) | (position == query)
