"""The report of a conversion, as JSON, as tables, as Markdown and as CSV; `page` has it as a page and a figure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.evaluate.losses import HeldOutLoss
from sparsecli.model.card import Card, public
from sparsecli.model.files import parse_json
from sparsecli.recipe.budget import parse_budget
from sparsecli.recipe.loader import dump
from sparsecli.recipe.schema import Recipe
from sparsecli.train.recovery import Recovery, Trial

SCHEMA = 3
LARGEST = 16 << 20
"""Largest size in bytes of a report that is read."""


@dataclass(frozen=True)
class StageLoss:
    """Held-out loss after one stage, computed in PyTorch."""

    name: str
    loss: HeldOutLoss


@dataclass(frozen=True)
class MeasuredModel:
    """Measured loss and speed of a model: dense in several weight types, converted, or dense in another program."""

    name: str
    loss: HeldOutLoss
    bytes_per_token: int
    """Weights that a decoded token reads, with active units as counted."""
    ms_per_token: float
    """Median of one decoded token."""
    prompt_ms_per_token: float
    """Median of one token of a prompt."""
    bits_per_weight: float = field(kw_only=True)
    """Of the weights that a decoded token reads, scales included: see `bytes_read.bits_per_weight`."""
    converted: bool = False
    peer: bool = False
    """The dense model in another program."""
    settings: str = ""
    """Weight types of a peer's file, and its settings."""


@dataclass(frozen=True)
class CandidateSummary:
    """A candidate of the search, with its predicted loss."""

    name: str
    bytes_per_token: int
    predicted_increase: float
    """Of the loss over the dense model's on tuning text, nats/token, before recovery."""
    expected_increase: float
    """The same after recovery."""


@dataclass(frozen=True)
class Report:
    """Settings, losses, speeds and verdict of a conversion."""

    source: str
    output: str
    budget: str | None
    method: str
    """The candidate's name."""
    calibration_tokens: int
    held_out_tokens: int
    distillation_tokens: int
    kept_fraction: float
    """Share of feed-forward units that a token computes in full, as planned."""
    kept_fraction_by_layer: list[float] | None
    """The same as the kernels counted it on held-out text."""
    threads: int
    bandwidth_gb_per_second: float
    stages: list[StageLoss] = field(default_factory=list)
    models: list[MeasuredModel] = field(default_factory=list)
    source_weights: str = ""
    """Weight types of the source itself, in words: see `stored_weights`."""
    candidates: list[CandidateSummary] = field(default_factory=list)
    recovery: Recovery | None = None
    """The distillation with its trials."""
    processor: str = ""
    """Name and vector instructions of the processor that times were measured on."""
    command: str = ""
    """The command line that made it."""

    @property
    def result(self) -> MeasuredModel:
        """The converted model."""
        return next(model for model in self.models if model.converted)

    @property
    def verdict(self) -> str:
        """One line: the speedup, the increase of perplexity, and whether a dense model is the better choice."""
        result, dense = self.result, self.models[0]
        others = [model for model in self.models if not model.converted]
        parts = [
            f"{dense.ms_per_token / result.ms_per_token:.2f}x the speed of {dense.name} at "
            f"{result.loss.perplexity_increase:+z.2%} perplexity"
        ]
        parts += [
            f"{model.name}: {dense.ms_per_token / model.ms_per_token:.2f}x at "
            f"{model.loss.perplexity_increase:+z.2%}"
            for model in others[1:]
        ]
        faster = [model for model in others if model.ms_per_token <= result.ms_per_token]
        for model in sorted(faster, key=lambda model: model.ms_per_token):
            if self._within_budget(model.loss):
                return "; ".join([*parts, f"{model.name} is faster and also within the budget: prefer it"])
            if _no_worse(model.loss, result.loss):
                return "; ".join([*parts, f"{model.name} is faster and no worse: prefer it"])
        return "; ".join(parts)

    def _within_budget(self, loss: HeldOutLoss) -> bool:
        """Whether such a loss meets the budget, if that limits the loss."""
        budget = parse_budget(self.budget) if self.budget else None
        allowed = budget.nats(loss.nats_per_token - loss.increase) if budget else None
        return allowed is not None and loss.increase <= allowed

    def as_json(self) -> dict[str, Any]:
        """The report as JSON data; `schema` changes when a field changes its meaning."""
        return {"schema": SCHEMA, **asdict(self), "verdict": self.verdict}

    @classmethod
    def read(cls, path: Path) -> Report:
        """The report in a `report.json`. Raises `Failure` if the file is missing or is none of this format."""
        from pydantic import TypeAdapter

        try:
            if path.stat().st_size > LARGEST:
                raise Failure(f"{path}: is larger than {LARGEST >> 20} MiB; is it a report.json?")
            facts = parse_json(path.read_bytes())
            if facts.pop("schema") != SCHEMA or facts.pop("verdict") is None:
                raise ValueError
            report = TypeAdapter(cls).validate_python(facts)
            report.result  # noqa: B018  # there must be one
        except OSError as error:
            raise Failure(f"{path}: cannot read the report: {console.system_reason(error)}") from error
        except (ValueError, KeyError, AttributeError, TypeError, StopIteration) as error:
            raise Failure(
                f"{path}: not a report of sparsify-convert with schema {SCHEMA}; name the report.json of its --output"
            ) from error
        return report

    # -- tables ----------------------------------------------------------------------------------------------

    def stage_rows(self) -> list[tuple[str, ...]]:
        """Stage, held-out loss, increase of perplexity over dense, and its standard error."""
        return [(stage.name, *_loss_cells(stage.loss)) for stage in self.stages]

    def model_rows(self) -> list[tuple[str, ...]]:
        """Model, loss cells, bits a weight, megabytes and milliseconds per token, speedup over the first, prompt
        milliseconds."""
        first = self.models[0].ms_per_token
        return [
            (
                model.name,
                *_loss_cells(model.loss),
                f"{model.bits_per_weight:.2f}",
                f"{model.bytes_per_token / 1e6:.1f}",
                f"{model.ms_per_token:.2f}",
                f"{first / model.ms_per_token:.2f}x",
                f"{model.prompt_ms_per_token:.2f}",
            )
            for model in self.models
        ]

    def candidate_rows(self) -> list[tuple[str, ...]]:
        """Candidate, MB a token, and predicted loss before and after recovery."""
        return [
            (
                each.name,
                f"{each.bytes_per_token / 1e6:.1f}",
                f"{each.predicted_increase:+.4f}",
                f"{each.expected_increase:+.4f}",
            )
            for each in self.candidates
        ]

    def trial_rows(self) -> list[tuple[str, ...]]:
        """The trials of the distillation."""
        return [_trial_cells(each) for each in self.recovery.trials] if self.recovery else []

    def facts(self) -> list[tuple[str, str]]:
        """The other figures as labels and texts."""
        rows = [("method", self.method)]
        if self.budget:
            rows.insert(0, ("budget", self.budget))
        if self.kept_fraction_by_layer:
            shares = self.kept_fraction_by_layer
            counted = f"{sum(shares) / len(shares):.1%}"
            if max(shares) - min(shares) > 5e-4:
                counted += f", by layer {min(shares):.1%} to {max(shares):.1%}"
            rows.append(("active units", counted))
        if self.source_weights:
            rows.insert(0, ("source", self.source_weights))
        rows += [
            (
                "text",
                f"{self.calibration_tokens:,} tokens for calibration, {self.held_out_tokens:,} held out",
            ),
            (
                "distillation",
                f"{self.distillation_tokens:,} tokens" + (f"; {self.recovery}" if self.recovery else ""),
            ),
            ("measured on", f"{self.threads} threads, {self.bandwidth_gb_per_second:.0f} GB/s"),
            *((model.name, model.settings) for model in self.models if model.peer),
            ("verdict", self.verdict),
            ("model", f"{self.output}/model"),
        ]
        return rows

    def markdown(self) -> str:
        """The report as a page for a pull request or a model card."""
        lines = [f"# {self.source} converted", "", *markdown_table(STAGE_COLUMNS, self.stage_rows()), ""]
        lines += [*markdown_table(MODEL_COLUMNS, self.model_rows()), ""]
        if self.candidates:
            lines += [*markdown_table(CANDIDATE_COLUMNS, self.candidate_rows()), ""]
        if trials := self.trial_rows():
            lines += [*markdown_table(TRIAL_COLUMNS, trials), ""]
        return "\n".join([*lines, *(f"- {name}: {value}" for name, value in self.facts()), ""])

    def show(self, format: str) -> None:
        """Print the report to stdout as table, json, markdown, or csv (the models alone)."""
        if format == "json":
            console.json_out(self.as_json())
        elif format == "markdown":
            console.out(self.markdown(), end="")
        elif format == "csv":
            rows = [
                (
                    model.name,
                    *(model.loss.nats_per_token, model.loss.increase, model.loss.standard_error),
                    *(model.bits_per_weight, model.bytes_per_token),
                    *(model.ms_per_token, model.prompt_ms_per_token),
                )
                for model in self.models
            ]
            console.out(csv_lines(CSV_COLUMNS, rows), end="")
        else:
            console.print_table(STAGE_COLUMNS, self.stage_rows())
            console.print_table(MODEL_COLUMNS, self.model_rows())
            console.print_table(["conversion", ""], self.facts())


STAGE_COLUMNS = ["stage", "loss (nats/token)", "perplexity", "± error"]
MODEL_COLUMNS = [
    *("model", "loss (nats/token)", "perplexity", "± error"),
    *("bits/weight", "MB/token", "ms/token", "speedup", "prompt ms/token"),
]
CSV_COLUMNS = (
    *("model", "held_out_loss", "loss_increase", "standard_error"),
    *("bits_per_weight", "bytes_per_token", "ms_per_token", "prompt_ms_per_token"),
)
TRIAL_COLUMNS = ["trial trains", "learning rate", "warm-up", "steps", "KL on tuning text"]
CANDIDATE_COLUMNS = ["candidate", "MB/token", "predicted loss increase", "after recovery"]


def _no_worse(loss: HeldOutLoss, other: HeldOutLoss) -> bool:
    """Whether a loss exceeds the other by no more than their standard errors."""
    return loss.increase - other.increase <= math.hypot(loss.standard_error or 0, other.standard_error or 0)


def _loss_cells(loss: HeldOutLoss) -> tuple[str, str, str]:
    error = "—" if loss.standard_error is None else f"{loss.standard_error:.2%}"
    return f"{loss.nats_per_token:.4f}", f"{loss.perplexity_increase:+z.2%}", error


def card_of(report: Report, recipe: Recipe, license: str | None) -> Card:
    """The card of a converted model; `license` is the dense model's."""
    _, _, body = report.markdown().partition("\n")
    summary = f"{public(report.source)}, made faster to decode by sparsecli."
    facts = [("method", report.method), ("perplexity over the dense model", _change(report.result.loss))]
    return Card(summary, facts, [("Loss and speed", body)], dump(recipe), license)


def _change(loss: HeldOutLoss) -> str:
    """The increase of perplexity in words."""
    error = "" if loss.standard_error is None else f" ± {loss.standard_error:.2%}"
    return f"{loss.perplexity_increase:+.2%}{error}"


def _trial_cells(trial: Trial) -> tuple[str, ...]:
    kl = "not finite" if trial.kl is None else f"{trial.kl:.4f}"
    return trial.trains, f"{trial.learning_rate:g}", f"{trial.warmup_fraction:.0%}", str(trial.steps), kl


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        f"| {' | '.join(columns)} |",
        f"| {' | '.join('---' for _ in columns)} |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def csv_lines(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as CSV; None becomes an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()
