"""Refit: W_down, bias and bypass in closed form, so that the active units best approximate the dense layer.

Layer by layer, on inputs from the converted layers before, so that each also compensates their errors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsecli.model.layers.feed_forward import ChosenUnits

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # penalties that are tried, in units of the mean square of the features
VALIDATION_STRIDE = 4  # one of this many tokens validates the penalties, and the change of the layer


@torch.no_grad()
def refit_layer(layer: ChosenUnits, x: Tensor, target: Tensor, weight: Tensor) -> bool:
    """Solve for W_down, bias and bypass (still zero) of `layer`; keep the solution if better on validation tokens.

    Args:
        x: (tokens, d), the layer's inputs.
        target: (tokens, d), its target outputs.
        weight: (tokens,), weights of the tokens' errors.
    Returns:
        Whether the layer was changed.
    """
    values = layer.values(x, layer.mask(x))
    residual = target - layer(x)
    validation = torch.zeros(len(x), dtype=torch.bool)
    validation[::VALIDATION_STRIDE] = True
    best, change, shift = _weighted_error(residual[validation], weight[validation]), None, None
    bypass = getattr(layer, "bypass", None)
    if bypass is not None:
        first, second = reduced_rank_regression(
            x[~validation], residual[~validation], weight[~validation], len(bypass.first)
        )
        residual -= x @ first.T @ second.T
    for step, offset in _ridge_solutions(values[~validation], residual[~validation], weight[~validation]):
        error = _weighted_error(residual[validation] - values[validation] @ step - offset, weight[validation])
        if error < best:
            best, change, shift = error, step, offset
    if change is None or shift is None:
        return False
    layer.down.add_(change)
    layer.bias.add_(shift)
    if bypass is not None:
        bypass.first.copy_(first)
        bypass.second.copy_(second)
    return True


def reduced_rank_regression(x: Tensor, y: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (rank, d) and (e, rank) of the linear layer from x (tokens, d) to y (tokens, e) of least weighted error.

    The least-squares solution, projected on the main directions of its predictions.
    """
    x, y = (x * weight[:, None]).double(), (y * weight[:, None]).double()
    moment = x.T @ x
    moment.diagonal().add_(1e-2 * moment.diagonal().mean().clamp(min=1e-12))
    whole = torch.linalg.solve(moment, x.T @ y)  # (d, e)
    predicted = whole.T @ moment @ whole
    _, directions = torch.linalg.eigh(predicted)
    main = directions[:, -rank:]
    return (whole @ main).T.float(), main.float()


def _ridge_solutions(values: Tensor, residual: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Changes of W_down (d_ff, d) and of the bias (d,) that explain the `residual`, for every penalty."""
    share = weight / weight.sum()
    mean_values, mean_residual = share @ values, share @ residual
    centred = (values - mean_values) * weight[:, None]
    target = (residual - mean_residual) * weight[:, None]
    moment, projection = (centred.T @ centred).double(), (centred.T @ target).double()
    size = moment.diagonal().mean().clamp(min=1e-12)
    for ridge in RIDGES:
        damped = moment.clone()
        damped.diagonal().add_(ridge * size)
        step = torch.cholesky_solve(projection, torch.linalg.cholesky(damped)).float()
        yield step, mean_residual - mean_values @ step


def _weighted_error(residual: Tensor, weight: Tensor) -> float:
    return (residual * weight[:, None]).square().sum().item()
