"""What a conversion would do and try, from its recipe and the dense model's description alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsecli import console
from sparsecli.convert.plan import Candidate
from sparsecli.convert.report import csv_lines, markdown_table
from sparsecli.recipe.data import TextSpec
from sparsecli.recipe.schema import ConvertSpec

PLAN = ["plan", ""]
CANDIDATES = ["candidate", "units in full", "MB/token", "at most, against bfloat16"]


@dataclass(frozen=True)
class Preview:
    """What a dry run shows.

    Attributes:
        source: the dense model as the user named it.
        dense_bytes: weights that a token of it reads in bfloat16.
        output: where the result would be.
    """

    source: str
    dense_bytes: int
    convert: ConvertSpec
    data: TextSpec
    output: str
    candidates: list[Candidate]

    def facts(self) -> list[tuple[str, str]]:
        """The plan, for people."""
        convert = self.convert
        calibration = f"{convert.calibration_tokens:,} tokens, {convert.tuning_tokens:,} to compare on"
        files = f"recipe.yaml, run.json, report.json, report.md, frontier.png, model/ in {self.output}"
        return [
            ("dense model", f"{self.source}, {self.dense_bytes / 1e6:.1f} MB a token in bfloat16"),
            ("budget", convert.budget or "none: the layers are given"),
            ("weights without bits of their own", convert.decode_dtype),
            ("calibration", calibration),
            ("held out", held_out(self.data)),
            ("distillation", self._distillation()),
            ("files", files),
        ]

    def _distillation(self) -> str:
        tokens = self.convert.distillation.tokens
        if not tokens:
            return "none"
        return f"{tokens:,} tokens" + (", none if the budget is kept without" if self.convert.budget else "")

    def candidate_rows(self) -> list[tuple[str, ...]]:
        """Name, share of the units, megabytes a token, and the speed-up that these allow for."""
        return [
            (
                each.name,
                f"{each.spec.kept_fraction:.1%}",
                f"{each.bytes_per_token / 1e6:.1f}",
                f"{self.dense_bytes / each.bytes_per_token:.2f}x",
            )
            for each in self.candidates
        ]

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON data; `schema` changes when a field changes its meaning."""
        return {
            "schema": 1,
            "source": self.source,
            "output": self.output,
            "dense_bytes_per_token": self.dense_bytes,
            "convert": self.convert.model_dump(mode="json"),
            "data": self.data.model_dump(mode="json"),
            "candidates": [
                {
                    "name": each.name,
                    "kept_fraction": each.spec.kept_fraction,
                    "bytes_per_token": each.bytes_per_token,
                }
                for each in self.candidates
            ],
        }

    def show(self, format: str) -> None:
        """Print it to stdout as table, json, markdown, or csv (the candidates alone)."""
        if format == "json":
            console.json_out(self.as_json())
        elif format == "markdown":
            lines = [*markdown_table(PLAN, self.facts()), ""]
            console.out("\n".join([*lines, *markdown_table(CANDIDATES, self.candidate_rows())]))
        elif format == "csv":
            rows = [(each.name, each.spec.kept_fraction, each.bytes_per_token) for each in self.candidates]
            console.out(csv_lines(["candidate", "kept_fraction", "bytes_per_token"], rows), end="")
        else:
            console.print_table(PLAN, self.facts())
            console.print_table(CANDIDATES, self.candidate_rows())


def held_out(data: TextSpec) -> str:
    """How much text the result is judged by, as far as the recipe tells."""
    most = "" if data.held_out_tokens is None else f"at most {data.held_out_tokens:,} tokens of "
    given = getattr(data, "held_out_paths", None) or getattr(data, "held_out_split", None)
    if given:
        return most + (given if isinstance(given, str) else ", ".join(given))
    return f"{most}{data.held_out_fraction:.1%} of the documents"
