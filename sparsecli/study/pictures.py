"""The pictures of a study: held-out loss against training tokens, and against the time of a decoded token."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sparsecli.study.result import StudyResult
from sparsecli.study.training import Trained
from sparsecli.train import run_directory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "os^Dv<>PX*"
COLORS = 20
"""Of matplotlib's map `tab20`: ten, then a lighter shade of each."""


class Point(NamedTuple):
    """Held-out loss of a variant's seeds at one evaluation."""

    tokens: int
    loss: float
    low: float
    high: float


def draw(result: StudyResult, trained: Sequence[Trained], folder: Path) -> None:
    """Write both pictures as PNG and SVG. A picture without a point is left out."""
    unit = result.unit
    curves = {each.variant.name: curve(each, f"{unit}s") for each in trained}
    if any(curves.values()):
        _save(folder / f"loss-{unit}s", lambda axes: _draw_curves(axes, curves, unit))
    if any(row.decoding and row.held_out_loss is not None for row in result.rows):
        _save(folder / "loss-time", lambda axes: _draw_times(axes, result))


def curve(trained: Trained, unit: str = "tokens") -> list[Point]:
    """Mean, lowest and highest held-out loss of the seeds that did not diverge, at the evaluations of all of them."""
    runs = [run for run, outcome in trained.runs.values() if not outcome.failure]
    seeds = [
        {
            row[unit]: row["held_out_loss"]
            for row in run_directory.read_metrics(run.folder)
            if "held_out_loss" in row
        }
        for run in runs
    ]
    common = sorted(set.intersection(*(set(losses) for losses in seeds))) if seeds else []
    points = []
    for tokens in common:
        losses = [found[tokens] for found in seeds]
        seen = trained.tokens_before + tokens
        points.append(Point(seen, statistics.fmean(losses), min(losses), max(losses)))
    return points


def _draw_curves(axes: Axes, curves: dict[str, list[Point]], unit: str) -> None:
    for index, (name, points) in enumerate(curves.items()):
        color, marker = _style(index)
        if not points:
            continue
        tokens, losses, lows, highs = zip(*points, strict=True)
        axes.plot(tokens, losses, color=color, marker=marker, markersize=4, label=name)
        axes.fill_between(tokens, lows, highs, color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel(f"training {unit}s")
    axes.set_ylabel(f"held-out loss (nats per {unit})")
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _draw_times(axes: Axes, result: StudyResult) -> None:
    """A point for each variant and weight type: the median time between its 10th and 90th percentile, and the loss
    with its standard error. A line joins the points of the frontier."""
    rows, unit = result.rows, result.unit
    if len(rows) > 2:
        times, losses, _ = zip(*result.frontier, strict=True)
        axes.plot(times, losses, color="0.6", linestyle="--", linewidth=0.8, drawstyle="steps-post")
    dtypes = list(dict.fromkeys(each.dtype for row in rows for each in row.decoding))
    for index, row in enumerate(rows):
        color, _ = _style(index)
        for each in row.decoding:
            if row.held_out_loss is None:
                continue
            marker = MARKERS[dtypes.index(each.dtype)]
            spread = [[each.ms_per_token - each.ms_p10], [each.ms_p90 - each.ms_per_token]]
            label = row.variant if each is row.decoding[0] else None
            axes.errorbar(
                each.ms_per_token,
                row.held_out_loss,
                xerr=spread,
                yerr=row.standard_error or 0,
                color=color,
                marker=marker,
                capsize=2,
                elinewidth=0.8,
                linestyle="none",
                label=label,
            )
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    if len(dtypes) > 1:
        for marker, dtype in zip(MARKERS, dtypes, strict=False):
            axes.plot([], [], color="black", marker=marker, linestyle="none", label=dtype)
    what = "decoded token" if unit == "token" else unit
    axes.set_xlabel(f"milliseconds per {what}{f', {dtypes[0]}' if len(dtypes) == 1 else ''}")
    axes.set_ylabel(f"held-out loss (nats per {unit})")


def _style(index: int) -> tuple[tuple[float, ...], str]:
    """Colour and marker of a variant."""
    from matplotlib import colormaps

    shade = index // (COLORS // 2)
    color = colormaps["tab20"](index % (COLORS // 2) * 2 + shade % 2)
    return color, MARKERS[shade % len(MARKERS)]


def _save(path: Path, fill: Callable[[Axes], None]) -> None:
    """Draw a figure, and write it to `path` with the endings of both formats, the same bytes every time."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "sparsecli"}):
        figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
        axes = figure.subplots()
        fill(axes)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize="small")
        for format, metadata in (("png", {}), ("svg", {"Date": None})):
            place = path.with_suffix(f".{format}")
            beside = place.with_name(f"{place.name}.tmp")
            figure.savefig(beside, format=format, metadata=metadata)
            beside.replace(place)
