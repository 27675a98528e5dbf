"""The inner loops of second-order rounding: by the library, or by their twins in NumPy where that is not there."""

from __future__ import annotations

import numpy as np

from sparsecli.decode.native import binding

THREADS = 2


def fit_groups(
    weight: np.ndarray,
    importance: np.ndarray,
    group: int,
    lowest: int,
    highest: int,
    shares: tuple[float, ...],
    minimum: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """The scales and minima with which groups of weights lose least: value = scale * code + minimum.

    A guess of the scale gives the codes. For the codes, the best scale and minimum solve a weighted least squares
    problem. The best of several guesses stays.

    Args:
        weight: (rows, cols) float32.
        importance: of every column (cols,) float32, above zero.
        group: columns that share a scale.
        lowest, highest: the codes. Without `minimum` a group's extreme value gets the lowest one.
        shares: of a group's range that are tried.
        minimum: whether groups have minima, which are not above zero.
    Returns:
        Scales and minima (rows, cols / group) float32.
    """
    if binding.available() is not None:
        return fit_groups_slowly(weight, importance, group, lowest, highest, shares, minimum)
    rows, cols = weight.shape
    scale, low = np.zeros((2, rows, cols // group), np.float32)
    weight, importance = np.ascontiguousarray(weight), np.ascontiguousarray(importance)
    tried = np.array(shares, np.float32)
    done = binding.library().sparsecli_fit_groups(
        *(weight.ctypes.data, importance.ctypes.data, rows, cols, group, float(lowest), float(highest)),
        *(tried.ctypes.data, len(tried), scale.ctypes.data, low.ctypes.data if minimum else None, THREADS),
    )
    assert done == 0
    return scale, low


def fit_groups_slowly(
    weight: np.ndarray,
    importance: np.ndarray,
    group: int,
    lowest: int,
    highest: int,
    shares: tuple[float, ...],
    minimum: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """The twin of `fit_groups`."""
    x = weight.reshape(len(weight), -1, group)  # (R, G, g)
    w = importance.reshape(-1, group)
    total, mean = w.sum(-1), (w * x).sum(-1)
    low = x.min(-1, keepdims=True).clip(max=0)
    span = (x.max(-1, keepdims=True).clip(min=0) - low).clip(min=1e-30)
    extreme = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)
    best = np.zeros((2, *mean.shape), np.float32)
    gain = np.full(mean.shape, -np.inf, np.float32)
    for share in shares:
        if minimum:
            inverse, start = highest / (share * span), low * share
        else:
            inverse = np.divide(lowest, extreme * share, out=np.zeros_like(extreme), where=extreme != 0)
            start = np.zeros_like(extreme)
        codes = np.rint(((x - start) * inverse).clip(lowest, highest))
        first, second, product = (w * codes).sum(-1), (w * codes**2).sum(-1), (w * codes * x).sum(-1)
        alone = product / second.clip(min=1e-30)
        scale, offset = alone, np.zeros_like(alone)
        if minimum:
            determinant = total * second - first**2
            safe = np.where(determinant > 0, determinant, 1)
            scale = np.where(determinant > 0, (total * product - first * mean) / safe, 0)
            offset = np.where(determinant > 0, (second * mean - first * product) / safe, mean / total)
            scale = np.where(offset > 0, alone, scale).clip(min=0)
            offset = offset.clip(max=0)
        # The squared error, but for a constant.
        error = scale * (scale * second + 2 * offset * first - 2 * product) + offset * (
            offset * total - 2 * mean
        )
        better = -error > gain
        gain = np.where(better, -error, gain)
        best = np.where(better, np.stack([scale, offset]), best)
    return best[0].astype(np.float32), best[1].astype(np.float32)


def round_columns(
    remaining: np.ndarray,
    scales: np.ndarray,
    offsets: np.ndarray,
    groups: np.ndarray,
    factor: np.ndarray,
    lowest: int,
    highest: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Round columns one after another; those behind take over the errors.

    Args:
        remaining: the weights (columns, rows) float32, contiguous; those of later columns change.
        scales, offsets: of every group (groups, rows) float32, contiguous.
        groups: of every column (columns,) int64.
        factor: (columns, columns) float32, an upper triangle: see `convert.methods.rounding.inverse_factor`.
    Returns:
        Codes, and errors divided by the factor's diagonal, (columns, rows) float32.
    """
    if binding.available() is not None:
        return round_columns_slowly(remaining, scales, offsets, groups, factor, lowest, highest)
    columns, rows = remaining.shape
    codes, errors = np.empty_like(remaining), np.empty_like(remaining)
    assert factor.strides[1] == factor.itemsize
    pointers = [array.ctypes.data for array in (remaining, codes, errors, scales, offsets, groups, factor)]
    stride = factor.strides[0] // factor.itemsize
    sizes = columns, rows, stride, float(lowest), float(highest), THREADS
    done = binding.library().sparsecli_round_columns(*pointers, *sizes)
    assert done == 0
    return codes, errors


def round_columns_slowly(
    remaining: np.ndarray,
    scales: np.ndarray,
    offsets: np.ndarray,
    groups: np.ndarray,
    factor: np.ndarray,
    lowest: int,
    highest: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The twin of `round_columns`."""
    codes, errors = np.empty_like(remaining), np.empty_like(remaining)
    for column, group in enumerate(groups):
        scale, offset, target = scales[group], offsets[group], remaining[column]
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        codes[column] = np.rint(np.clip((target - offset) * inverse, lowest, highest))
        errors[column] = (target - (scale * codes[column] + offset)) / factor[column, column]
        remaining[column + 1 :] -= factor[column, column + 1 :, None] * errors[column]
    return codes, errors
