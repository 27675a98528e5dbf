"""The inner loops of second-order rounding: by the library, or by their twins in NumPy where that is not there."""

from __future__ import annotations

from itertools import product

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
    table: tuple[int, ...] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """The scales and minima with which groups of weights lose least: value = scale * code + minimum.

    A guess of the scale gives the codes. For the codes, the best scale and minimum solve a weighted least squares
    problem. The best of several guesses stays. Without minima the weight of the largest magnitude gets the lowest or
    the highest value.

    Args:
        weight: (rows, cols) float32.
        importance: of every column (cols,) float32, above zero.
        group: columns that share a scale.
        lowest, highest: of the values of codes.
        shares: of a group's range that are tried.
        minimum: whether groups have minima, which are not above zero.
        table: the values of codes, ascending, where they are not all whole numbers; for types without minima.
    Returns:
        Scales and minima (rows, cols / group) float32.
    """
    if binding.available() is not None:
        return fit_groups_slowly(weight, importance, group, lowest, highest, shares, minimum, table)
    rows, cols = weight.shape
    scale, low = np.zeros((2, rows, cols // group), np.float32)
    weight, importance = np.ascontiguousarray(weight), np.ascontiguousarray(importance)
    tried, values = np.array(shares, np.float32), np.array(table, np.float32)
    done = binding.library().sparsecli_fit_groups(
        *(weight.ctypes.data, importance.ctypes.data, rows, cols, group, float(lowest), float(highest)),
        *(values.ctypes.data if table else None, len(values)),
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
    table: tuple[int, ...] = (),
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
    for end, share in product((highest,) if minimum else (lowest, highest), shares):
        if minimum:
            inverse, start = highest / (share * span), low * share
        else:
            inverse = np.divide(end, extreme * share, out=np.zeros_like(extreme), where=extreme != 0)
            start = np.zeros_like(extreme)
        codes = ((x - start) * inverse).clip(lowest, highest)
        codes = np.array(table, np.float32)[nearest_codes(table, codes)] if table else np.rint(codes)
        first, second, both = (w * codes).sum(-1), (w * codes**2).sum(-1), (w * codes * x).sum(-1)
        alone = both / second.clip(min=1e-30)
        scale, offset = alone, np.zeros_like(alone)
        if minimum:
            determinant = total * second - first**2
            safe = np.where(determinant > 0, determinant, 1)
            scale = np.where(determinant > 0, (total * both - first * mean) / safe, 0)
            offset = np.where(determinant > 0, (second * mean - first * both) / safe, mean / total)
            scale = np.where(offset > 0, alone, scale).clip(min=0)
            offset = offset.clip(max=0)
        # The squared error, but for a constant.
        error = scale * (scale * second + 2 * offset * first - 2 * both) + offset * (
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
    table: tuple[int, ...] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Round columns one after another; those behind take over the errors.

    Args:
        remaining: the weights (columns, rows) float32, contiguous; those of later columns change.
        scales, offsets: of every group (groups, rows) float32, contiguous.
        groups: of every column (columns,) int64.
        factor: (columns, columns) float32, an upper triangle: see `convert.methods.rounding.inverse_factor`.
        table: the values of the codes, ascending, where they are not the codes themselves; then offsets are zero.
    Returns:
        Codes, and errors divided by the factor's diagonal, (columns, rows) float32.
    """
    if binding.available() is not None:
        return round_columns_slowly(remaining, scales, offsets, groups, factor, lowest, highest, table)
    columns, rows = remaining.shape
    codes, errors = np.empty_like(remaining), np.empty_like(remaining)
    assert factor.strides[1] == factor.itemsize
    pointers = [array.ctypes.data for array in (remaining, codes, errors, scales, offsets, groups, factor)]
    stride = factor.strides[0] // factor.itemsize
    values = np.array(table, np.float32)
    done = binding.library().sparsecli_round_columns(
        *(*pointers, columns, rows, stride, float(lowest), float(highest)),
        *(values.ctypes.data if table else None, len(values), THREADS),
    )
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
    table: tuple[int, ...] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """The twin of `round_columns`."""
    codes, errors = np.empty_like(remaining), np.empty_like(remaining)
    for column, group in enumerate(groups):
        scale, offset, target = scales[group], offsets[group], remaining[column]
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        wanted = (target - offset) * inverse
        codes[column] = nearest_codes(table, wanted) if table else np.rint(np.clip(wanted, lowest, highest))
        value = np.array(table, np.float32)[codes[column].astype(int)] if table else codes[column]
        errors[column] = (target - (scale * value + offset)) / factor[column, column]
        remaining[column + 1 :] -= factor[column, column + 1 :, None] * errors[column]
    return codes, errors


def nearest_codes(table: tuple[int, ...], wanted: np.ndarray) -> np.ndarray:
    """The codes of the values in an ascending table that are nearest to these."""
    values = np.array(table, np.float32)
    return np.searchsorted((values[1:] + values[:-1]) / 2, wanted, side="right")
