"""Positions as data: bases of digits, coordinates, and rotary scaling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sparsecli.spec.base import Size, Spec, Width, fault

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


class YarnRotaryScaling(Spec):
    """Pairs that turn slowly divided by a factor, fast ones kept, a linear ramp between them (YaRN)."""

    kind: Literal["yarn"]
    factor: Annotated[float, Field(ge=1)]
    """How many times longer the context is."""
    original_positions: Size
    """The context before it was extended."""
    attention_factor: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the cosines and sines, of queries and of keys."""
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    """Turns over the original context above which a frequency is kept."""
    beta_slow: Annotated[float, Field(gt=0)] = 1.0
    """Turns over the original context below which it is divided."""
    truncate: bool = True
    """Begin and end the ramp at whole pairs."""

    @model_validator(mode="after")
    def _check(self) -> YarnRotaryScaling:
        if self.beta_slow >= self.beta_fast:
            raise fault("beta_slow", f"{self.beta_slow} is not below beta_fast {self.beta_fast}")
        return self


class LongRotaryScaling(Spec):
    """Every frequency divided by a factor of its own; other factors where a text is longer than the original context
    (LongRoPE, as in Phi-3).

    A text that grows beyond the original context is computed anew, with all its positions turned by the long factors.
    """

    kind: Literal["longrope"]
    original_positions: Size
    """The context before it was extended: the longest text that the short factors turn."""
    short_factor: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    """Divisors of the frequencies in a text within the original context, one for each pair of a head."""
    long_factor: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    """Divisors in a longer text."""
    attention_factor: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the cosines and sines, of queries and of keys."""


RotaryScaling = Annotated[
    LinearRotaryScaling | Llama3RotaryScaling | YarnRotaryScaling | LongRotaryScaling,
    Field(discriminator="kind"),
]
