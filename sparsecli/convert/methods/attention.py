"""Fits of attention projections: quantized, of low rank, or multiplicative, by the second moment of their inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecli.convert.methods.rounding import round_second_order
from sparsecli.model.layers.attention import LowRank
from sparsecli.model.layers.multiplicative import MultiplicativeDense
from sparsecli.model.layers.quantized import QuantizedLinear

ITERATIONS = 30  # of least squares for D, then E; the error of real layers hardly changes after 20
MOMENT_DAMPING = 1e-6  # share of the mean diagonal: inputs may lie in a subspace


@torch.no_grad()
def fit_projection(made: nn.Module, linear: nn.Linear, moment: Tensor) -> float:
    """Fit `made` to approximate `linear` for inputs of this second moment.

    Args:
        made: a quantized layer, one of low rank, or a multiplicative one with a module for every head; where `linear`
            has fewer heads, each is repeated.
        moment: (d, d), see `second_moment`.
    Returns:
        The squared error of the outputs relative to their squares.
    """
    weight: Tensor = linear.weight
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias
    if isinstance(made, MultiplicativeDense):
        heads, width = len(made.D), len(made.E)
        weight = repeat_heads(weight, heads, width)
        D, E = multiplicative_factors(weight, moment, heads)
        made.load_state_dict({"D": D, "E": E, "bias": repeat_heads(bias, heads, width)})
        return output_error(made.matrix, weight, moment)
    last = made
    if isinstance(made, LowRank):
        last = made.second
        _fit_low_rank(made, weight, moment)
    else:
        assert isinstance(made, QuantizedLinear)
        round_second_order(made, weight, moment)
    last.load_state_dict({"bias": bias}, strict=False)  # where it has one
    return output_error(made.weight, weight, moment)


def repeat_heads(rows: Tensor, heads: int, width: int) -> Tensor:
    """Repeat the rows (kept * width, ...) of grouped heads to (heads * width, ...)."""
    kept = rows.unflatten(0, (-1, width))
    return kept.repeat_interleave(heads // len(kept), dim=0).flatten(0, 1)


def output_error(made: Tensor, weight: Tensor, moment: Tensor) -> float:
    """Squared error of the outputs of `made` (rows, d), relative to those of `weight`."""
    target = weight.double()
    error = made.double() - target
    return (((error @ moment) * error).sum() / ((target @ moment) * target).sum().clamp(min=1e-30)).item()


# -- low rank ------------------------------------------------------------------------------------------------


def low_rank_factors(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors (rank, d) and (rows, rank) whose product best approximates `weight` (rows, d) for such inputs.

    From the truncated singular value decomposition of W L, where L L^T is the moment: the main directions of the
    outputs, and the weights projected on them.
    """
    target = weight.double()
    _, directions = torch.linalg.eigh(target @ moment @ target.T)
    main = directions[:, -rank:]
    return (main.T @ target).float(), main.float()


def _fit_low_rank(made: LowRank, weight: Tensor, moment: Tensor) -> None:
    first, second = low_rank_factors(weight, moment, made.rank)
    if not (isinstance(made.first, QuantizedLinear) and isinstance(made.second, QuantizedLinear)):
        made.load_state_dict({"first.weight": first, "second.weight": second}, strict=False)
        return
    round_second_order(made.first, first, moment)
    rounded = made.first.weight.double()
    between = _damped(rounded @ moment @ rounded.T)
    # The second factor compensates the rounding error of the first.
    best = torch.linalg.solve(between, rounded @ moment @ weight.double().T).T
    round_second_order(made.second, best.float(), between)


def _damped(moment: Tensor) -> Tensor:
    damped = moment.clone()
    damped.diagonal().add_(MOMENT_DAMPING * moment.diagonal().mean().clamp(min=1e-12))
    return damped


# -- multiplicative ------------------------------------------------------------------------------------------


def multiplicative_factors(weight: Tensor, moment: Tensor, modules: int) -> tuple[Tensor, Tensor]:
    """D (S, d) and E (rows / S, d), whose products approximate `weight` (rows, d) for such inputs.

    They start from the best rank-1 product for every input dimension. Then least squares for D and E alternate.
    """
    target = weight.double().unflatten(0, (modules, -1))  # (S, M, d)
    left, size, right = torch.linalg.svd(target.permute(2, 0, 1), full_matrices=False)
    root = size[:, :1].sqrt()
    D, E = (left[:, :, 0] * root).T, (right[:, 0] * root).T
    correlation, moment = target @ moment, _damped(moment)
    for _ in range(ITERATIONS):
        D = _least_squares(E, moment, torch.einsum("mi,smi->si", E, correlation))
        E = _least_squares(D, moment, torch.einsum("si,smi->mi", D, correlation))
    return D.float(), E.float()


def _least_squares(other: Tensor, moment: Tensor, target: Tensor) -> Tensor:
    """The factor (n, d) that solves (other^T other * moment) factor^T = target^T."""
    factor = torch.linalg.cholesky(_damped((other.T @ other) * moment))
    return torch.cholesky_solve(target.T, factor).T
