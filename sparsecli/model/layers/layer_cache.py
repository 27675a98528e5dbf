"""What layers ask of the cache of one attention layer; `sparsecli.model.cache.DecodeLayer` implements all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.nn import functional as F


class LayerCache(Protocol):
    """Keys, values and convolution states of earlier positions."""

    def get_seq_length(self) -> int:
        """Cached positions."""

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H, T, d_head); return all of them."""

    def append(self, name: str, rows: Tensor, start: int, before: int) -> Tensor:
        """Store rows (B, T, width) at `start`; return them with the `before` rows that precede them."""


class RecurrentCache(LayerCache, Protocol):
    """A cache with recurrent states."""

    def row_before(self, name: str, start: int) -> Tensor | None:
        """The row (B, width) before position `start` that `append` stored; None before the first."""


class CrossAttentionCache(LayerCache, Protocol):
    """A cache with keys and values of the encoder's output; attention has counted the new positions already."""

    def compute_once(self, name: str, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The tensors (B, ...) that `compute` returned in the first call with `name`."""


@runtime_checkable
class LshCache(Protocol):
    """A cache with hash buckets."""

    def append_and_read(self, name: str, rows: Tensor, start: int) -> Tensor:
        """Store rows (B, T, width) at `start`; return all rows up to their end (B, start + T, width)."""


def with_conv_state(rows: Tensor, before: int, cache: LayerCache | None, name: str, start: int) -> Tensor:
    """Put the `before` rows that precede `rows` (B, T, width) in front of them; zeros before the first position."""
    if cache is None:
        return F.pad(rows, (0, 0, before, 0))
    return cache.append(name, rows, start, before)
