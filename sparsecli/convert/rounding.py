"""Second-order rounding: what a rounded weight gets wrong, the weights not yet rounded make up for.

The method is GPTQ (Frantar et al. 2022), with a scale and a zero for each group of columns chosen as it is reached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecli.model.layers.low_bit import LowBitMatrix
from sparsecli.model.low_bit import GROUP, STEPS, from_bfloat16, quantise_groups

DAMPING = 0.01  # of the mean diagonal: inputs may lie in a subspace


def second_moment(x: Tensor) -> Tensor:
    """Mean of x x^T over the tokens of x (tokens, d): (d, d), float64."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    with torch.autocast(x.device.type, enabled=False):
        for part in x.float().split(4096):  # sums in float32 lose what few large inputs leave of the others
            total += (part.T @ part).double()
    return total / len(x)


@torch.no_grad()
def round_to(matrix: LowBitMatrix, weight: Tensor, moment: Tensor) -> None:
    """Fill `matrix` with codes of `weight` (rows, cols) that keep its products with inputs of this second moment.

    Args:
        moment: (cols, cols), see `second_moment`.
    """
    remaining = weight.float().clone()
    factor = _inverse_factor(moment)
    groups = range(0, matrix.cols, GROUP)
    codes = torch.zeros(matrix.rows, len(groups) * GROUP, dtype=torch.uint8)
    scale = torch.zeros(matrix.rows, len(groups))
    zero = torch.zeros(matrix.rows, len(groups), dtype=torch.uint8)
    largest = 2**matrix.bits - 1
    for group, start in enumerate(groups):
        end = min(start + GROUP, matrix.cols)
        _, found_scale, found_zero = quantise_groups(remaining[:, start:end].numpy(), matrix.bits)
        scale[:, group] = torch.from_numpy(from_bfloat16(found_scale))[:, 0]
        zero[:, group] = torch.from_numpy(found_zero)[:, 0]
        step, shift = scale[:, group], zero[:, group] / STEPS
        inverse = torch.where(step > 0, 1 / step, 0.0)
        errors = torch.empty(matrix.rows, end - start)
        for column in range(start, end):
            wanted = remaining[:, column]
            code = (wanted * inverse + shift).round_().clamp_(0, largest)
            error = (wanted - step * (code - shift)) / factor[column, column]
            remaining[:, column:end] -= error[:, None] * factor[column, column:end]
            codes[:, column] = code.to(torch.uint8)
            errors[:, column - start] = error
        remaining[:, end:] -= errors @ factor[start:end, end:]
    matrix.store(codes.numpy(), scale, zero)


def _inverse_factor(moment: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped `moment`, float32."""
    damped = moment.double().clone()
    mean = damped.diagonal().mean().clamp(min=1e-12)
    damped.diagonal().add_(DAMPING * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
