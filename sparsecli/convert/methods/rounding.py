"""Second-order rounding (GPTQ, Frantar et al. 2022): unrounded weights compensate the errors of rounded ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsecli.model.layers.quantized import QuantizedMatrix
from sparsecli.model.quantization import GROUP, STEPS, from_bfloat16, quantize_groups

DAMPING, RESIDUAL_DAMPING = 0.001, 0.01  # shares of the mean diagonal: inputs may lie in a subspace


def second_moment(x: Tensor) -> Tensor:
    """Mean of x x^T (d, d) over the tokens of x (tokens, d), float64."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    with torch.autocast(x.device.type, enabled=False):
        for part in x.float().split(4096):  # in float32 sums, few large inputs swallow the others
            total += (part.T @ part).double()
    return total / len(x)


@torch.no_grad()
def round_second_order(
    matrix: QuantizedMatrix, weight: Tensor, moment: Tensor, for_residual: bool = False
) -> None:
    """Quantize `weight` (rows, cols) into `matrix` with the least error of its products for inputs of this moment.

    Columns with large inputs are rounded first, on the grids of nearest rounding: all other columns can compensate
    their errors.

    Args:
        moment: (cols, cols), see `second_moment`.
        for_residual: stay nearer to `weight`, because a residual of few bits has to hold the difference. Columns are
            rounded in their order, so that columns with small inputs do not compensate everything, and every group
            gets a grid for its compensated weights.
    """
    scale, zero = _grids(weight.float(), matrix.bits)
    order = torch.arange(matrix.cols) if for_residual else moment.diagonal().argsort(descending=True)
    factor = _inverse_factor(moment[order][:, order], RESIDUAL_DAMPING if for_residual else DAMPING)
    remaining = weight.float()[:, order].clone()
    rounded = torch.zeros_like(remaining)
    for start in range(0, matrix.cols, GROUP):
        end = min(start + GROUP, matrix.cols)
        if for_residual:
            own = slice(start // GROUP, start // GROUP + 1)
            scale[:, own], zero[:, own] = _grids(remaining[:, start:end], matrix.bits)
        errors = torch.empty(matrix.rows, end - start)
        for column in range(start, end):
            group = int(order[column]) // GROUP
            target, step, shift = remaining[:, column], scale[:, group], zero[:, group].float() / STEPS
            inverse = torch.where(step > 0, 1 / step, 0.0)
            code = (target * inverse + shift).round_().clamp_(0, 2**matrix.bits - 1)
            error = (target - step * (code - shift)) / factor[column, column]
            remaining[:, column:end] -= error[:, None] * factor[column, column:end]
            rounded[:, column] = code
            errors[:, column - start] = error
        remaining[:, end:] -= errors @ factor[start:end, end:]
    codes = np.zeros((matrix.rows, scale.shape[1] * GROUP), np.uint8)
    codes[:, order.numpy()] = rounded.to(torch.uint8).numpy()
    matrix.store(codes, scale, zero)


def _grids(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero (rows, G) of every group of `weight` (rows, cols) for nearest rounding."""
    _, scale, zero = quantize_groups(weight.numpy(), bits)
    return torch.from_numpy(from_bfloat16(scale)), torch.from_numpy(zero)


def _inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped `moment`, float32."""
    damped = moment.double().clone()
    mean = damped.diagonal().mean().clamp(min=1e-12)
    damped.diagonal().add_(damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
