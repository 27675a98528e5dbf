"""Second-order rounding: what a rounded weight gets wrong, the weights not yet rounded make up for.

The method is GPTQ (Frantar et al. 2022).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsecli.model.layers.quantized import QuantizedMatrix
from sparsecli.model.quantization import GROUP, STEPS, from_bfloat16, quantize_groups

DAMPING, NEAR_DAMPING = 0.001, 0.01  # of the mean diagonal: inputs may lie in a subspace


def second_moment(x: Tensor) -> Tensor:
    """Mean of x x^T over the tokens of x (tokens, d): (d, d), float64."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    with torch.autocast(x.device.type, enabled=False):
        for part in x.float().split(4096):  # sums in float32 lose what few large inputs leave of the others
            total += (part.T @ part).double()
    return total / len(x)


@torch.no_grad()
def round_to(matrix: QuantizedMatrix, weight: Tensor, moment: Tensor, near: bool = False) -> None:
    """Fill `matrix` with codes of `weight` (rows, cols) that keep its products with inputs of this second moment.

    Columns whose inputs are large come first, on the grids of the nearest rounding: what they get wrong, all others
    can make up for.

    Args:
        moment: (cols, cols), see `second_moment`.
        near: stay nearer to `weight`, for a residual that has to tell the difference in few bits. Columns come in
            their order, so that those whose inputs are small do not make up for everything, and every group of them
            has the grid of what its weights have become.
    """
    scale, zero = _grids(weight.float(), matrix.bits)
    order = torch.arange(matrix.cols) if near else moment.diagonal().argsort(descending=True)
    factor = _inverse_factor(moment[order][:, order], NEAR_DAMPING if near else DAMPING)
    remaining = weight.float()[:, order].clone()
    rounded = torch.zeros_like(remaining)
    for start in range(0, matrix.cols, GROUP):
        end = min(start + GROUP, matrix.cols)
        if near:
            own = slice(start // GROUP, start // GROUP + 1)
            scale[:, own], zero[:, own] = _grids(remaining[:, start:end], matrix.bits)
        errors = torch.empty(matrix.rows, end - start)
        for column in range(start, end):
            group = int(order[column]) // GROUP
            wanted, step, shift = remaining[:, column], scale[:, group], zero[:, group].float() / STEPS
            inverse = torch.where(step > 0, 1 / step, 0.0)
            code = (wanted * inverse + shift).round_().clamp_(0, 2**matrix.bits - 1)
            error = (wanted - step * (code - shift)) / factor[column, column]
            remaining[:, column:end] -= error[:, None] * factor[column, column:end]
            rounded[:, column] = code
            errors[:, column - start] = error
        remaining[:, end:] -= errors @ factor[start:end, end:]
    codes = np.zeros((matrix.rows, scale.shape[1] * GROUP), np.uint8)
    codes[:, order.numpy()] = rounded.to(torch.uint8).numpy()
    matrix.store(codes, scale, zero)


def _grids(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero (rows, G) of every group of `weight` (rows, cols), as the nearest rounding has them."""
    _, scale, zero = quantize_groups(weight.numpy(), bits)
    return torch.from_numpy(from_bfloat16(scale)), torch.from_numpy(zero)


def _inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped `moment`, float32."""
    damped = moment.double().clone()
    mean = damped.diagonal().mean().clamp(min=1e-12)
    damped.diagonal().add_(damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
