"""Budgets of a conversion as text in a recipe (`loss +2 %`, `perplexity +5 %`, `kept 1/4`, `bytes 100 MB`), and shares
(`2 %`)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

EXPECTED = "expected `loss +2 %`, `perplexity +5 %`, `kept 1/4` (or `kept 25 %`), or `bytes 100 MB`"
UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9}


@dataclass(frozen=True)
class Budget:
    """A limit on the converted model.

    Attributes:
        kind: `loss` and `perplexity` limit the increase over the dense model on held-out text, as a share; `kept`
            limits the share of units that a token computes in full; `bytes` limits the bytes that a token reads.
    """

    kind: Literal["loss", "perplexity", "kept", "bytes"]
    value: float

    def nats(self, dense: float) -> float | None:
        """Largest allowed rise of the loss in nats a token over a `dense` loss; None where the loss has no limit."""
        if self.kind == "loss":
            return dense * self.value
        return math.log1p(self.value) if self.kind == "perplexity" else None

    def __str__(self) -> str:
        if self.kind == "bytes":
            return f"bytes {_plain(self.value / 1e6)} MB"
        sign = "" if self.kind == "kept" else "+"
        return f"{self.kind} {sign}{_plain(self.value * 100)} %"


def _plain(value: float) -> str:
    """Up to four decimals, and never an exponent, which `parse_budget` does not read."""
    return f"{value:.4f}".rstrip("0").rstrip(".")


def parse_budget(text: str) -> Budget:
    """Parse a budget.

    Raises:
        ValueError: `text` has none of the forms, or its value is out of range.
    """
    words = text.strip().lower()
    if found := re.fullmatch(r"(loss|perplexity)\s*\+?\s*(\d+(?:\.\d+)?)\s*%", words):
        return Budget("loss" if found[1] == "loss" else "perplexity", float(found[2]) / 100)
    if found := re.fullmatch(r"kept\s*(\d+(?:\.\d+)?)\s*(%|/\s*(\d+))", words):
        whole = int(found[3] or 100)
        share = float(found[1]) / whole if whole else math.inf
        if not 0 <= share <= 1:
            raise ValueError(f"{text!r} keeps {share:g} of the units; a share lies between 0 and 1")
        return Budget("kept", share)
    if found := re.fullmatch(r"bytes\s*(\d+(?:\.\d+)?)\s*([kmg]b)", words):
        return Budget("bytes", float(found[1]) * UNITS[found[2]])
    raise ValueError(f"{text!r} is not a budget; {EXPECTED}")


def parse_share(text: str) -> float:
    """`2 %` as 0.02.

    Raises:
        ValueError: `text` has another form.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if found is None:
        raise ValueError(f"expected a share such as `2 %`, got {text!r}")
    return float(found[1]) / 100
