"""Rendering of a result: tables for people, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.table import Table

from sparsecli.bench import figures
from sparsecli.bench.result import BenchResult, Change, Row

# -- figures as text -----------------------------------------------------------------------------------------


def milliseconds(value: float) -> str:
    """About three significant digits: 126, 19.4, 3.62, 0.065."""
    decimals = next((index for index, limit in enumerate((100, 10, 1)) if value >= limit), 3)
    return f"{value:.{decimals}f}"


def per_second(value: float) -> str:
    """Tokens or images a second: 51.3, 1.2, 0.28."""
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def count(value: int) -> str:
    """A number of parameters with a unit: 819M, 16.9B, 12.3k."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}" if value < 999.5 * limit else f"{value / limit:.0f}{unit}"
    return str(value)


def megabytes(value: int) -> str:
    """Bytes as MB."""
    return f"{value / 1e6:.0f}" if value >= 1e7 else f"{value / 1e6:.2g}"


@dataclass(frozen=True)
class ResultColumn:
    """A column: two-line title, cells, and its rank. Columns of the highest rank are left out first; 0 always stays."""

    title: str
    cell: Callable[[Row], str | None]
    drop_rank: int = 0
    left: bool = False

    @property
    def name(self) -> str:
        """The title on one line."""
        return " ".join(self.title.replace("-\n", "").split())


COLUMNS = (
    ResultColumn("variant\n", lambda row: row.variant + (" *" if row.projected else ""), left=True),
    ResultColumn("backend\n", lambda row: row.backend, left=True),
    ResultColumn("weights\n", lambda row: row.weights, left=True),
    ResultColumn("threads\n", lambda row: str(row.threads)),
    ResultColumn("context\n", lambda row: str(row.context)),
    ResultColumn("batch\n", lambda row: str(row.batch)),
    ResultColumn("prompt\n", lambda row: str(row.prefill) if row.prefill else None),
    ResultColumn("para-\nmeters", lambda row: count(row.parameters), drop_rank=3),
    ResultColumn("active /\ntoken", lambda row: count(row.active_parameters), drop_rank=4),
    ResultColumn(
        "bits /\nweight",
        lambda row: f"{row.bits_per_weight:.2f}" if row.bits_per_weight is not None else None,
    ),
    ResultColumn("MB /\ntoken", lambda row: megabytes(row.bytes_per_token)),
    ResultColumn("ms /\ntoken", lambda row: milliseconds(row.ms_per_token.p50)),
    ResultColumn(
        "\np10..p90",
        lambda row: f"{milliseconds(row.ms_per_token.p10)}..{milliseconds(row.ms_per_token.p90)}",
        drop_rank=5,
    ),
    ResultColumn(
        "ms /\nblock",
        lambda row: milliseconds(row.ms_per_block.p50) if row.ms_per_block else None,
        drop_rank=2,
    ),
    ResultColumn(
        "disk MB\n/ token",
        lambda row: megabytes(row.disk_bytes_per_token) if row.disk_bytes_per_token is not None else None,
    ),
    ResultColumn("disk\nMB / s", lambda row: f"{row.disk_mb_s:.0f}" if row.disk_mb_s is not None else None),
    ResultColumn("tokens\n/ s", lambda row: per_second(row.tokens_per_second)),
    ResultColumn("speed-\nup", lambda row: _speedup(row)),
    ResultColumn("over\n--over", lambda row: f"{row.speedup_over:.2f}x" if row.speedup_over else None),
    ResultColumn(
        "over best\ndense peer",
        lambda row: f"{row.speedup_over_peer:.2f}x" if row.speedup_over_peer else None,
    ),
    ResultColumn(
        "of memory\nlimit",
        lambda row: f"{row.bandwidth_fraction:.0%}" if row.bandwidth_fraction is not None else None,
    ),
    ResultColumn(
        "held-out\nloss", lambda row: f"{row.held_out_loss:.3f}" if row.held_out_loss is not None else None
    ),
    ResultColumn(
        "paper\nms", lambda row: milliseconds(row.paper.ms_per_token) if row.paper else None, drop_rank=6
    ),
    ResultColumn(
        "paper\nspeed-up", lambda row: f"{row.paper_speedup:.2f}x" if row.paper_speedup else None, drop_rank=1
    ),
    ResultColumn(
        "held-out\naccuracy",
        lambda row: f"{row.held_out_accuracy:.2%}" if row.held_out_accuracy is not None else None,
    ),
)


OF_IMAGES = {
    "active /\ntoken": "active /\npatch",
    "MB /\ntoken": "MB /\nimage",
    "ms /\ntoken": "ms /\nimage",
    "tokens\n/ s": "images\n/ s",
}
"""Titles of columns where models of images are measured."""
NAMING = 7  # columns that identify the row
SAID_BELOW = ("backend\n", "threads\n", "context\n", "batch\n")
"""Columns that are left out if all their cells are equal: the caption gives the value once."""


def _speedup(row: Row) -> str | None:
    if row.speedup is None:
        return None
    return f"{'~' if row.baseline_bandwidth_fraction else ''}{row.speedup:.2f}x"


def filled(result: BenchResult) -> list[tuple[ResultColumn, list[str]]]:
    """The columns that have figures. A missing figure is a dash."""
    columns = []
    images = result.settings.unit == "image"
    for column in COLUMNS:
        if images and column.title == "context\n":
            continue
        column = replace(column, title=OF_IMAGES.get(column.title, column.title)) if images else column
        cells = [column.cell(row) for row in result.rows]
        if column.title in SAID_BELOW and len(set(cells)) == 1:
            continue
        if any(cell is not None for cell in cells):
            columns.append((column, [cell if cell is not None else "-" for cell in cells]))
    return columns


def _width(columns: Sequence[tuple[ResultColumn, list[str]]]) -> int:
    lines = [[*column.title.split("\n"), *cells] for column, cells in columns]
    return sum(max(map(cell_len, texts)) + 2 for texts in lines) + 1


def table(result: BenchResult, width: int) -> Table:
    """The rows as a table of at most `width` characters. The least important columns are left out to fit."""
    columns, left_out = filled(result), []
    while _width(columns) > width:
        dispensable = [column for column, _ in columns if column.drop_rank]
        if not dispensable:
            break
        dropped = max(dispensable, key=lambda column: column.drop_rank)
        columns = [column for column in columns if column[0] is not dropped]
        left_out.append(dropped.name)
    below = caption(result)
    if left_out:
        below += f" Left out to fit {width} characters: {', '.join(left_out)}; --format csv has all columns."
    shown = Table(box=box.SIMPLE_HEAD, caption=below, caption_justify="left", padding=(0, 1, 0, 0))
    for column, _ in columns:
        shown.add_column(column.title, justify="left" if column.left else "right", no_wrap=not column.left)
    groups = [(row.backend, row.dtype, *row.key[3:]) for row in result.rows]
    sets_apart = max(map(groups.count, groups)) > 1
    for index, cells in enumerate(zip(*(cells for _, cells in columns), strict=True)):
        last_of_group = index + 1 < len(groups) and groups[index + 1] != groups[index]
        shown.add_row(*cells, end_section=sets_apart and last_of_group)
    return shown


def caption(result: BenchResult) -> str:
    """The caption: the machine and the settings of the measurement, in sentences."""
    machine, settings = result.machine, result.settings
    threads, contexts, batches = (
        sorted({getattr(row, name) for row in result.rows}) for name in ("threads", "context", "batch")
    )
    backends = ", ".join(sorted({row.backend for row in result.rows}))
    text = f"{machine.cpu}, {machine.isa}, "
    if len(threads) == 1:
        text += f"{threads[0]} thread{'s' if threads[0] > 1 else ''}, "
    text += (
        f"backend {backends}; memory reads {machine.bandwidth_gb_s.before:.1f} GB/s before, "
        f"{machine.bandwidth_gb_s.after:.1f} after, {machine.bandwidth_gb_s.best:.1f} at best; "
    )
    if len(contexts) == 1 and settings.unit == "token":
        text += f"context {contexts[0]}, "
    if settings.source is not None:
        text += f"source of {settings.source} tokens, "
    if len(batches) == 1 and batches != [1]:
        text += f"batch {batches[0]}, "
    steps = "tokens" if settings.unit == "token" else "batches"
    text += f"median of {settings.rounds} x {settings.tokens_per_round} {steps}."
    if result.peak_memory_gb is not None:
        text += f" Peak memory {result.peak_memory_gb:.1f} GB."
    if machine.disk:
        text += (
            f" Units are read from disk{'' if figures.warm(result.rows) else ', cold'}; "
            f"it reads {machine.disk.sequential_mb_s:.0f} MB/s, "
            f"{machine.disk.random_mb_s:.0f} in random pieces of {machine.disk.random_kb} KiB."
        )
    if any(row.batch > 1 for row in result.rows):
        text += (
            f" Times of a batch are divided by its {'sequences' if settings.unit == 'token' else 'images'}."
        )
    if result.over:
        text += f" --over: speed-up over the first dense or peer row of {result.over}, at the same sizes."
    if weak := figures.warnings(result.rows):
        text += "".join(f" ~ {line}." for line in weak)
    if any(row.projected for row in result.rows):
        text += " * projected: only some blocks were measured, and their time scaled to the whole model."
    for backend, used in {row.backend: row.peer_settings for row in result.rows if row.peer_settings}.items():
        text += f" {backend}: {used}."
    return text


LEAST_SHARE = 0.005


def parts_table(result: BenchResult) -> Table | None:
    """A token's time by part, the largest first; None if it was not measured.

    Parts of less than half a per cent are only in the JSON.
    """
    timed = [row for row in result.rows if row.parts]
    if not timed:
        return None
    sized = [column for column in COLUMNS[:NAMING] if column.left or _varies(column, timed)]
    shown = Table(box=box.SIMPLE_HEAD, title="parts of a token", title_justify="left", padding=(0, 1, 0, 0))
    for title in (*(column.title.strip() for column in sized), "part"):
        shown.add_column(title)
    for title in ("ms", "share"):
        shown.add_column(title, justify="right", no_wrap=True)
    for row in timed:
        parts = sorted((row.parts or {}).items(), key=lambda part: -part[1])
        total = sum(value for _, value in parts)
        lines = [
            (name, milliseconds(value), f"{value / total:.0%}")
            for name, value in parts
            if value >= LEAST_SHARE * total
        ]
        if row.ms_feed_forward is not None:
            lines.append(("one feed-forward layer", milliseconds(row.ms_feed_forward), ""))
        naming = [column.cell(row) or "-" for column in sized]
        for index, line in enumerate(lines):
            shown.add_row(
                *(naming if index == 0 else [""] * len(naming)), *line, end_section=index + 1 == len(lines)
            )
    return shown


def _varies(column: ResultColumn, rows: Sequence[Row]) -> bool:
    return len({column.cell(row) for row in rows}) > 1


CHANGE_COLUMNS = (
    *("variant", "backend", "weights", "sizes"),
    *("before ms", "now ms", "now / before", "95 % interval", "verdict"),
)


def change_cells(changes: Sequence[Change]) -> list[tuple[str, ...]]:
    """The cells of a comparison, a row for each change."""
    return [
        (
            change.variant,
            change.backend,
            change.dtype,
            change.key.sizes,
            milliseconds(change.before_ms),
            milliseconds(change.now_ms),
            f"{change.ratio:.3f}",
            f"{change.ratio_low:.3f}..{change.ratio_high:.3f}",
            change.verdict,
        )
        for change in changes
    ]


def changes_table(changes: Sequence[Change]) -> Table:
    """The comparison with an earlier result."""
    shown = Table(
        box=box.SIMPLE_HEAD, title="against the earlier result", title_justify="left", padding=(0, 1, 0, 0)
    )
    for index, title in enumerate(CHANGE_COLUMNS):
        shown.add_column(title, justify="left" if index < 4 else "right", no_wrap=index >= 4)
    for cells in change_cells(changes):
        shown.add_row(*cells)
    return shown


# -- text formats --------------------------------------------------------------------------------------------


def as_json(result: BenchResult) -> str:
    """The complete result with samples."""
    return result.model_dump_json(by_alias=True, indent=2)


def as_csv(result: BenchResult) -> str:
    """One line per row. Nested figures have names such as `ms_per_token_p50`; an empty cell is null. Samples are only
    in JSON."""
    lines = []
    for row in result.rows:
        line = row.model_dump(mode="json", exclude={"ms_per_token": {"samples"}})
        for name in ("paper", "precision", "parts"):
            if line[name] is None:
                del line[name]  # an object in other rows: its columns stay empty
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


def as_markdown(result: BenchResult) -> str:
    """All columns as a Markdown table, the caption below it."""
    columns = filled(result)
    titles = [column.name for column, _ in columns]
    rules = ["---" if column.left else "---:" for column, _ in columns]
    rows = [
        [cell.replace("|", "\\|") for cell in cells] for cells in zip(*(c for _, c in columns), strict=True)
    ]
    lines = ["| " + " | ".join(line) + " |" for line in (titles, rules, *rows)]
    return "\n".join([*lines, "", caption(result)])
