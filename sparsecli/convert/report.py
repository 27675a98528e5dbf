"""What a conversion cost and gained, as data, as a table, as Markdown and as a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsecli import console
from sparsecli.convert.evaluation import Loss
from sparsecli.recipe.budget import parse_budget


@dataclass(frozen=True)
class Stage:
    """Held-out loss after one stage, computed in PyTorch."""

    name: str
    loss: Loss


@dataclass(frozen=True)
class Row:
    """A model as it decodes: the dense one in several weight types, the converted one, the dense one elsewhere."""

    name: str
    loss: Loss
    bytes_per_token: int
    """Weights that a decoded token reads, of chosen units as many as were counted."""
    ms_per_token: float
    """Median of one decoded token."""
    prompt_ms_per_token: float
    """Median of a prompt's token."""
    converted: bool = False
    peer: bool = False
    """Another program decodes it, the dense model."""
    settings: str = ""
    """What a peer's file holds and how it is run."""


@dataclass(frozen=True)
class Considered:
    """A candidate of the search."""

    name: str
    bytes_per_token: int
    predicted_change: float
    """Nats a token over the dense model's, on tuning text, before recovery."""
    expected_change: float
    """The same after recovery."""


@dataclass(frozen=True)
class Report:
    """Everything a reader needs to judge a conversion."""

    source: str
    output: str
    budget: str | None
    method: str
    """The candidate's name."""
    calibration_tokens: int
    held_out_tokens: int
    distilled_tokens: int
    kept_fraction: float
    """Share of feed-forward units that a token computes in full, as planned."""
    kept_fraction_by_layer: list[float] | None
    """The same as the kernels counted it on held-out text."""
    threads: int
    bandwidth_gb_per_second: float
    stages: list[Stage] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    considered: list[Considered] = field(default_factory=list)

    @property
    def result(self) -> Row:
        """The converted model."""
        return next(row for row in self.rows if row.converted)

    @property
    def verdict(self) -> str:
        """One plain line: what was gained, at which cost, and whether a dense model does better."""
        result, dense = self.result, self.rows[0]
        others = [row for row in self.rows if not row.converted]
        parts = [
            f"{dense.ms_per_token / result.ms_per_token:.2f}x the speed of {dense.name} at "
            f"{result.loss.perplexity_change:+z.2%} perplexity"
        ]
        parts += [
            f"{row.name}: {dense.ms_per_token / row.ms_per_token:.2f}x at {row.loss.perplexity_change:+z.2%}"
            for row in others[1:]
        ]
        faster = [row for row in others if row.ms_per_token <= result.ms_per_token]
        for row in sorted(faster, key=lambda row: row.ms_per_token):
            if self._within_budget(row.loss):
                return "; ".join([*parts, f"{row.name} is faster and within the budget too: prefer it"])
            if _no_worse(row.loss, result.loss):
                return "; ".join([*parts, f"{row.name} is faster and no worse: prefer it"])
        return "; ".join(parts)

    def _within_budget(self, loss: Loss) -> bool:
        """Whether a model of such a loss keeps the budget, where that limits the loss."""
        budget = parse_budget(self.budget) if self.budget else None
        allowed = budget.nats(loss.nats_per_token - loss.change) if budget else None
        return allowed is not None and loss.change <= allowed

    def as_json(self) -> dict[str, Any]:
        """The report as JSON data; `schema` changes when a field changes its meaning."""
        return {"schema": 2, **asdict(self), "verdict": self.verdict}

    def stage_rows(self) -> list[tuple[str, ...]]:
        """Stage, loss in nats a token, perplexity against dense, and its standard error."""
        return [(stage.name, *_loss_cells(stage.loss)) for stage in self.stages]

    def model_rows(self) -> list[tuple[str, ...]]:
        """Model, loss cells, megabytes a token, milliseconds a token, speed-up over the first, prompt milliseconds."""
        first = self.rows[0].ms_per_token
        return [
            (
                row.name,
                *_loss_cells(row.loss),
                f"{row.bytes_per_token / 1e6:.1f}",
                f"{row.ms_per_token:.2f}",
                f"{first / row.ms_per_token:.2f}x",
                f"{row.prompt_ms_per_token:.2f}",
            )
            for row in self.rows
        ]

    def facts(self) -> list[tuple[str, str]]:
        """The other figures, for people."""
        rows = [("method", self.method)]
        if self.budget:
            rows.insert(0, ("budget", self.budget))
        if self.kept_fraction_by_layer:
            shares = self.kept_fraction_by_layer
            counted = f"{sum(shares) / len(shares):.1%}"
            if max(shares) - min(shares) > 5e-4:
                counted += f", by layer {min(shares):.1%} to {max(shares):.1%}"
            rows.append(("units computed in full", counted))
        rows += [
            ("text", f"{self.calibration_tokens:,} tokens calibrate, {self.held_out_tokens:,} held out"),
            ("distilled on", f"{self.distilled_tokens:,} tokens"),
            ("measured on", f"{self.threads} threads, {self.bandwidth_gb_per_second:.0f} GB/s"),
            *((row.name, row.settings) for row in self.rows if row.peer),
            ("verdict", self.verdict),
            ("model", f"{self.output}/model"),
        ]
        return rows

    def markdown(self) -> str:
        """A page for a pull request or a model card."""
        lines = [f"# {self.source} converted", "", *markdown_table(STAGES, self.stage_rows()), ""]
        lines += [*markdown_table(MODELS, self.model_rows()), ""]
        if self.considered:
            rows = [
                (
                    each.name,
                    f"{each.bytes_per_token / 1e6:.1f}",
                    f"{each.predicted_change:+.4f}",
                    f"{each.expected_change:+.4f}",
                )
                for each in self.considered
            ]
            lines += [*markdown_table(CONSIDERED, rows), ""]
        return "\n".join([*lines, *(f"- {name}: {value}" for name, value in self.facts()), ""])

    def draw(self, path: Path) -> None:
        """Save the picture of loss against time as PNG: what is down and to the left is better."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for row in self.rows:
            place = row.ms_per_token, row.loss.perplexity_change * 100
            error = (row.loss.standard_error or 0) * 100
            marker = "s" if row.converted else "^" if row.peer else "o"
            axes.errorbar(*place, yerr=error, fmt=marker, capsize=3)
            axes.annotate(row.name, place, textcoords="offset points", xytext=(6, 6))
        axes.set_xlabel("milliseconds a token")
        axes.set_ylabel("perplexity over dense (%)")
        axes.set_xlim(0, 1.35 * max(row.ms_per_token for row in self.rows))  # room for the names
        axes.margins(y=0.15)
        axes.grid(alpha=0.3)
        figure.savefig(path, format="png")

    def show(self, format: str) -> None:
        """Print the report to stdout as table, json, csv or markdown."""
        if format == "json":
            console.json_out(self.as_json())
        elif format == "markdown":
            console.out(self.markdown(), end="")
        elif format == "csv":
            rows = [
                (
                    row.name,
                    *(row.loss.nats_per_token, row.loss.change, row.loss.standard_error),
                    *(row.bytes_per_token, row.ms_per_token, row.prompt_ms_per_token),
                )
                for row in self.rows
            ]
            console.out(csv_lines(FIELDS, rows), end="")
        else:
            console.print_table(STAGES, self.stage_rows())
            console.print_table(MODELS, self.model_rows())
            console.print_table(["conversion", ""], self.facts())


STAGES = ["stage", "nats/token", "perplexity", "± error"]
MODELS = ["model", "nats/token", "perplexity", "± error", "MB/token", "ms/token", "speed", "prompt ms/token"]
FIELDS = (
    *("model", "nats_per_token", "change", "standard_error"),
    *("bytes_per_token", "ms_per_token", "prompt_ms_per_token"),
)
CONSIDERED = ["candidate", "MB/token", "predicted nats", "after recovery"]


def _no_worse(loss: Loss, other: Loss) -> bool:
    """Whether a loss is not higher than the other by more than their standard errors."""
    return loss.change - other.change <= math.hypot(loss.standard_error or 0, other.standard_error or 0)


def _loss_cells(loss: Loss) -> tuple[str, str, str]:
    error = "—" if loss.standard_error is None else f"{loss.standard_error:.2%}"
    return f"{loss.nats_per_token:.4f}", f"{loss.perplexity_change:+z.2%}", error


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [
        f"| {' | '.join(columns)} |",
        f"| {' | '.join('---' for _ in columns)} |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def csv_lines(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as CSV; None is empty."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()
