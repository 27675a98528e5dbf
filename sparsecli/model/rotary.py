"""Frequencies of rotary positions: one formula for PyTorch, the native engine and its reference."""

from __future__ import annotations

import numpy as np

from sparsecli.spec.model import ModelSpec
from sparsecli.spec.positions import Llama3RotaryScaling


def rotary_frequencies(spec: ModelSpec, sliding: bool = False) -> np.ndarray:
    """Radians by which a position turns each pair of a head, float32 (rotary_width / 2,), the fastest first.

    `sliding`: of layers with a window, where these have a base of their own.


    Operations and their order are those of transformers, so that a foreign checkpoint keeps its angles: far into
    a text the last bit of a frequency shows. PyTorch's powers are rounded correctly nearly always, NumPy's own
    float32 ones are not.
    """
    exponents = np.arange(0, spec.rotary_width, 2, dtype=np.float32) / np.float32(spec.rotary_width)
    base = spec.sliding_rotary_base if sliding and spec.sliding_rotary_base else spec.rotary_base
    powers = np.float64(base) ** exponents.astype(np.float64)
    frequencies = 1 / powers.astype(np.float32)
    scaling = None if sliding and spec.sliding_rotary_base else spec.rotary_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "llama3":
        return _blend(frequencies, scaling)
    return frequencies / np.float32(scaling.factor)


def _blend(frequencies: np.ndarray, scaling: Llama3RotaryScaling) -> np.ndarray:
    """Kept where a pair turns often within the original context, divided where seldom, between them a mix."""
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = np.float32(scaling.original_positions) / (np.float32(2 * np.pi) / frequencies)
    share = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 - share) * frequencies / np.float32(scaling.factor) + share * frequencies
