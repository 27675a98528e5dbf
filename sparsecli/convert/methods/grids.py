"""Grids of GGUF's weight types: scales and minima of groups, fitted for the least error before weights are rounded.

The error of a weight counts as much as the mean square of its input. llama.cpp's importance matrix holds the same
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsecli.decode.native import rounding as native
from sparsecli.model.gguf_types import GgufType, Parts

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.74, 0.68)
"""Shares of a group's range that are tried for types of 4 bits."""
FEW_SHARES = (1.0, 0.94)
"""The same for types of more bits, whose best range is nearly the whole one."""
MANY_SHARES = (1.3, 1.2, 1.1, 1.0, 0.92, 0.84, 0.76, 0.68, 0.6)
"""The same for types of 2 and 3 bits, and for values that are not evenly apart."""


@dataclass(frozen=True)
class Grid:
    """The values that weights may take: scale * code + offset, both (rows, groups) float32.

    Attributes:
        group: columns that share them.
        lowest, highest: the codes.
    """

    scale: Tensor
    offset: Tensor
    group: int
    lowest: int
    highest: int

    @property
    def table(self) -> tuple[int, ...]:
        """The values of the codes, where they are not the codes themselves; then there are no offsets."""
        return ()


@dataclass(frozen=True)
class GgufGrid(Grid):
    """A grid whose scales are those that a GGUF type can hold.

    Attributes:
        kind: the type.
        inner, inner_minima: (rows, groups) int, nested types only.
        outer: (rows, blocks, 1 or 2) float16, nested types only.
    """

    kind: GgufType
    inner: Tensor | None = None
    inner_minima: Tensor | None = None
    outer: Tensor | None = None

    @property
    def table(self) -> tuple[int, ...]:
        return self.kind.table

    def parts(self, codes: Tensor) -> Parts:
        """The parts of a matrix with these codes (rows, cols)."""
        kind = self.kind
        stored = (codes + kind.zero).to(torch.int8 if kind.bits == 8 else torch.uint8).numpy()
        if self.outer is None:
            minima = self.offset.half().numpy() if kind.minimum else None
            return Parts(stored, self.scale.half().numpy(), minima)
        assert self.inner is not None
        inner_type = np.uint8 if kind.minimum else np.int8
        minima = None if self.inner_minima is None else self.inner_minima.numpy().astype(inner_type)
        return Parts(stored, self.inner.numpy().astype(inner_type), minima, self.outer.numpy())


def fit_grid(kind: GgufType, weight: Tensor, importance: Tensor) -> GgufGrid:
    """The grid of `weight` (rows, cols) in a type whose blocks divide the columns.

    Args:
        importance: of every column (cols,), the mean square of its input.
    """
    lowest = 0 if kind.minimum or kind.table else -kind.zero if kind.zero else -127
    highest = lowest + (1 << kind.bits) - 1 if kind.bits < 8 else 127
    shares = MANY_SHARES if kind.bits < 4 or kind.table else SHARES if kind.bits == 4 else FEW_SHARES
    mean = importance.mean()
    found = native.fit_groups(
        weight.float().numpy(),
        (importance + 1e-8 * mean + 1e-30).float().numpy(),
        kind.group,
        *((kind.table[0], kind.table[-1]) if kind.table else (lowest, highest)),
        shares,
        kind.minimum,
        kind.table,
    )
    scale, offset = map(torch.from_numpy, found)
    if not kind.nested:
        return GgufGrid(scale.half().float(), offset.half().float(), kind.group, lowest, highest, kind)
    largest = 255 if kind.scales_by_row else 63 if kind.minimum else 127 if kind.bits == 6 else 31
    per_block = scale.shape[1] if kind.scales_by_row else kind.block // kind.group
    inner, outer = _nest(scale, per_block, largest)
    inners, outers = [inner], [outer]
    if kind.minimum:
        inner_minima, outer_minimum = _nest(-offset, per_block, largest)
        inners.append(inner_minima)
        outers.append(outer_minimum)
    widened = [each.float().repeat_interleave(per_block, dim=1) for each in outers]
    return GgufGrid(
        widened[0] * inner,
        -(widened[1] * inners[1]) if kind.minimum else torch.zeros_like(scale),
        kind.group,
        lowest,
        highest,
        kind,
        inner,
        inners[1] if kind.minimum else None,
        torch.stack(outers, dim=-1),
    )


def _nest(scale: Tensor, per_block: int, largest: int) -> tuple[Tensor, Tensor]:
    """Scales (rows, groups) as whole numbers, and the float16 scale (rows, blocks) of a block's."""
    blocks = scale.unflatten(1, (-1, per_block))
    outer = (blocks.abs().amax(dim=-1) / largest).half()
    step = outer.float()[..., None]
    inner = torch.where(step > 0, blocks / step, 0.0).round_().clamp_(-largest, largest)
    return inner.flatten(1), outer
