"""Figures for a paper: one style, readable in print and without colours, the same bytes for the same result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecli.report import files
from sparsecli.report.page import Bar, Plot, Stack

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 6.75
"""Inches: the text of a page with one column, or both columns of one with two."""
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # fonts that journals accept
    "svg.hashsalt": "sparsecli",
}
COLORS = ("#5b6b80", "#0b7a75", "#7a4fb5", "#b3621b", "#a83a63")
PART_COLORS = (*("#0b7a75", "#5b6b80", "#d08a2c", "#7a4fb5", "#4a90c2"), "#a83a63", "#7d9b3c", "#8a6d5a")
REST_COLOR = "#c9ced6"
MARKERS = "os^Dv"
MOST_NAMES = 3
"""Points of a plot whose names stand beside them; more are numbered."""
METADATA: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


@contextmanager
def style() -> Iterator[None]:
    """Draw in the style of a paper while open."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def save(figure: Figure, path: Path) -> None:
    """Write a figure, in the format of the ending. Raises `Failure` if the file cannot be written."""
    format = path.suffix[1:]
    files.write(path, lambda beside: figure.savefig(beside, format=format, metadata=METADATA[format]))


def panels(heights: Sequence[float]) -> tuple[Figure, Sequence[Axes]]:
    """A figure with panels of these heights in inches, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    return figure, list(axes)


def height(rows: Sequence[Bar] | Sequence[Stack]) -> float:
    """Inches of a panel with these bars."""
    return 0.65 + 0.17 * (len(rows) + len({row.heading for row in rows if row.heading}))


def draw_bars(axes: Axes, bars: Sequence[Bar], color: Callable[[Bar], str]) -> list[float]:
    """Horizontal bars, the first at the top, with their intervals and texts. Returns their places."""
    places = _name_rows(axes, bars)
    axes.barh(places, [bar.value for bar in bars], color=[color(bar) for bar in bars], height=0.7)
    for place, bar in zip(places, bars, strict=True):
        end = bar.value
        if bar.low is not None and bar.high is not None:
            axes.plot([bar.low, bar.high], [place, place], color="black", linewidth=0.9)
            end = max(end, bar.high)
        axes.annotate(
            bar.text, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7
        )
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    return places


def name_colors(axes: Axes, groups: Sequence[str]) -> None:
    """A legend of the groups' colours, beside the panel; none for a single group."""
    from matplotlib.patches import Patch

    if len(groups) > 1:
        handles = [Patch(color=color, label=group) for group, color in zip(groups, COLORS, strict=False)]
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)


def draw_stacks(axes: Axes, stacks: Sequence[Stack], names: Sequence[str]) -> None:
    """Horizontal bars of shares, the first at the top, with a legend and the texts at their ends."""
    places = _name_rows(axes, stacks)
    left = [0.0] * len(stacks)
    for index, name in enumerate(names):
        values = [100 * stack.shares.get(name, 0.0) for stack in stacks]
        color = PART_COLORS[index] if index < len(PART_COLORS) else REST_COLOR
        axes.barh(places, values, left=left, color=color, height=0.7, label=name)
        left = [start + value for start, value in zip(left, values, strict=True)]
    for place, stack in zip(places, stacks, strict=True):
        axes.annotate(
            stack.text, (100, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7
        )
    axes.set_xlim(0, 100)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), borderaxespad=6, fontsize=7)  # behind the texts


def _name_rows(axes: Axes, rows: Sequence[Bar] | Sequence[Stack]) -> list[float]:
    """Label the rows from the top, each heading in a row of its own. Returns the places of the rows."""
    labels: list[tuple[str, bool]] = []
    places = []
    heading = ""
    for row in rows:
        if row.heading and row.heading != heading:
            labels.append((row.heading, True))
        heading = row.heading
        places.append(float(len(labels)))
        labels.append((row.name, False))
    axes.set_yticks(range(len(labels)), [text for text, _ in labels])
    for label, (_, bold) in zip(axes.get_yticklabels(), labels, strict=True):
        label.set_fontweight("bold" if bold else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="x")
    return places


def draw_plot(axes: Axes, plot: Plot, groups: Sequence[str]) -> None:
    """Points with their names, their errors, and the frontier as a line of steps."""
    numbered = len(plot.points) > MOST_NAMES
    for number, point in enumerate(plot.points, start=1):
        index = groups.index(point.group) if point.group in groups else 0
        axes.errorbar(
            point.x,
            point.y,
            yerr=point.error or None,
            fmt=MARKERS[index % len(MARKERS)],
            color=COLORS[index % len(COLORS)],
            markersize=9 if numbered else 5,
            capsize=2,
            elinewidth=0.8,
            label=f"{number}  {point.name}",
        )
        words: dict[str, Any] = {"text": point.name, "xytext": (5, 4), "fontsize": 7}
        if numbered:
            words = {"text": str(number), "xytext": (0, -0.5), "fontsize": 6, "color": "white"}
            words |= {"ha": "center", "va": "center"}
        axes.annotate(xy=(point.x, point.y), textcoords="offset points", **words)
    if numbered:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, markerscale=0.7)
    if plot.logarithmic:
        axes.set_xscale("log")
        axes.set_xticks(plot.x_ticks, [f"{tick:g}" for tick in plot.x_ticks])
        axes.minorticks_off()
    room = 1.0 if numbered else 1.15  # for the names
    axes.set_xlim(plot.x_ticks[0], plot.x_ticks[-1] * room)
    axes.margins(y=0.12)
    best = plot.frontier
    axes.step(
        [*(point.x for point in best), axes.get_xlim()[1]],
        [*(point.y for point in best), best[-1].y],
        where="post",
        color=COLORS[1],
        linewidth=1,
        alpha=0.6,
        zorder=1,
    )
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.grid()
