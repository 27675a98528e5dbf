"""Second-order rounding (GPTQ, Frantar et al. 2022): unrounded weights compensate the errors of rounded ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparsecli.convert.methods.grids import Grid, fit_grid
from sparsecli.decode.native import rounding as native
from sparsecli.model.gguf_types import GgufType, Parts, weights_of
from sparsecli.model.layers.quantized import QuantizedMatrix
from sparsecli.model.quantization import GROUP, STEPS, from_bfloat16, quantize_groups

DAMPING, RESIDUAL_DAMPING = 0.001, 0.01  # shares of the mean diagonal: inputs may lie in a subspace
COLUMNS_AT_ONCE = 64  # whose errors reach all later columns in one product
TRIANGLE = 256  # width below which a triangle is inverted at once


def second_moment(x: Tensor) -> Tensor:
    """Mean of x x^T (d, d) over the tokens of x (tokens, d), float64."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    with torch.autocast(x.device.type, enabled=False):
        for part in x.float().split(4096):  # in float32 sums, few large inputs swallow the others
            total += (part.T @ part).double()
    return total / len(x)


@dataclass(frozen=True)
class InputMoment:
    """The second moment (d, d) of a layer's inputs, and what rounding derives from it, once for all types."""

    moment: Tensor

    @cached_property
    def order(self) -> Tensor:
        """Columns by the size of their inputs, largest first: all others can compensate their errors."""
        return self.moment.diagonal().argsort(descending=True)

    @cached_property
    def factor(self) -> Tensor:
        """See `inverse_factor`, for columns in this order."""
        return inverse_factor(self.moment[self.order][:, self.order], DAMPING)


@torch.no_grad()
def round_to_type(kind: GgufType, weight: Tensor, inputs: InputMoment) -> tuple[Parts, Tensor]:
    """`weight` (rows, cols) in one of GGUF's types with the least error of its products.

    Returns:
        The parts, and the rounded weights (rows, cols) float32.
    """
    grid = fit_grid(kind, weight, inputs.moment.diagonal())
    codes = round_columns(weight, grid, inputs.order, inputs.factor)
    parts = grid.parts(codes)
    return parts, torch.from_numpy(weights_of(kind, parts))


@torch.no_grad()
def round_second_order(
    matrix: QuantizedMatrix, weight: Tensor, moment: Tensor, for_residual: bool = False
) -> None:
    """Quantize `weight` (rows, cols) into `matrix` with the least error of its products for inputs of this moment.

    Args:
        moment: (cols, cols), see `second_moment`.
        for_residual: stay nearer to `weight`, because a residual of few bits has to hold the difference. Columns are
            rounded in their order, so that columns with small inputs do not compensate everything, and every group
            gets a grid for its compensated weights.
    """
    grid = _own_grid(weight.float(), matrix.bits)
    if for_residual:
        order, factor = torch.arange(matrix.cols), inverse_factor(moment, RESIDUAL_DAMPING)
        codes = round_columns(weight, grid, order, factor, lambda rest: _own_grid(rest, matrix.bits))
    else:
        inputs = InputMoment(moment)
        codes = round_columns(weight, grid, inputs.order, inputs.factor)
    filled = torch.nn.functional.pad(codes, (0, grid.scale.shape[1] * GROUP - matrix.cols))
    scale = grid.scale
    zero = torch.where(scale > 0, -grid.offset / scale * STEPS, 0.0).round_()
    matrix.store(filled.to(torch.uint8).numpy(), scale, zero.to(torch.uint8))


def round_columns(
    weight: Tensor,
    grid: Grid,
    order: Tensor,
    factor: Tensor,
    regrid: Callable[[Tensor], Grid] | None = None,
) -> Tensor:
    """Codes (rows, cols) int32 of `weight`: columns are rounded in this order, and later ones compensate the errors.

    Args:
        factor: see `inverse_factor`, in the same order.
        regrid: gives the grid of a group's compensated weights (rows, group); `grid` then receives its scales. Only
            for columns in their own order.
    """
    rows, cols = weight.shape
    remaining = weight.float().T[order].contiguous()  # (cols, rows): a column lies in one piece
    scales, offsets = grid.scale.T.contiguous(), grid.offset.T.contiguous()  # (groups, rows)
    groups = order // grid.group
    codes = torch.empty(cols, rows, dtype=torch.int32)
    step = grid.group if regrid else COLUMNS_AT_ONCE
    for start in range(0, cols, step):
        end = min(start + step, cols)
        if regrid:
            own, at = regrid(remaining[start:end].T), start // grid.group
            grid.scale[:, at], grid.offset[:, at] = own.scale[:, 0], own.offset[:, 0]
            scales[at], offsets[at] = own.scale[:, 0], own.offset[:, 0]
        found, errors = native.round_columns(
            remaining[start:end].numpy(),
            scales.numpy(),
            offsets.numpy(),
            groups[start:end].numpy(),
            factor[start:end, start:end].numpy(),
            grid.lowest,
            grid.highest,
            grid.table,
        )
        codes[order[start:end]] = torch.from_numpy(found).to(torch.int32)
        remaining[end:].addmm_(factor[start:end, end:].T, torch.from_numpy(errors), alpha=-1)
    return codes.T


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """The upper triangle U with U^T U = M^-1, float32, of a moment M (d, d) that is damped.

    Args:
        damping: share of the mean diagonal that is added to the diagonal.
    """
    damped = moment.double().flip(0, 1)
    damped.diagonal().add_(damping * damped.diagonal().mean().clamp(min=1e-12))
    # M = V V^T with an upper triangle V, so that U is its inverse: half the work of inverting M first.
    return _inverse_of_lower(torch.linalg.cholesky(damped)).flip(0, 1).float().contiguous()


def _inverse_of_lower(triangle: Tensor) -> Tensor:
    """The inverse of a lower triangle (d, d), by halves."""
    width = len(triangle)
    if width <= TRIANGLE:
        return torch.linalg.solve_triangular(triangle, torch.eye(width, dtype=triangle.dtype), upper=False)
    half = width // 2
    inverse = torch.zeros_like(triangle)
    first, last = _inverse_of_lower(triangle[:half, :half]), _inverse_of_lower(triangle[half:, half:])
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[half:, :half] = -(last @ (triangle[half:, :half] @ first))
    return inverse


def _own_grid(weight: Tensor, bits: int) -> Grid:
    """The grid of nearest rounding of `weight` (rows, cols) for a `QuantizedMatrix`."""
    _, scale, zero = quantize_groups(weight.numpy(), bits)
    steps = torch.from_numpy(from_bfloat16(scale))
    return Grid(steps, -steps * torch.from_numpy(zero).float() / STEPS, GROUP, 0, 2**bits - 1)
