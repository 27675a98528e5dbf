"""Frequencies of rotary positions: one formula for PyTorch, the native engine and its reference."""

from __future__ import annotations

import numpy as np

from sparsecli.model.architecture import Llama3RotaryScaling, ModelSpec


def rotary_frequencies(spec: ModelSpec) -> np.ndarray:
    """Radians by which a position turns each pair of a head, float32 (rotary_width / 2,), the fastest first.

    The order of operations is that of transformers, in float32 too, so that a foreign checkpoint keeps its angles.
    """
    exponents = np.arange(0, spec.rotary_width, 2, dtype=np.float32) / np.float32(spec.rotary_width)
    frequencies = 1 / np.float32(spec.rotary_base) ** exponents
    scaling = spec.rotary_scaling
    if scaling is None:
        return frequencies
    divided = frequencies / np.float32(scaling.factor)
    return _blend(frequencies, divided, scaling) if scaling.kind == "llama3" else divided


def _blend(kept: np.ndarray, divided: np.ndarray, scaling: Llama3RotaryScaling) -> np.ndarray:
    """`kept` where a pair turns often within the original context, `divided` where seldom, between them a mix."""
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = np.float32(scaling.original_positions) * kept / np.float32(2 * np.pi)
    share = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 - share) * divided + share * kept
