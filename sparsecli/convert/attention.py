"""What queries, keys and values can become on request, fitted to the second moment of what they read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecli.convert.rounding import round_to
from sparsecli.model.layers.attention import LowRank
from sparsecli.model.layers.multiplicative import MultiplicativeDense
from sparsecli.model.layers.quantized import QuantizedLinear

ROUNDS = 30  # of least squares for D, then E; the error of real layers hardly changes after 20
DAMPING = 1e-6  # of the mean diagonal: inputs may lie in a subspace


@torch.no_grad()
def fit_map(made: nn.Module, linear: nn.Linear, moment: Tensor) -> float:
    """Fill `made` so that it does what `linear` does for inputs of this second moment.

    Args:
        made: a layer in few bits, of low rank, or multiplicative with a module for every head; where `linear` has
            fewer heads, it repeats each.
        moment: (d, d), see `second_moment`.
    Returns:
        The squared error of its outputs, relative to the square of the outputs.
    """
    weight: Tensor = linear.weight
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias
    if isinstance(made, MultiplicativeDense):
        heads, width = len(made.D), len(made.E)
        weight = repeated(weight, heads, width)
        D, E = multiplicative(weight, moment, heads)
        made.load_state_dict({"D": D, "E": E, "bias": repeated(bias, heads, width)})
        return output_error(made.matrix, weight, moment)
    last = made
    if isinstance(made, LowRank):
        last = made.second
        _fit_low_rank(made, weight, moment)
    else:
        assert isinstance(made, QuantizedLinear)
        round_to(made, weight, moment)
    last.load_state_dict({"bias": bias}, strict=False)  # where it has one
    return output_error(made.weight, weight, moment)


def repeated(rows: Tensor, heads: int, width: int) -> Tensor:
    """Rows of grouped heads (kept * width, ...), each head as often as gives (heads * width, ...)."""
    kept = rows.unflatten(0, (-1, width))
    return kept.repeat_interleave(heads // len(kept), dim=0).flatten(0, 1)


def output_error(made: Tensor, weight: Tensor, moment: Tensor) -> float:
    """Squared error of the outputs of `made` (rows, d), relative to those of `weight`."""
    wanted = weight.double()
    left = made.double() - wanted
    return (((left @ moment) * left).sum() / ((wanted @ moment) * wanted).sum().clamp(min=1e-30)).item()


# -- low rank ------------------------------------------------------------------------------------------------


def low_rank(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two maps (rank, d) and (rows, rank) that come closest to `weight` (rows, d) for such inputs.

    The truncated singular value decomposition of W L, where L L^T is the moment: the main directions of the outputs,
    and what the weights do along them.
    """
    wanted = weight.double()
    _, directions = torch.linalg.eigh(wanted @ moment @ wanted.T)
    main = directions[:, -rank:]
    return (main.T @ wanted).float(), main.float()


def _fit_low_rank(made: LowRank, weight: Tensor, moment: Tensor) -> None:
    first, second = low_rank(weight, moment, made.rank)
    if not (isinstance(made.first, QuantizedLinear) and isinstance(made.second, QuantizedLinear)):
        made.load_state_dict({"first.weight": first, "second.weight": second}, strict=False)
        return
    round_to(made.first, first, moment)
    rounded = made.first.weight.double()
    between = _damped(rounded @ moment @ rounded.T)
    # The second map makes up for what rounding did to the first.
    best = torch.linalg.solve(between, rounded @ moment @ weight.double().T).T
    round_to(made.second, best.float(), between)


def _damped(moment: Tensor) -> Tensor:
    damped = moment.clone()
    damped.diagonal().add_(DAMPING * moment.diagonal().mean().clamp(min=1e-12))
    return damped


# -- multiplicative ------------------------------------------------------------------------------------------


def multiplicative(weight: Tensor, moment: Tensor, modules: int) -> tuple[Tensor, Tensor]:
    """D (S, d) and E (rows / S, d), whose products come close to `weight` (rows, d) for such inputs.

    They start from the best product for every input alone. Then D given E, and E given D, solve least squares.
    """
    wanted = weight.double().unflatten(0, (modules, -1))  # (S, M, d)
    left, size, right = torch.linalg.svd(wanted.permute(2, 0, 1), full_matrices=False)
    root = size[:, :1].sqrt()
    D, E = (left[:, :, 0] * root).T, (right[:, 0] * root).T
    seen, moment = wanted @ moment, _damped(moment)
    for _ in range(ROUNDS):
        D = _least_squares(E, moment, torch.einsum("mi,smi->si", E, seen))
        E = _least_squares(D, moment, torch.einsum("si,smi->mi", D, seen))
    return D.float(), E.float()


def _least_squares(other: Tensor, moment: Tensor, towards: Tensor) -> Tensor:
    """The factor (n, d) that solves (other^T other * moment) factor^T = towards^T."""
    factor = torch.linalg.cholesky(_damped((other.T @ other) * moment))
    return torch.cholesky_solve(towards.T, factor).T
