"""Which versions of transformers the models were tried with: another may compute something else without a word."""

from __future__ import annotations

from sparsecli.console import Failure

TRIED = ("5.23", "5.24")
"""Versions with which the tests of the models pass."""


def never_tried(found: str) -> str | None:
    """What to say of the version `found` of transformers; None where it was tried."""
    if ".".join(found.split(".")[:2]) in TRIED:
        return None
    return f"never tried, only {' and '.join(TRIED)}: pip install 'transformers=={TRIED[-1]}.*'"


def check_transformers(found: str) -> None:
    """Raise Failure unless the version `found` of transformers was tried."""
    if fault := never_tried(found):
        raise Failure(f"transformers {found} was {fault}")
