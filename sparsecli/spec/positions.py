"""Positions as data: bases of digits, coordinates, and rotary scaling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sparsecli.spec.base import Size, Spec, Width

DIGIT_BASES, DIGITS = (11, 13, 14, 15), 8
"""Bases in which `positions: digits` writes a position, and how many digits."""


class AxialSpec(Spec):
    """Positions as coordinates: a trained vector for each, side by side."""

    shape: Annotated[list[Size], Field(min_length=1)]
    """Positions along each axis, the last one fastest; their product is at least max_positions."""
    widths: Annotated[list[Width], Field(min_length=1)]
    """Width of each axis' vectors; their sum is d_model."""


class LinearRotaryScaling(Spec):
    """Positions divided by a factor."""

    kind: Literal["linear"]
    factor: Annotated[float, Field(ge=1)]
    """How many times longer the context is."""


class Llama3RotaryScaling(Spec):
    """Low frequencies divided by a factor, high ones kept, those between blended (as in Llama 3.1)."""

    kind: Literal["llama3"]
    factor: Annotated[float, Field(ge=1)]
    """How many times longer the context is."""
    low_frequency_factor: Annotated[float, Field(gt=0)]
    """Turns over the original context below which a frequency is divided."""
    high_frequency_factor: Annotated[float, Field(gt=0)]
    """Turns over the original context above which it is kept."""
    original_positions: Size
    """The context before it was extended."""


RotaryScaling = Annotated[LinearRotaryScaling | Llama3RotaryScaling, Field(discriminator="kind")]
