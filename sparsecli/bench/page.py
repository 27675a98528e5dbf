"""A result of `bench` as a page and as a figure: times, shares of the memory limit, parts of a token, the frontier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecli.bench import render
from sparsecli.bench.result import BenchResult, Row, RowKey
from sparsecli.report import figure, files
from sparsecli.report.page import Bar, Bars, Page, Plot, Point, Stack, Stacks, Table, groups_of
from sparsecli.report.page import render as render_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PARTS = 8
"""Parts of a token that have their own colour; the others are one part."""
OTHERS = "others"


def write_html(result: BenchResult, path: Path) -> None:
    """Write the page. Raises `Failure` if that fails."""
    files.write_text(path, render_page(page_of(result)))


def write_figure(result: BenchResult, path: Path) -> None:
    """Write the figure. Raises `Failure` if that fails."""
    times, parts, losses = time_bars(result), part_stacks(result), loss_plot(result)
    heights = [figure.height(times.bars)]
    if parts:
        heights.append(figure.height(parts.stacks))
    if losses:
        heights.append(2.8)
    groups = groups_of(page_of(result))
    with figure.style():
        drawn, axes = figure.panels(heights)
        panel = iter(axes)
        first = next(panel)
        places = figure.draw_bars(first, times.bars, lambda bar: figure.COLORS[groups.index(bar.group)])
        figure.name_colors(first, groups)
        limits = "; red mark: the memory's limit" if _mark_limits(first, places, result) else ""
        first.set_xlabel(f"milliseconds per token (black line: 10th to 90th percentile{limits})")
        if parts:
            second = next(panel)
            figure.draw_stacks(second, parts.stacks, parts.names)
            second.set_xlabel("share of a token's time (%)")
        if losses:
            figure.draw_plot(next(panel), losses, groups)
        figure.save(drawn, path)


def _mark_limits(axes: Axes, places: Sequence[float], result: BenchResult) -> bool:
    """Mark the least time in which memory delivers a row's bytes. Returns whether there was any."""
    limits = [_limit_ms(row, result) for row in result.rows]
    for place, limit in zip(places, limits, strict=True):
        if limit is not None:
            axes.plot([limit, limit], [place - 0.4, place + 0.4], color=figure.COLORS[4], linewidth=1.2)
    return any(limit is not None for limit in limits)


# -- sections ------------------------------------------------------------------------------------------------


def page_of(result: BenchResult) -> Page:
    """Everything that the page shows."""
    machine, settings = result.machine, result.settings
    bandwidth = machine.bandwidth_gb_s
    caption = render.caption(result)
    facts = [
        ("processor", f"{machine.cpu}, {machine.isa}"),
        ("threads", str(machine.threads)),
        ("memory", f"{machine.memory_gb:.1f} GB"),
        (
            "memory reads",
            f"{bandwidth.best:.1f} GB/s at best, {bandwidth.before:.1f} before, {bandwidth.after:.1f} after",
        ),
        ("median of", f"{settings.rounds} rounds of {settings.tokens_per_round} tokens"),
        ("software", ", ".join(f"{name} {number}" for name, number in result.versions.items())),
    ]
    columns = render.filled(result)
    rows = list(zip(*(cells for _, cells in columns), strict=True))
    sections: list[Table | Bars | Stacks | Plot | None] = [
        time_bars(result),
        loss_plot(result),
        share_bars(result),
        part_stacks(result),
        Table("All figures", [column.name for column, _ in columns], rows),
        _comparison(result),
    ]
    return Page(
        "Time per decoded token",
        _summary(result),
        facts,
        result.command,
        [section for section in sections if section],
        [caption],
    )


def _summary(result: BenchResult) -> str:
    fastest = min(result.rows, key=lambda row: row.ms_per_token.p50)
    text = f"{_name(fastest, result.rows)}: {render.milliseconds(fastest.ms_per_token.p50)} ms a token"
    if len(result.rows) > 1:
        text = f"{len(result.rows)} measurements, interleaved in rounds. The fastest is {text}"
    if fastest.speedup is not None and fastest.group != "dense":
        text += f", {_speedup(fastest)} the speed of the dense model in the same weight type"
    return text + "."


def _speedup(row: Row) -> str:
    return f"{'~' if row.baseline_bandwidth_fraction else ''}{row.speedup:.2f}x"


def time_bars(result: BenchResult) -> Bars:
    """Median time of every row, with its 10th and 90th percentile."""
    bars = []
    for row in result.rows:
        times, text = row.ms_per_token, f"{render.milliseconds(row.ms_per_token.p50)} ms"
        if row.speedup is not None and row.group != "dense":
            text += f" · {_speedup(row)}"
        name, heading = _names(row, result.rows)
        bars.append(Bar(name, times.p50, text, row.group, heading, times.p10, times.p90))
    note = (
        "Medians; the thin line reaches from the 10th to the 90th percentile. The factor is the speed-up over the "
        "dense row of the same weight type and size."
    )
    return Bars("Milliseconds per token", bars, note)


def share_bars(result: BenchResult) -> Bars | None:
    """The share of the memory's limit that each row reaches; None if no row is limited by memory."""
    bars = []
    for row in result.rows:
        if row.bandwidth_fraction is not None:
            name, heading = _names(row, result.rows)
            text = f"{row.bandwidth_fraction:.0%} · {render.megabytes(row.bytes_per_token)} MB"
            bars.append(Bar(name, row.bandwidth_fraction, text, row.group, heading))
    note = (
        "The bytes that a token reads, divided by its time, as a share of the "
        f"{result.machine.bandwidth_gb_s.best:.1f} GB/s that this machine's memory reads (dashed line). More than "
        "100 % means that the bytes are in the processor's cache."
    )
    return Bars("Share of the memory bandwidth", bars, note, limit=1.0) if bars else None


def part_stacks(result: BenchResult) -> Stacks | None:
    """Where a token's time goes; None if it was not measured."""
    timed = [row for row in result.rows if row.parts]
    if not timed:
        return None
    sums: dict[str, float] = {}
    for row in timed:
        for name, share in Stack("", row.parts or {}, "").shares.items():
            sums[name] = sums.get(name, 0.0) + share
    sums.pop("rest", None)
    named = sorted(sums, key=lambda name: -sums[name])[:MOST_PARTS]
    stacks = []
    for row in timed:
        parts = row.parts or {}
        shown = {name: parts[name] for name in named if name in parts}
        if (others := sum(parts.values()) - sum(shown.values())) > 0:
            shown[OTHERS] = others
        name, heading = _names(row, result.rows)
        stacks.append(Stack(name, shown, f"{render.milliseconds(sum(parts.values()))} ms", heading))
    note = "Shares of the mean time of a decode step, which stands at the end. A tooltip gives the time of a part."
    return Stacks("Where a token's time goes", stacks, [*named, OTHERS], note)


def loss_plot(result: BenchResult) -> Plot | None:
    """Held-out loss against time; None without trained models."""
    points = [
        Point(
            _name(row, result.rows),
            row.ms_per_token.p50,
            row.held_out_loss,
            f"{render.milliseconds(row.ms_per_token.p50)} ms, loss {row.held_out_loss:.3f}",
            row.group,
        )
        for row in result.rows
        if row.held_out_loss is not None and row.prefill is None
    ]
    note = "Lower and further left is better. The line connects the models that no other beats in both."
    labels = "milliseconds per token", "held-out loss (nats per token)"
    return Plot("Loss against time", points, *labels, note) if points else None


def _comparison(result: BenchResult) -> Table | None:
    if not result.comparison:
        return None
    rows = render.change_cells(result.comparison)
    return Table("Against the earlier result", render.CHANGE_COLUMNS, rows)


def _name(row: Row, rows: Sequence[Row]) -> str:
    """The row's variant, and what else tells it from other rows."""
    name, heading = _names(row, rows)
    return f"{name}, {heading}" if heading else name


def _names(row: Row, rows: Sequence[Row]) -> tuple[str, str]:
    """The row's variant; and its backend, weight type and sizes, as far as they differ between the rows."""
    differ = {name for name in RowKey._fields if len({getattr(each, name) for each in rows}) > 1}
    words = [str(getattr(row, name)) for name in ("backend", "dtype") if name in differ]
    if row.prefill:
        words.append(f"prompt of {row.prefill}")
    elif "prefill" in differ:
        words.append("decoding")
    words += [f"{row.threads} thread{'s' * (row.threads > 1)}"] * ("threads" in differ)
    words += [f"{name} {getattr(row, name)}" for name in ("context", "batch") if name in differ]
    return row.variant + ("\N{NO-BREAK SPACE}*" if row.projected else ""), ", ".join(words)


def _limit_ms(row: Row, result: BenchResult) -> float | None:
    """Milliseconds in which memory delivers the row's bytes; None where other things limit it."""
    if row.bandwidth_fraction is None:
        return None
    return row.bytes_per_token / (result.machine.bandwidth_gb_s.best * 1e9) * 1e3
