"""Matrices in 3 or 4 bits: rounded in groups of 64 columns, and their bytes in weight files. No torch, only numpy.

A group of a row has a scale (bfloat16) and a zero in sixteenths of a step: weight = scale * (code - zero / 16). What
is left over by such a matrix is stored as 4 bits around the middle: value = scale * (code - 8). Codes (rows, 64 G)
fill the last group up with zeros; weight files hold two of them in a byte. bfloat16 numbers are uint16 here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

GROUP = 64
"""Columns that share a scale."""
MIDDLE = 8
"""The code of a residual that stands for zero."""
STEPS = 16
"""Zeros are given in parts of a step."""
CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.74, 0.68)
"""Shares of a group's range that are tried: what lies beyond is cut off, and all else rounded less."""
GROUPS_AT_ONCE = 4096  # that stay cached while all shares are tried

Trial = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # codes, scale, zero, weights again


def quantize_groups(weights: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round float32 weights (R, C) to the nearest codes, with the range of each group that loses least.

    Returns:
        codes uint8 (R, 64 G), scale bfloat16 (R, G), zero uint8 (R, G).
    """
    largest = (1 << bits) - 1

    def attempt(groups: np.ndarray, share: float) -> Trial:
        low = groups.min(axis=1, initial=0) * np.float32(share)  # the range holds zero
        high = groups.max(axis=1, initial=0) * np.float32(share)
        scale = to_bfloat16((high - low) / np.float32(largest))
        step = from_bfloat16(scale)[:, None]
        inverse = _inverse(step)
        zero = np.clip(np.rint(-low[:, None] * inverse * STEPS), 0, 255)
        codes = np.clip(np.rint(groups * inverse + zero / STEPS), 0, largest)
        return codes, scale, zero[:, 0], step * (codes - zero / STEPS)

    codes, scale, zero = _best(weights, attempt)
    return codes, scale, zero


def quantize_residual(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round float32 values (R, C) to 4 bits around the middle.

    Returns:
        codes uint8 (R, 64 G), scale bfloat16 (R, G).
    """

    def attempt(groups: np.ndarray, share: float) -> Trial:
        scale = to_bfloat16(np.abs(groups).max(axis=1) * np.float32(share / (MIDDLE - 0.5)))
        step = from_bfloat16(scale)[:, None]
        codes = np.clip(np.rint(groups * _inverse(step)) + MIDDLE, 0, 2 * MIDDLE - 1)
        return codes, scale, np.zeros(len(groups)), step * (codes - MIDDLE)

    codes, scale, _ = _best(values, attempt)
    return codes, scale


def dequantize_groups(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, cols: int) -> np.ndarray:
    """Weights (R, cols) as float32 of codes (R, 64 G), scale (R, G) and zero (R, G)."""
    steps = codes.reshape(*scale.shape, GROUP) - zero[..., None].astype(np.float32) / STEPS
    return (from_bfloat16(scale)[..., None] * steps).reshape(len(codes), -1)[:, :cols]


def dequantize_residual(codes: np.ndarray, scale: np.ndarray, cols: int) -> np.ndarray:
    """Values (R, cols) as float32 of codes (R, 64 G) and scale (R, G)."""
    return dequantize_groups(codes, scale, np.full(scale.shape, MIDDLE * STEPS, np.uint8), cols)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes (R, 64 G) -> bytes (R, 32 G): byte j of a group holds code j, and code j + 32 in its upper half."""
    groups = codes.reshape(len(codes), -1, 2, GROUP // 2)
    return (groups[:, :, 0] | groups[:, :, 1] << 4).reshape(len(codes), -1)


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack_nibbles`."""
    halves = packed.reshape(len(packed), -1, 1, GROUP // 2)
    return np.concatenate((halves & 15, halves >> 4), axis=2).reshape(len(packed), -1)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(values: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 -> float32; so do float16 and float32 as they are."""
    if values.dtype != np.uint16:
        return np.asarray(values, np.float32)
    return (values.astype(np.uint32) << 16).view(np.float32)


def _best(
    matrix: np.ndarray, attempt: Callable[[np.ndarray, float], Trial]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scale and zero of the share of CLIPPED with the smallest squared error, for each group of its own."""
    rows, cols = matrix.shape
    width = -(-cols // GROUP)
    filled = np.pad(np.asarray(matrix, np.float32), ((0, 0), (0, width * GROUP - cols)))
    groups = filled.reshape(-1, GROUP)
    codes = np.empty(groups.shape, np.uint8)
    scale = np.empty(len(groups), np.uint16)
    zero = np.empty(len(groups), np.uint8)
    for start in range(0, len(groups), GROUPS_AT_ONCE):
        part = slice(start, start + GROUPS_AT_ONCE)
        least = np.full(len(groups[part]), np.inf, np.float32)
        for share in CLIPPED:
            tried_codes, tried_scale, tried_zero, again = attempt(groups[part], share)
            error = np.square(again - groups[part]).sum(axis=1)
            better = error < least
            least = np.where(better, error, least)
            codes[part][better] = tried_codes[better]
            scale[part][better] = tried_scale[better]
            zero[part][better] = tried_zero[better]
    codes = codes.reshape(rows, -1)
    codes[:, cols:] = 0
    return codes, scale.reshape(rows, width), zero.reshape(rows, width)


def _inverse(step: np.ndarray) -> np.ndarray:
    """One over each step; zero where that is not finite."""
    return np.divide(1, step, out=np.zeros_like(step), where=step > np.float32(1e-30))
