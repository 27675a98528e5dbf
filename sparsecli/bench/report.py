"""The result of a bench: one record, shown as a table, JSON, CSV or Markdown.

The pydantic models below are the JSON format; `compare` reads earlier results through them too.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich import box
from rich.cells import cell_len
from rich.table import Table

from sparsecli.recipe.schema import PaperFigures


class _Record(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True
    )


class Bandwidth(_Record):
    """Sequential read bandwidth of all threads together, probed around the measurement."""

    before: Annotated[float, Field(gt=0)]
    """GB/s before the first round."""
    after: Annotated[float, Field(gt=0)]
    """GB/s after the last round."""

    @property
    def mean(self) -> float:
        """GB/s that the memory limit is computed with."""
        return (self.before + self.after) / 2


class Processor(_Record):
    """What computes, as far as it is known before measuring."""

    cpu: str
    """Model name of the processor."""
    isa: str
    """Widest vector instructions in use."""
    threads: int
    """Threads of one decode step."""


class Machine(Processor):
    """What the figures depend on."""

    bandwidth_gb_s: Bandwidth
    """Memory bandwidth."""
    memory_gb: float
    """Main memory."""


class Settings(_Record):
    """How the rows were measured."""

    context: int
    """Tokens in the cache at the start of every turn."""
    rounds: int
    """Turns of every row."""
    tokens_per_round: int
    """Measured tokens of a turn; samples are in order, turn after turn."""
    warmup_tokens: int
    """Unmeasured tokens before them."""


class Spread(_Record):
    """Percentiles in milliseconds."""

    p10: float
    """Nine in ten were slower."""
    p50: Annotated[float, Field(gt=0)]
    """The median."""
    p90: float
    """Nine in ten were faster."""


class Times(Spread):
    """Percentiles and every measured token, in milliseconds."""

    samples: list[float]
    """In order, turn after turn."""


class Subject(_Record):
    """One variant on one backend in one weight type: all of a row that is known before measuring."""

    variant: str
    """The variant's name in the recipe, or the name of the trained run."""
    group: Literal["dense", "sparse", "peer"]
    """What it is compared as; `peer` is reserved for another program's figures."""
    backend: str
    """Who computed it."""
    dtype: str
    """Weight type."""
    parameters: int
    """All parameters."""
    active_parameters: int
    """Parameters that one token uses."""
    bytes_per_token: int
    """Bytes of weights and of key-value cache that one token reads."""
    projected: bool = False
    """Only some of the blocks are built; their time is multiplied out."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes a row the same row in another result."""
        return self.variant, self.backend, self.dtype


class Row(Subject):
    """A subject and its figures. A figure that was not measured is null."""

    ms_per_token: Times
    """Milliseconds a token: embedding, blocks, logits and the choice of the next token."""
    ms_per_block: Spread | None
    """Milliseconds a block: the time of the block stack over the number of blocks."""
    tokens_per_second: float
    """At the median."""
    speedup: float | None
    """Median of the dense row of the same backend and dtype over this median."""
    bandwidth_fraction: float | None
    """Share of the memory limit reached."""
    held_out_nats: float | None
    """Held-out loss of a trained run, in nats a token."""
    paper: PaperFigures | None = None
    """The paper's figures for this row."""
    paper_speedup: float | None = None
    """The paper's speed-up of this row."""


class Change(_Record):
    """One row against the same row of an earlier result."""

    variant: str
    backend: str
    dtype: str
    before_ms: float
    """Earlier median."""
    now_ms: float
    """This median."""
    ratio: float
    """now / before; above 1 is slower."""
    ratio_low: float
    """Lower end of the ratio's 95 % interval."""
    ratio_high: float
    """Upper end of the ratio's 95 % interval."""
    verdict: Literal["slower", "faster", "same"]
    """`slower` and `faster` only beyond the threshold and beyond the noise."""


class Result(_Record):
    """A whole bench."""

    version: Literal[1] = Field(default=1, alias="schema")
    """Version of this format."""
    command: str
    """The command line that made it."""
    recipe: dict[str, Any] | None
    """The recipe as it was run, the command line's options included; null for trained runs (`--model`)."""
    settings: Settings
    """How the rows were measured."""
    versions: dict[str, str]
    """Versions of the software."""
    machine: Machine
    """What the figures depend on."""
    rows: list[Row]
    """The figures."""
    comparison: list[Change] | None = None
    """Against an earlier result (`--against`)."""

    @model_validator(mode="after")
    def _check(self) -> Result:
        expected = self.settings.rounds * self.settings.tokens_per_round
        for row in self.rows:
            if len(row.ms_per_token.samples) != expected:
                raise ValueError(f"{row.variant} has {len(row.ms_per_token.samples)} samples, not {expected}")
        return self


# -- figures as text -----------------------------------------------------------------------------------------


def milliseconds(value: float) -> str:
    """Three significant digits or so: 126, 19.4, 3.62, 0.065."""
    decimals = next((index for index, limit in enumerate((100, 10, 1)) if value >= limit), 3)
    return f"{value:.{decimals}f}"


def count(value: int) -> str:
    """A number of parameters as people say it: 819M, 16.9B, 12.3k."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}" if value < 999.5 * limit else f"{value / limit:.0f}{unit}"
    return str(value)


def megabytes(value: int) -> str:
    """Bytes as MB."""
    return f"{value / 1e6:.0f}" if value >= 1e7 else f"{value / 1e6:.2g}"


@dataclass(frozen=True)
class Column:
    """A column: two-line title, cells, and rank in being left out (the highest goes first; 0 stays)."""

    title: str
    cell: Callable[[Row], str | None]
    sacrifice: int = 0
    left: bool = False


COLUMNS = (
    Column("variant\n", lambda row: row.variant + (" *" if row.projected else ""), left=True),
    Column("backend\n", lambda row: row.backend, left=True),
    Column("weights\n", lambda row: row.dtype, left=True),
    Column("para-\nmeters", lambda row: count(row.parameters), sacrifice=3),
    Column("active /\ntoken", lambda row: count(row.active_parameters), sacrifice=4),
    Column("MB /\ntoken", lambda row: megabytes(row.bytes_per_token)),
    Column("ms /\ntoken", lambda row: milliseconds(row.ms_per_token.p50)),
    Column(
        "\np10..p90",
        lambda row: f"{milliseconds(row.ms_per_token.p10)}..{milliseconds(row.ms_per_token.p90)}",
        sacrifice=5,
    ),
    Column("ms /\nblock", lambda row: milliseconds(row.ms_per_block.p50) if row.ms_per_block else None),
    Column("tokens\n/ s", lambda row: f"{row.tokens_per_second:.1f}", sacrifice=2),
    Column("speed-\nup", lambda row: f"{row.speedup:.2f}x" if row.speedup else None),
    Column(
        "of memory\nlimit",
        lambda row: f"{row.bandwidth_fraction:.0%}" if row.bandwidth_fraction is not None else None,
    ),
    Column(
        "held-out\nnats", lambda row: f"{row.held_out_nats:.3f}" if row.held_out_nats is not None else None
    ),
    Column("paper\nms", lambda row: milliseconds(row.paper.ms_per_token) if row.paper else None, sacrifice=6),
    Column(
        "paper\nspeed-up", lambda row: f"{row.paper_speedup:.2f}x" if row.paper_speedup else None, sacrifice=1
    ),
)


def _filled(result: Result) -> list[tuple[Column, list[str]]]:
    """The columns that say something, with their cells; a missing figure is a dash."""
    columns = []
    for column in COLUMNS:
        cells = [column.cell(row) for row in result.rows]
        if column.title == "backend\n" and len(set(cells)) == 1:
            continue  # the caption says it once
        if any(cell is not None for cell in cells):
            columns.append((column, [cell if cell is not None else "-" for cell in cells]))
    return columns


def _width(columns: Sequence[tuple[Column, list[str]]]) -> int:
    lines = [[*column.title.split("\n"), *cells] for column, cells in columns]
    return sum(max(map(cell_len, texts)) + 2 for texts in lines) + 1


def table(result: Result, width: int) -> Table:
    """The rows as a table that fits `width` cells: columns that matter less are left out until it does."""
    columns = _filled(result)
    while _width(columns) > width:
        dispensable = [column for column, _ in columns if column.sacrifice]
        if not dispensable:
            break
        victim = max(dispensable, key=lambda column: column.sacrifice)
        columns = [entry for entry in columns if entry[0] is not victim]
    shown = Table(box=box.SIMPLE_HEAD, caption=caption(result), caption_justify="left", padding=(0, 1, 0, 0))
    for column, _ in columns:
        shown.add_column(column.title, justify="left" if column.left else "right", no_wrap=not column.left)
    groups = [(row.backend, row.dtype) for row in result.rows]
    for index, cells in enumerate(zip(*(cells for _, cells in columns), strict=True)):
        last_of_group = index + 1 < len(groups) and groups[index + 1] != groups[index]
        shown.add_row(*cells, end_section=last_of_group)
    return shown


def caption(result: Result) -> str:
    """What the figures were measured with, in plain sentences."""
    machine, settings = result.machine, result.settings
    threads = f"{machine.threads} thread{'s' if machine.threads > 1 else ''}"
    backends = ", ".join(sorted({row.backend for row in result.rows}))
    text = (
        f"{machine.cpu}, {machine.isa}, {threads}, backend {backends}; memory reads "
        f"{machine.bandwidth_gb_s.before:.1f} GB/s before, {machine.bandwidth_gb_s.after:.1f} after; "
        f"context {settings.context}, median of {settings.rounds} x {settings.tokens_per_round} tokens."
    )
    if any(row.projected for row in result.rows):
        text += " * projected: some blocks were measured and their time multiplied out."
    return text


def changes_table(changes: Sequence[Change]) -> Table:
    """The comparison with an earlier result."""
    shown = Table(
        box=box.SIMPLE_HEAD, title="against the earlier result", title_justify="left", padding=(0, 1, 0, 0)
    )
    for title in ("variant", "backend", "weights"):
        shown.add_column(title)
    for title in ("before ms", "now ms", "now / before", "95 % interval", "verdict"):
        shown.add_column(title, justify="right", no_wrap=True)
    for change in changes:
        shown.add_row(
            change.variant,
            change.backend,
            change.dtype,
            milliseconds(change.before_ms),
            milliseconds(change.now_ms),
            f"{change.ratio:.3f}",
            f"{change.ratio_low:.3f}..{change.ratio_high:.3f}",
            change.verdict,
        )
    return shown


# -- text formats --------------------------------------------------------------------------------------------


def as_json(result: Result) -> str:
    """The whole record, samples included."""
    return result.model_dump_json(by_alias=True, indent=2)


def as_csv(result: Result) -> str:
    """One line a row; nested figures as `ms_per_token_p50`; samples only in JSON; an empty cell is null."""
    lines = []
    for row in result.rows:
        line = row.model_dump(mode="json", exclude={"ms_per_token": {"samples"}})
        if row.paper is None:
            del line["paper"]  # an object elsewhere: its columns stay empty
        lines.append(_flat(line))
    text = io.StringIO()
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().rstrip("\n")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}_")
        else:
            flat[prefix + name] = value
    return flat


def as_markdown(result: Result) -> str:
    """All columns as a Markdown table, the caption below it."""
    columns = _filled(result)
    titles = [" ".join(column.title.replace("-\n", "").split()) for column, _ in columns]
    rules = ["---" if column.left else "---:" for column, _ in columns]
    rows = [
        [cell.replace("|", "\\|") for cell in cells] for cells in zip(*(c for _, c in columns), strict=True)
    ]
    lines = ["| " + " | ".join(line) + " |" for line in (titles, rules, *rows)]
    return "\n".join([*lines, "", caption(result)])
