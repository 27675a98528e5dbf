"""Attention of a target to a source that an encoder has read (paper section 3; the decoder of Table 1's models)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from sparsecli.model.layers.attention import Memory, with_history
from sparsecli.model.layers.multiplicative import MultiplicativeConvolution


@dataclass(frozen=True)
class Source:
    """What an encoder made of the sources of a batch."""

    rows: Tensor
    """(B, S, d), S at least 1."""
    valid: Tensor | None = None
    """bool (B, S), false at padding; None where nothing is padding."""


class SourceMemory(Memory, Protocol):
    """What cross-attention keeps between calls, after attention has counted the new positions."""

    def keep(self, name: str, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The tensors (B, ...) that `make` returned when it was first asked for `name`."""


class SourceProjection(nn.Module):
    """Queries from the target, keys and values from the source."""

    def __init__(self, query: nn.Module, key: nn.Module, value: nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.value = query, key, value


class CrossAttention(nn.Module):
    """softmax(q k^T / sqrt(d_head)) v, with keys and values of the source, which are made once and then cached.

    A row of the batch whose source is all padding attends to nothing: what it reads is zero.

    Args:
        width: of all heads together.
        bias: on dense projections.
        dropout: of the attention weights, when training.
        query_modules: make queries by a multiplicative layer and a convolution over so many modules and `kernel`
            target positions, without an output projection; None for dense ones.
        count_area: see `ModuleConvolution`.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        width: int,
        bias: bool = True,
        dropout: float = 0.0,
        query_modules: int | None = None,
        kernel: int = 3,
        count_area: bool = True,
    ) -> None:
        super().__init__()
        query: nn.Module = nn.Linear(d_model, width, bias)
        if query_modules is not None:
            query = MultiplicativeConvolution(d_model, query_modules, kernel, count_area)
        self.projection = SourceProjection(
            query, nn.Linear(d_model, width, bias), nn.Linear(d_model, width, bias)
        )
        self.output = nn.Linear(width, d_model, bias) if query_modules is None else None
        self.heads = heads
        self.dropout = dropout

    def forward(
        self, x: Tensor, source: Source, valid: Tensor | None = None, memory: SourceMemory | None = None
    ) -> Tensor:
        """x (B, T, d) -> (B, T, d).

        Args:
            valid: bool (B, T), false where the target is padding, which a convolution must read as zeros.
            memory: keys and values of the source, and earlier target positions, these already counted.
        """
        q = self._split(self._queries(x, valid, memory))
        if memory is None:
            k, v = self._keys_and_values(source.rows)
        else:
            k, v = memory.keep("source", lambda: self._keys_and_values(source.rows))
        mask = source.valid
        if mask is not None:
            # A softmax over nothing is not a number: rows without a source look everywhere, and are zeroed behind.
            read = mask.any(dim=-1)[:, None, None, None]
            mask = mask[:, None, None, :] | ~read
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        if mask is not None:
            y = y * read.to(y.dtype)
        y = y.transpose(1, 2).flatten(-2)  # (B, T, heads * d_head)
        return y if self.output is None else self.output(y)

    def _queries(self, x: Tensor, valid: Tensor | None, memory: SourceMemory | None) -> Tensor:
        query = self.projection.query
        if not isinstance(query, MultiplicativeConvolution):
            return query(x)
        rows = query.remember(x)
        if valid is not None:
            rows = rows * valid.unsqueeze(-1).to(rows.dtype)
        start = 0 if memory is None else memory.get_seq_length() - x.shape[1]
        return query(with_history(rows, query.kernel - 1, memory, "source queries", start))

    def _keys_and_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._split(self.projection.key(rows)), self._split(self.projection.value(rows))

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, heads * d_head) -> (B, heads, T, d_head)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
