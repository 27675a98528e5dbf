"""Closed-form recovery: the W_down, bias and bypass with which the chosen units come closest to the dense layer.

Layer by layer, with the inputs that the converted layers before give, so that each also makes up for their errors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsecli.model.layers.feed_forward import ChosenUnits

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # tried, in units of the mean square of the features
CHECKED = 4  # one in so many tokens decides between them, and whether anything changes at all


@torch.no_grad()
def refit(layer: ChosenUnits, x: Tensor, wanted: Tensor, weight: Tensor) -> bool:
    """Solve for what `layer`, whose bypass is still empty, adds to the stream, where that is better on other tokens.

    Args:
        x: (tokens, d), its inputs.
        wanted: (tokens, d), what it should add to the stream.
        weight: (tokens,), how much a token's error counts.
    Returns:
        Whether the layer was changed.
    """
    values = layer.values(x, layer.mask(x))
    left = wanted - layer(x)
    checked = torch.zeros(len(x), dtype=torch.bool)
    checked[::CHECKED] = True
    best, change, shift = _error(left[checked], weight[checked]), None, None
    bypass = getattr(layer, "bypass", None)
    if bypass is not None:
        first, second = low_rank(x[~checked], left[~checked], weight[~checked], len(bypass.first))
        left -= x @ first.T @ second.T
    for step, offset in _ridge(values[~checked], left[~checked], weight[~checked]):
        error = _error(left[checked] - values[checked] @ step - offset, weight[checked])
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


def low_rank(x: Tensor, y: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The map of this rank from x (tokens, d) to y (tokens, e) with the least weighted error: (rank, d), (e, rank).

    Reduced-rank regression: the least-squares map, projected on the main directions of what it predicts.
    """
    x, y = (x * weight[:, None]).double(), (y * weight[:, None]).double()
    moment = x.T @ x
    moment.diagonal().add_(1e-2 * moment.diagonal().mean().clamp(min=1e-12))
    whole = torch.linalg.solve(moment, x.T @ y)  # (d, e)
    predicted = whole.T @ moment @ whole
    _, directions = torch.linalg.eigh(predicted)
    main = directions[:, -rank:]
    return (whole @ main).T.float(), main.float()


def _ridge(values: Tensor, left: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Changes of W_down (d_ff, d) and of the bias (d,) that explain what is `left`, for every ridge."""
    share = weight / weight.sum()
    mean_values, mean_left = share @ values, share @ left
    centred = (values - mean_values) * weight[:, None]
    target = (left - mean_left) * weight[:, None]
    moment, towards = (centred.T @ centred).double(), (centred.T @ target).double()
    size = moment.diagonal().mean().clamp(min=1e-12)
    for ridge in RIDGES:
        damped = moment.clone()
        damped.diagonal().add_(ridge * size)
        step = torch.cholesky_solve(towards, torch.linalg.cholesky(damped)).float()
        yield step, mean_left - mean_values @ step


def _error(left: Tensor, weight: Tensor) -> float:
    return (left * weight[:, None]).square().sum().item()
