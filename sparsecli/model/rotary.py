"""Frequencies of rotary positions: one formula for PyTorch, the native engine and its reference."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from sparsecli.spec.model import ModelSpec
from sparsecli.spec.positions import (
    LinearRotaryScaling,
    Llama3RotaryScaling,
    LongRotaryScaling,
    YarnRotaryScaling,
)

RotaryTable = Literal["full", "long", "sliding"]
"""Frequencies of a model: those of most layers, theirs in a text longer than `spec.rotary_switch`, and those of layers
with a window, where these have a base of their own."""


def rotary_frequencies(spec: ModelSpec, table: RotaryTable = "full") -> np.ndarray:
    """Radians by which a position turns each pair of a head, float32 (rotary_width / 2,), the fastest first.

    Operations and their order are those of transformers, so that a foreign checkpoint keeps its angles: far into
    a text the last bit of a frequency shows. PyTorch's powers are rounded correctly nearly always, NumPy's own
    float32 ones are not.
    """
    exponents = np.arange(0, spec.rotary_width, 2, dtype=np.float32) / np.float32(spec.rotary_width)
    sliding = table == "sliding" and spec.sliding_rotary_base is not None
    base = spec.sliding_rotary_base if sliding else spec.rotary_base
    powers = (np.float64(base) ** exponents.astype(np.float64)).astype(np.float32)
    match None if sliding else spec.rotary_scaling:
        case LongRotaryScaling(short_factor=short, long_factor=long):
            return 1 / (np.array(long if table == "long" else short, np.float32) * powers)
        case YarnRotaryScaling() as scaling:
            return _ramp(spec, powers, scaling)
        case Llama3RotaryScaling() as scaling:
            return _blend(1 / powers, scaling)
        case LinearRotaryScaling(factor=factor):
            return 1 / powers / np.float32(factor)
    return 1 / powers


def _blend(frequencies: np.ndarray, scaling: Llama3RotaryScaling) -> np.ndarray:
    """Kept where a pair turns often within the original context, divided where seldom, between them a mix."""
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = np.float32(scaling.original_positions) / (np.float32(2 * np.pi) / frequencies)
    share = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 - share) * frequencies / np.float32(scaling.factor) + share * frequencies


def _ramp(spec: ModelSpec, powers: np.ndarray, scaling: YarnRotaryScaling) -> np.ndarray:
    """The same with a share that is linear in the number of the pair."""
    width = spec.rotary_width

    def pair_that_turns(times: float) -> float:
        """The pair, not a whole number, that turns so many times within the original context."""
        return (
            width
            * math.log(scaling.original_positions / (times * 2 * math.pi))
            / (2 * math.log(spec.rotary_base))
        )

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = float(math.floor(first)), float(math.ceil(last))
    first, last = max(first, 0.0), min(last, width - 1.0)
    if first == last:
        last += 0.001
    pairs = np.arange(width // 2, dtype=np.float32)
    share = 1 - np.clip((pairs - np.float32(first)) / np.float32(last - first), 0, 1)
    return 1 / (np.float32(scaling.factor) * powers) * (1 - share) + 1 / powers * share
