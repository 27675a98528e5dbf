"""Simple recurrent units, and the narrow branch of them beside a feed-forward layer (Terraformer)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsecli.model.layers.layer_cache import RecurrentCache
from sparsecli.model.layers.normalization import normalization
from sparsecli.model.layers.tracing import tracing

LONGEST = 2**16
"""Positions that a recorded program can scan, in 16 passes."""


def scan(keep: Tensor, add: Tensor) -> Tensor:
    """c[t] = keep[t] c[t - 1] + add[t] along the second axis of (B, T, n), with c[-1] = 0.

    It takes log2(T) passes over all positions: after each, a position sums up twice as many before it.
    """
    reach, length = 1, keep.shape[1]
    while reach < length:
        near = keep[:, reach:]
        add = torch.cat((add[:, :reach], add[:, reach:] + near * add[:, :-reach]), dim=1)
        keep = torch.cat((keep[:, :reach], near * keep[:, :-reach]), dim=1)
        reach *= 2
    return add


def scan_of_any_length(keep: Tensor, add: Tensor) -> Tensor:
    """The same as `scan` for up to LONGEST positions, by passes whose number does not depend on how many there are."""
    reach, length = 1, keep.shape[1]
    while reach < LONGEST:
        earlier_keep, earlier_add = (F.pad(x, (0, 0, reach, 0))[:, :length] for x in (keep, add))
        add, keep = add + keep * earlier_add, keep * earlier_keep
        reach *= 2
    return add


def scan_in_order(keep: Tensor, add: Tensor) -> Tensor:
    """The same as `scan`, one position after the other: its readable twin."""
    c, found = torch.zeros_like(add[:, 0]), []
    for position in range(add.shape[1]):
        c = keep[:, position] * c + add[:, position]
        found.append(c)
    return torch.stack(found, dim=1)


class _Recurrence(torch.autograd.Function):
    """`scan`, whose gradient is a scan from the end: none of the passes need be stored."""

    @staticmethod
    def forward(ctx: Any, keep: Tensor, add: Tensor) -> Tensor:
        c = scan(keep, add)
        ctx.save_for_backward(keep, c)
        return c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        keep, c = ctx.saved_tensors
        # c[t] counts for itself and, kept[t + 1] times, for what follows.
        kept_next = torch.cat((keep[:, 1:], torch.zeros_like(keep[:, :1])), dim=1)
        of_add = scan(kept_next.flip(1), gradient.flip(1)).flip(1)
        before = torch.cat((torch.zeros_like(c[:, :1]), c[:, :-1]), dim=1)
        return of_add * before, of_add


class SRU(nn.Module):
    """A recurrent layer whose gates look at the current input alone, so that time can be computed in parallel.

    c[t] = f c[t - 1] + (1 - f) y and out = activation(c) r + sqrt(3) (1 - r) x. One linear layer of x makes r, f
    (through sigmoids) and y, in this order. There are no vectors of recurrent weights.

    Args:
        width: of the input, of the state and of the output.
        activation: of the state; None is the identity, which the paper's models use.
    """

    def __init__(self, width: int, activation: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.projection = nn.Linear(width, 3 * width)
        self.activation = activation

    def forward(
        self, x: Tensor, valid: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, n) -> output and states c (B, T, n); the last state continues the sequence.

        Args:
            valid: bool (B, T); padding, where it is false, leaves the state as it is.
            state: (B, n) before the first position; zeros where it is None.
        """
        mapped = self.projection(x)
        wide = torch.promote_types(mapped.dtype, torch.float32)  # a sum over time needs the bits
        r, f, y = mapped.to(wide).chunk(3, dim=-1)
        r, f = r.sigmoid(), f.sigmoid()
        add = (1 - f) * y
        if valid is not None:
            padding = ~valid.unsqueeze(-1)
            f, add = f.masked_fill(padding, 1), add.masked_fill(padding, 0)
        if state is not None:
            add = torch.cat((add[:, :1] + f[:, :1] * state.unsqueeze(1), add[:, 1:]), dim=1)
        c = scan_of_any_length(f, add) if tracing() else _Recurrence.apply(f, add)
        out = c if self.activation is None else self.activation(c)
        return (out * r + math.sqrt(3) * (1 - r) * x).to(mapped.dtype), c


class RecurrentBranch(nn.Module):
    """Narrow recurrent layers beside a feed-forward layer, with a norm of their own (Terraformer).

    Args:
        layers, width: of the recurrent layers, one after the other.
        norm, epsilon: see `normalization`.
    """

    def __init__(self, d_model: int, width: int, layers: int, norm: str, epsilon: float) -> None:
        super().__init__()
        self.norm = normalization(norm, d_model, epsilon)
        self.enter = nn.Linear(d_model, width)
        self.cells = nn.ModuleList(SRU(width) for _ in range(layers))
        self.leave = nn.Linear(width, d_model)

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        layer_cache: RecurrentCache | None = None,
        start: int = 0,
    ) -> Tensor:
        """x (B, T, d) -> (B, T, d).

        Args:
            valid: bool (B, T), false at padding.
            layer_cache: keeps the state at every position; `start` is the first of the new ones.
        """
        x = self.enter(self.norm(x))
        for index, cell in enumerate(self.cells):
            name = f"recurrent.{index}"
            x, states = cell(
                x, valid, layer_cache.row_before(name, start) if layer_cache is not None else None
            )
            if layer_cache is not None:
                layer_cache.append(name, states, start, before=0)
        return self.leave(x)
