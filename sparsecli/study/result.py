"""The result of a study: one row for each variant, as JSON, CSV, Markdown and a table on the terminal."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from sparsecli import console
from sparsecli.bench.render import count, megabytes, milliseconds
from sparsecli.bench.result import BenchResult
from sparsecli.study.plan import Plan, Variant
from sparsecli.study.training import Trained

ROUNDINGS = {"nearest": "to the nearest", "second_order": "to second order"}


@dataclass(frozen=True)
class Decoding:
    """What the decode engine was measured at, with the weights in one type. Of models of images, per image."""

    dtype: str
    bytes_per_token: int
    ms_per_token: float
    """Median."""
    ms_p10: float
    ms_p90: float


@dataclass(frozen=True)
class Row:
    """The figures of one variant. Losses are in nats per token or image; a figure that does not exist is None."""

    variant: str
    learning_rate: float | None
    """Chosen by the loss on tuning text; None if every rate diverged."""
    border: bool
    """Whether this rate is the lowest or the highest of several."""
    trials: dict[str, float | None]
    """Tuning loss of each rate's trial; None if it diverged."""
    held_out_losses: dict[str, float | None]
    """By seed; None if the run diverged."""
    held_out_loss: float | None
    """Mean over the seeds that did not diverge."""
    deviation: float | None
    """Standard deviation over these seeds; None for one seed."""
    standard_error: float | None
    """Of the mean."""
    difference: float | None
    """Mean difference to the first variant, over the seeds that both have; None for the first."""
    difference_error: float | None
    """Standard error of `difference`."""
    tokens: int
    """Training tokens, with those of the model that it starts from."""
    parameters: int
    active_parameters: int
    """Parameters that one token uses."""
    decoding: list[Decoding]
    notes: list[str]
    accuracies: dict[str, float | None] | None = None
    """Share of held-out images that were classified rightly, by seed; None for text."""
    accuracy: float | None = None
    """Mean over the seeds that did not diverge."""
    accuracy_deviation: float | None = None
    """Standard deviation over these seeds; None for one seed."""


@dataclass(frozen=True)
class StudyResult:
    """A finished study."""

    tokens: int
    """Training tokens of a run."""
    seeds: list[int]
    learning_rates: list[float]
    rows: list[Row]
    machine: str
    """What decoding was measured on, and how; empty if it was not."""
    unit: str = "token"
    """What losses, times and training are counted by: `token` or `image`."""

    # -- as text ---------------------------------------------------------------------------------------------

    def show(self) -> None:
        """Write the table and its notes to stdout."""
        from rich import box
        from rich.table import Table

        shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        titles, rows = self._cells()
        for index, title in enumerate(titles):
            shown.add_column(title, justify="right" if index else "left", no_wrap=index > 0)
        for row in rows:
            shown.add_row(*row)
        console.table(shown)
        for line in self._below():
            console.out(line)

    def markdown(self) -> str:
        """The table and its notes."""
        titles, rows = self._cells()
        rules = ["---"] + ["---:"] * (len(titles) - 1)
        lines = [[" ".join(title.split()) for title in titles], rules, *rows]
        table = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([*table, "", *(f"- {line}" for line in self._below()), ""])

    def csv(self) -> str:
        """One line for each variant, with unrounded figures. Columns of decoding end with the weight type."""
        lines = []
        for row in self.rows:
            line = asdict(row) | {"notes": "; ".join(row.notes)}
            del line["decoding"], line["trials"], line["held_out_losses"], line["accuracies"]
            if row.accuracies is None:
                del line["accuracy"], line["accuracy_deviation"]
            line |= {f"accuracy_seed_{seed}": share for seed, share in (row.accuracies or {}).items()}
            line |= {f"held_out_loss_seed_{seed}": loss for seed, loss in row.held_out_losses.items()}
            line |= {f"tuning_loss_rate_{rate}": loss for rate, loss in row.trials.items()}
            for each in row.decoding:
                facts = asdict(each)
                dtype = facts.pop("dtype")
                line |= {f"{name}_{dtype}": value for name, value in facts.items()}
            lines.append(line)
        text = io.StringIO()
        names = list(dict.fromkeys(name for line in lines for name in line))
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()

    def as_json(self) -> dict[str, Any]:
        """The whole result."""
        return {"schema": 1, **asdict(self)}

    @property
    def _dtypes(self) -> list[str]:
        return list(dict.fromkeys(each.dtype for row in self.rows for each in row.decoding))

    @property
    def frontier(self) -> list[tuple[float, float, str]]:
        """Time (ms), held-out loss and name of variants to which no other has both a lower loss and less time for a
        token, the fastest first."""
        points = sorted(
            (each.ms_per_token, row.held_out_loss, row.variant)
            for row in self.rows
            for each in row.decoding
            if row.held_out_loss is not None
        )
        losses = [math.inf, *accumulate((loss for _, loss, _ in points), min)]
        return [point for point, best in zip(points, losses, strict=False) if point[1] < best]

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """Two-line titles and the cells of the table. Columns of decoding name the weight type if there are several,
        or a column names the one of every variant."""
        dtypes, images = self._dtypes, self.unit == "image"
        single = len(dtypes) > 1 and all(len(row.decoding) <= 1 for row in self.rows)
        titles = [
            "variant",
            "learning\nrate",
            *["held-out\naccuracy"] * images,
            "held-out\nloss",
            "std.\nerror",
        ]
        titles += [
            f"against\n{self.rows[0].variant}",
            "parameters",
            f"active /\n{'patch' if images else 'token'}",
        ]
        if single:
            titles += ["weights", f"MB /\n{self.unit}", f"ms /\n{self.unit}"]
        for dtype in () if single else dtypes:
            name = f", {dtype}" if len(dtypes) > 1 else ""
            titles += [f"MB /\n{self.unit}{name}", f"ms /\n{self.unit}{name}"]
        rows = []
        for row in self.rows:
            cells = [
                row.variant,
                f"{row.learning_rate:g}{' *' if row.border else ''}" if row.learning_rate else None,
                *[_with_error(row.accuracy, row.accuracy_deviation, ".2%")] * images,
                _with_error(row.held_out_loss, row.deviation),
                None if row.standard_error is None else f"{row.standard_error:.3f}",
                _with_error(row.difference, row.difference_error, "+.3f"),
                count(row.parameters),
                count(row.active_parameters),
            ]
            decoding = {each.dtype: each for each in row.decoding}
            own = [each.dtype for each in row.decoding] or [""]
            cells += own if single else []
            for dtype in own if single else dtypes:
                found = decoding.get(dtype)
                cells.append(megabytes(found.bytes_per_token) if found else None)
                cells.append(milliseconds(found.ms_per_token) if found else None)
            rows.append([cell or "—" for cell in cells])
        return titles, rows

    def _below(self) -> list[str]:
        """The lines below the table."""
        seeds = len(self.seeds)
        spread = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
        unit, figures = self.unit, "accuracy and loss" if self.unit == "image" else "loss"
        lines = [f"Held-out {figures} in nats/{unit} after {self.tokens:,} training {unit}s, {spread}."]
        if len(self.rows) > 2 and (best := dict.fromkeys(name for _, _, name in self.frontier)):
            lines.append(
                f"No other variant has both a lower loss and a shorter time than: {', '.join(best)}."
            )
        if len(self.learning_rates) > 1:
            rates = ", ".join(f"{rate:g}" for rate in self.learning_rates)
            data = "images" if unit == "image" else "text"
            lines.append(
                f"Learning rates: the best of {rates} by the loss on tuning {data}, for each variant."
            )
        if any(row.border for row in self.rows):
            lines.append("*: the lowest or the highest rate of the grid; the best rate may lie beyond it.")
        if self.machine:
            weights = f" Weights in {self._dtypes[0]}." if len(self._dtypes) == 1 else ""
            lines.append(self.machine + weights)
        return lines + [f"{row.variant}: {note}." for row in self.rows for note in row.notes]


def _with_error(value: float | None, error: float | None, digits: str = ".3f") -> str | None:
    if value is None:
        return None
    spread = digits if digits.endswith("%") else ".3f"
    return f"{value:{digits}}" if error is None else f"{value:{digits}} ± {error:{spread}}"


# -- from runs -----------------------------------------------------------------------------------------------


def make_result(plan: Plan, trained: Sequence[Trained], measured: BenchResult | None) -> StudyResult:
    """The result of trained variants and of a measurement of their decoding."""
    decoding: dict[str, list[Decoding]] = {}
    for each in measured.rows if measured else ():
        time = each.ms_per_token
        decoding.setdefault(each.variant, []).append(
            Decoding(each.dtype, each.bytes_per_token, time.p50, time.p10, time.p90)
        )
    first = _losses(trained[0])
    rows = [
        _row(each, None if index == 0 else first, decoding.get(each.variant.name, []), plan)
        for index, each in enumerate(trained)
    ]
    machine = ""
    if measured:
        facts, settings = measured.machine, measured.settings
        machine = (
            f"Decoding: {facts.cpu}, {facts.isa}, {facts.threads} thread{'s' * (facts.threads > 1)}, "
            f"context {settings.context}, variants interleaved, median of {settings.rounds} x "
            f"{settings.tokens_per_round} tokens."
        )
        if plan.unit == "image":
            batches = sorted({row.batch for row in measured.rows})
            machine = (
                f"Time: PyTorch, {facts.cpu}, {facts.isa}, {facts.threads} thread{'s' * (facts.threads > 1)}, "
                f"batch {', '.join(map(str, batches))}, variants interleaved, median of {settings.rounds} x "
                f"{settings.tokens_per_round} batches."
            )
    study = plan.study
    return StudyResult(plan.tokens, study.seeds, study.learning_rates, rows, machine, plan.unit)


def _row(
    trained: Trained, first: Mapping[int, float | None] | None, decoding: list[Decoding], plan: Plan
) -> Row:
    rates, rate, losses = plan.learning_rates(trained.variant), trained.learning_rate, _losses(trained)
    found = [loss for loss in losses.values() if loss is not None]
    pairs = [(loss, first.get(seed)) for seed, loss in losses.items()] if first else []
    paired = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    sizes = trained.variant.sizes
    accuracies = {str(seed): outcome.accuracy for seed, (_, outcome) in trained.runs.items()}
    right = [share for share in accuracies.values() if share is not None]
    return Row(
        variant=trained.variant.name,
        learning_rate=rate,
        border=plan.trials(trained.variant) > 0 and rate in (min(rates), max(rates)),
        trials={f"{each:g}": outcome.tuning_loss for each, outcome in trained.trials.items()},
        held_out_losses={str(seed): loss for seed, loss in losses.items()},
        held_out_loss=statistics.fmean(found) if found else None,
        deviation=statistics.stdev(found) if len(found) > 1 else None,
        standard_error=_standard_error(found),
        difference=statistics.fmean(paired) if paired else None,
        difference_error=_standard_error(paired),
        tokens=trained.tokens_before + plan.steps(trained.variant) * plan.tokens_per_step,
        parameters=sizes.total,
        active_parameters=sizes.active,
        decoding=decoding,
        notes=_notes(trained, plan),
        accuracies=accuracies if right else None,
        accuracy=statistics.fmean(right) if right else None,
        accuracy_deviation=statistics.stdev(right) if len(right) > 1 else None,
    )


def _losses(trained: Trained) -> dict[int, float | None]:
    return {seed: outcome.held_out_loss for seed, (_, outcome) in trained.runs.items()}


def _notes(trained: Trained, plan: Plan) -> list[str]:
    outcomes = {f"learning rate {rate:g}": outcome for rate, outcome in trained.trials.items()}
    outcomes |= {f"seed {seed}": outcome for seed, (_, outcome) in trained.runs.items()}
    failures = [f"{name} {outcome.failure}" for name, outcome in outcomes.items() if outcome.failure]
    return [*filter(None, [_origin(trained.variant, plan)]), *failures]


def _origin(variant: Variant, plan: Plan) -> str | None:
    """What was done to the model that a variant starts from; None if it starts from random weights."""
    start, prune, quantize = variant.spec.init_from, variant.spec.prune, variant.spec.quantize
    if start is None:
        return None
    if quantize:
        return f"{start} with weights of {quantize.bits} bits, rounded {ROUNDINGS[quantize.rounding]}"
    words = [f"{share} of the {name}" for name, share in prune or () if share]
    what = f"{start} without {' and '.join(words)}" if words else start
    what += ", which are zero and still read" if prune and prune.weights else ""
    further = plan.steps(variant) * plan.tokens_per_step
    return f"{what}, then {further:,} further tokens after {plan.tokens_before(variant):,}"


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
