"""Trained positions that are not a table, written out as one: a token then reads a row of it, whatever they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsecli.spec.model import ModelSpec
from sparsecli.spec.positions import DIGIT_BASES, DIGITS


def position_table(spec: ModelSpec, tensors: Sequence[np.ndarray]) -> np.ndarray:
    """Vectors (max_positions, d) of all positions, from the tensors that the model has of them, float32."""
    return _digits(spec, *tensors) if spec.positions == "digits" else _axial(spec, tensors)


def _digits(spec: ModelSpec, weight: np.ndarray, start: np.ndarray) -> np.ndarray:
    """weight (bases, digits, d / digits) times the digits of a position, lowest first, summed over the bases; start
    (d,) is added at the first position."""
    positions = np.arange(spec.max_positions)
    table = np.zeros((spec.max_positions, DIGITS, spec.d_model // DIGITS), np.float32)
    for base, vectors in zip(DIGIT_BASES, weight, strict=True):
        digits = positions[:, None] // base ** np.arange(DIGITS) % base
        table += digits[..., None].astype(np.float32) * vectors
    rows = table.reshape(spec.max_positions, spec.d_model)
    rows[0] += start.reshape(-1)
    return rows


def _axial(spec: ModelSpec, axes: Sequence[np.ndarray]) -> np.ndarray:
    """The vectors of a position's coordinates, side by side; the last coordinate runs fastest."""
    assert spec.axial
    places = np.unravel_index(np.arange(spec.max_positions), spec.axial.shape)
    parts = zip(axes, places, spec.axial.widths, strict=True)
    return np.concatenate([axis.reshape(-1, width)[place] for axis, place, width in parts], axis=1)
