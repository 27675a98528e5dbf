"""Output and errors: results go to stdout, messages to stderr. No other module prints.

rich is imported on first use, so that modules that need only an error class import fast.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PLAIN_SECONDS = 10.0
"""Seconds between two progress lines if stderr is not a terminal."""
LONGEST_ERROR = 1000
"""Characters of a line of an error that are shown: libraries repeat a wrong value as a whole."""
RECENT_SECONDS = 60.0
"""Seconds of recent steps whose rate tells the time left."""

# Rich does not remove escape sequences. Text from a recipe or a model must not control the terminal.
_UNPRINTABLE = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"
}

_NUMBER = re.compile(r"[-+]?[\d.,]+ ?[%x]?|—|")


class Failure(Exception):
    """An expected error. Its message is one line: where, what was wrong, and what to do.

    Any module may raise it. The command line shows it without a traceback and exits with `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        if exit_code is not None:
            self.exit_code = exit_code


class RecipeError(Failure):
    """The recipe or an override is wrong. `message` has one line for each problem."""

    exit_code = 2


class Regression(Failure):
    """A benchmark is slower than the result it is compared with."""

    exit_code = 3


class Mismatch(Failure):
    """Two outputs differ that must be equal."""

    exit_code = 4


class Stopped(Failure):
    """A signal stopped the command, which has saved its state and can be resumed."""

    exit_code = 75


def system_reason(error: BaseException) -> str | None:
    """Why a file could not be read or written, in the system's words where it has some.

    None for an error of another kind; never for an OSError.
    """
    text = str(error)
    # safetensors and tokenizers raise Rust's messages, in exceptions without a common type.
    if found := re.search(r"([^:]+) \(os error \d+\)", text):
        return found[1].strip()
    # NumPy's arrays and torch.save do not give the reason.
    if re.search(r"inline_container|iostream error|requested and \d+ written", text):
        return "not all data could be written (disk full?)"
    if isinstance(error, OSError):
        return error.strerror or text or type(error).__name__
    return None


@cache
def _stdout() -> Console:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 240  # a file or a pipe has no width; rows are never folded
    return console


@cache
def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def out(text: str = "", end: str = "\n") -> None:
    """Write data to stdout at once. On a terminal, control characters are shown as escapes."""
    sys.stdout.write((text.translate(_UNPRINTABLE) if sys.stdout.isatty() else text) + end)
    sys.stdout.flush()


def first_process() -> bool:
    """Whether this is the first process of `torchrun`. Only the first process writes messages."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """Processes of `torchrun`; one without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(text: str, style: str | None = None) -> None:
    """Write a message to stderr, in the first process only."""
    if first_process():
        _write(text, style)


@cache
def say_once(text: str) -> None:
    """Write a message to stderr, unless the same message was written before."""
    say(text)


def _write(text: str, style: str | None) -> None:
    _stderr().print(text.translate(_UNPRINTABLE), style=style)


def warn(text: str) -> None:
    """Write a warning to stderr."""
    say(f"warning: {text}", style="yellow")


@cache
def warn_once(text: str) -> None:
    """Write a warning to stderr, unless the same warning was written before."""
    warn(text)


@contextmanager
def failing() -> Iterator[None]:
    """Turn a `Failure` of a small program into its line on stderr and its exit code."""
    try:
        yield
    except Failure as failure:
        fail(failure)
        sys.exit(failure.exit_code)


def fail(failure: Failure) -> None:
    """Write an expected error to stderr, each line marked as an error, in every process."""
    if isinstance(failure, Stopped):
        say(failure.message)
        return
    for line in failure.message.splitlines():
        shown = line if len(line) <= LONGEST_ERROR else f"{line[:LONGEST_ERROR]}…"
        _write(f"error: {shown}", style="red")


def table(table: Table) -> None:
    """Write a rich table to stdout, with control characters as in `out`."""
    from rich.segment import Segment, Segments

    console = _stdout()
    if not console.is_terminal:
        console.print(table)
        return
    pieces = (Segment(text.translate(_UNPRINTABLE), style) for text, style, _ in console.render(table))
    console.print(Segments(pieces), end="")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """Write a table of plain values to stdout: columns of numbers are right-aligned, None is a dash."""
    from rich import box
    from rich.table import Table

    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    cells = [["—" if value is None else str(value) for value in row] for row in rows]
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(_NUMBER.fullmatch(row[index]) for row in cells)
        result.add_column(column, justify="right" if numeric else "left", no_wrap=numeric)
    for row in cells:
        result.add_row(*row)
    table(result)


def json_out(value: Any) -> None:
    """Write one JSON document to stdout.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have.
    """
    out(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


class Progress(Protocol):
    """The progress of a loop, as `progress` shows it."""

    def advance(self, steps: int = 1, seconds_left: float | None = None, **fields: object) -> None:
        """Advance by `steps`. `fields`, such as a loss or a speed, are shown beside the count.

        Unless `seconds_left` is known, the rate of recent steps tells the time left.
        """


def _describe(fields: dict[str, object]) -> str:
    words = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in fields.values())
    return ", ".join(f"{name.replace('_', ' ')} {word}" for name, word in zip(fields, words, strict=True))


class _Bar:
    """A progress bar on a terminal."""

    def __init__(self, bar: Any, task: Any) -> None:
        self.bar, self.task = bar, task

    def advance(self, steps: int = 1, seconds_left: float | None = None, **fields: object) -> None:
        update: dict[str, object] = {"seconds_left": seconds_left}
        if fields:
            update["fields"] = _describe(fields).translate(_UNPRINTABLE)
        self.bar.update(self.task, advance=steps, **update)


class _Lines:
    """A line every few seconds, for logs, and a line for the last step."""

    def __init__(self, description: str, total: int | None) -> None:
        self.description, self.total, self.done = description, total, 0
        self.start = self.shown = time.monotonic()
        self.recent: deque[tuple[float, int]] = deque()  # times and the steps that were done

    def advance(self, steps: int = 1, seconds_left: float | None = None, **fields: object) -> None:
        self.done += steps
        now = time.monotonic()
        # The first step takes longer than others, and a resumed loop begins with many at once.
        self.recent.append((now, self.done))
        while now - self.recent[0][0] > RECENT_SECONDS and len(self.recent) > 2:
            self.recent.popleft()
        if now - self.shown < PLAIN_SECONDS and self.done != self.total:
            return
        self.shown = now
        count = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        elapsed = now - self.start
        if self.total is None or self.done >= self.total:
            timing = f"{elapsed:.0f} s"
        else:
            left = self._left(now) if seconds_left is None else seconds_left
            timing = f"{elapsed:.0f} s, {left:.0f} s left"
        say(", ".join(filter(None, [f"{self.description}: {count}", _describe(fields), timing])))

    def _left(self, now: float) -> float:
        """Seconds until the total, at the rate of recent steps."""
        assert self.total is not None
        begin, done = self.recent[0] if len(self.recent) > 1 else (self.start, 0)
        return (now - begin) / (self.done - done) * (self.total - self.done)


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Progress]:
    """Show the progress of a loop on stderr: a bar on a terminal, else a plain line every ten seconds."""
    if not (_stderr().is_terminal and first_process()):
        yield _Lines(description, total)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class TimeLeft(TimeRemainingColumn):
        def render(self, task: Task) -> Text:
            left = task.fields.get("seconds_left")
            return super().render(task) if left is None else Text(str(timedelta(seconds=round(left))))

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[fields]}", markup=False),
        TimeLeft(elapsed_when_finished=True),
    )
    with RichProgress(*columns, console=_stderr()) as bar:
        yield _Bar(bar, bar.add_task(description.translate(_UNPRINTABLE), total=total, fields=""))
