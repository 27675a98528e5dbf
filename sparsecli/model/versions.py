"""The oldest version of transformers with which the models work: `make test-oldest` runs their tests with it."""

from __future__ import annotations

import re

from sparsecli.console import Failure

OLDEST = "5.23"
"""The same as the lower bound in pyproject.toml. Earlier versions may compute something else without a warning."""


def too_old(found: str) -> str | None:
    """The message for the version `found` of transformers; None if the models work with it."""
    if _numbers(found) >= _numbers(OLDEST):
        return None
    return f"older than {OLDEST}: pip install 'transformers>={OLDEST}'"


def check_transformers(found: str) -> None:
    """Raise Failure if the version `found` of transformers is too old."""
    if fault := too_old(found):
        raise Failure(f"transformers {found} is {fault}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
