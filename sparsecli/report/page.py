"""A page of results: what it shows, as plain data, and its rendering as one HTML file that needs no network.

`page.html` is the template. Charts are HTML and CSS: they fit any width, and a page without JavaScript only lacks the
sorting of tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

_LEADING_NUMBER = re.compile(r"[~≈]?\s*([-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?)\s*([kMB](?![A-Za-z]))?")
_UNITS = {None: 1.0, "k": 1e3, "M": 1e6, "B": 1e9}
MISSING = ("", "-", "—")
"""Cells without a figure."""
MOST_TICKS = 6
WIDE_SPAN = 8
"""Ratio of the largest to the smallest time from which on an axis is logarithmic."""


@dataclass(frozen=True)
class Table:
    """A table that readers sort by a click on a column's title."""

    template: ClassVar = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def cells(self, row: Sequence[str]) -> list[tuple[str, float | None]]:
        """Texts and the numbers that sort them; None for what is sorted by the alphabet."""
        return [
            (text, leading_number(text) if numeric else None)
            for text, numeric in zip(row, self.numeric, strict=True)
        ]

    @cached_property
    def numeric(self) -> list[bool]:
        """By column, whether its cells are numbers or missing: these are right-aligned and wrap nowhere."""
        found = []
        for cells in zip(*self.rows, strict=True):
            numbers = [leading_number(cell) is not None for cell in cells if cell not in MISSING]
            found.append(bool(numbers) and all(numbers))
        return found or [False] * len(self.columns)


@dataclass(frozen=True)
class Bar:
    """One value of a bar chart, with the ends of its interval if there is one.

    Bars that follow one another with the same `heading` stand below it.
    """

    name: str
    value: float
    text: str
    group: str = ""
    heading: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bars:
    """Horizontal bars on one scale. `limit` is a value that a line marks."""

    template: ClassVar = "bars"
    title: str
    bars: Sequence[Bar]
    note: str = ""
    limit: float | None = None

    @property
    def scale(self) -> float:
        """The value at the right edge."""
        ends = [bar.value if bar.high is None else bar.high for bar in self.bars]
        return max([*ends, self.limit or 0.0]) or 1.0


@dataclass(frozen=True)
class Stack:
    """One bar of parts by name, which are shown as shares of their sum."""

    name: str
    parts: dict[str, float]
    text: str
    heading: str = ""

    @property
    def shares(self) -> dict[str, float]:
        """The parts divided by their sum."""
        total = sum(self.parts.values()) or 1.0
        return {name: value / total for name, value in self.parts.items()}


@dataclass(frozen=True)
class Stacks:
    """Stacked bars, all of the same length. A part has the same colour in all of them."""

    template: ClassVar = "stacks"
    title: str
    stacks: Sequence[Stack]
    names: Sequence[str]
    """The parts in their order."""
    note: str = ""


@dataclass(frozen=True)
class Point:
    """A point of a plot, with the standard error of `y` if it is known."""

    name: str
    x: float
    y: float
    text: str
    group: str = ""
    error: float = 0.0


@dataclass(frozen=True)
class Plot:
    """Points whose frontier is a line: no other point has both less `x` and less `y`."""

    template: ClassVar = "plot"
    title: str
    points: Sequence[Point]
    x_label: str
    y_label: str
    note: str = ""

    @property
    def logarithmic(self) -> bool:
        """Whether `x` spans so much that only its logarithm keeps the points apart."""
        found = [point.x for point in self.points]
        return min(found) > 0 and max(found) >= WIDE_SPAN * min(found)

    @property
    def x_ticks(self) -> list[float]:
        """Marks of the axis, which begins at 0 unless it is logarithmic, to beyond the last point."""
        found = [point.x for point in self.points]
        return (
            log_ticks(min(found) / 1.1, max(found) * 1.1)
            if self.logarithmic
            else ticks(0.0, max(found) * 1.04)
        )

    def x_share(self, x: float) -> float:
        """Where `x` stands on its axis, from 0 to 1."""
        first, last = self.x_ticks[0], self.x_ticks[-1]
        if self.logarithmic:
            return math.log(x / first) / math.log(last / first)
        return (x - first) / (last - first)

    @property
    def y_ticks(self) -> list[float]:
        """Marks of the axis, which spans all points and their errors."""
        return ticks(
            min(point.y - point.error for point in self.points),
            max(point.y + point.error for point in self.points),
        )

    @property
    def frontier(self) -> list[Point]:
        """The points that no other is better than in both, by `x`."""
        return [self.points[index] for index in frontier([(each.x, each.y) for each in self.points])]


@dataclass(frozen=True)
class Page:
    """Everything that a page shows: facts at the top, then sections in order, then notes."""

    title: str
    summary: str
    facts: Sequence[tuple[str, str]]
    command: str
    sections: Sequence[Table | Bars | Stacks | Plot]
    notes: Sequence[str] = field(default=())


def render(page: Page) -> str:
    """The page as one HTML document. All texts are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sparsecli.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("page.html").render(page=page, groups=groups_of(page)) + "\n"


def groups_of(page: Page) -> list[str]:
    """Groups of bars and points, each with its colour; dense models first, so that theirs is the same everywhere."""
    found: list[str] = []
    for section in page.sections:
        entries: Iterable[Bar | Point] = ()
        if isinstance(section, Bars):
            entries = section.bars
        elif isinstance(section, Plot):
            entries = section.points
        found += [each.group for each in entries if each.group]
    return sorted(dict.fromkeys(found), key=lambda group: group != "dense")


def leading_number(text: str) -> float | None:
    """The number that a cell begins with, for sorting: `~1.72x` is 1.72, `819M` 819 million; None without one."""
    found = _LEADING_NUMBER.match(text)
    return float(found[1].replace(",", "")) * _UNITS[found[2]] if found else None


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (x, y) that no other point beats in both, by x."""
    found: list[int] = []
    for index in sorted(range(len(points)), key=lambda each: points[each]):
        if not found or points[index][1] < points[found[-1]][1]:
            found.append(index)
    return found


def ticks(low: float, high: float) -> list[float]:
    """At most MOST_TICKS + 1 round numbers whose first and last enclose `low` to `high`."""
    span = (high - low) or abs(high) or 1.0
    size = 10.0 ** math.floor(math.log10(span / MOST_TICKS))
    step = next(size * factor for factor in (1, 2, 5, 10, 20) if span / (size * factor) <= MOST_TICKS - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, the first and the last of which enclose `low` to `high`; above 0."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [float(f"{factor}e{decade}") for decade in decades for factor in (1, 2, 5)]
    first = max(index for index, mark in enumerate(marks) if mark <= low)
    last = min(index for index, mark in enumerate(marks) if mark >= high)
    return marks[first : last + 1]
