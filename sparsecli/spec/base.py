"""The base class of recipe blocks, the number types of their fields, and errors that name a field."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Probability = Annotated[float, Field(ge=0, le=1)]


def _at_most(limit: int) -> AfterValidator:
    """Far beyond any model, so that nothing that grows with a number is begun for one that is damaged."""

    def check(value: int) -> int:
        if value > limit:
            message = f"{value} is more than {limit}, the most that is taken"
            raise PydanticCustomError("limit", "{message}", {"message": message})
        return value

    return AfterValidator(check)


MOST_LAYERS = 2**10
DEEP, WIDE, MANY = _at_most(MOST_LAYERS), _at_most(2**20), _at_most(2**24)
"""Limits of layers and what else is gone through one by one; of vectors and the parts that they are cut into; of the
rows of matrices that have many."""
LARGE = _at_most(2**31 - 1)
Whole = Annotated[int, LARGE]
Size = Annotated[int, Field(gt=0), LARGE]  # in this order, so that the JSON schema has the bound
Count = Annotated[int, Field(ge=0), LARGE]
Depth = Annotated[int, Field(gt=0), DEEP]
Width = Annotated[int, Field(gt=0), WIDE]
Units = Annotated[int, Field(gt=0), MANY]


class Spec(BaseModel):
    """A frozen block of a recipe: unknown keys are errors, every field's docstring is its documentation."""

    # A validator is built on first use: a command reads few of the blocks.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


def fault(field: str, message: str) -> PydanticCustomError:
    """An error of one block that names the field to look at (`field`), for checks that span several fields."""
    return PydanticCustomError("fault", "{message}", {"field": field, "message": message})


def check_multiple(field: str, value: int, of: str, factor: int) -> None:
    """Raise a `fault` unless `value` is a multiple of `factor`, naming the nearest values that are."""
    if value % factor:
        below = value // factor * factor
        nearest = f"{below} and {below + factor}" if below else f"{factor}"
        raise fault(field, f"{value} is not a multiple of {of} {factor}; nearest: {nearest}")
