"""Files of a report: checked before anything heavy starts, and never incomplete."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sparsecli.console import Failure, say, system_reason

Report = TypeVar("Report")

FIGURE_FORMATS = ("png", "svg", "pdf")
"""Endings of the files that matplotlib writes for us."""


def check_writable(path: Path, option: str) -> None:
    """Raise `Failure` unless a file can be written at `path`, which `option` names."""
    if path.is_dir():
        raise Failure(f"{path}: is a directory; name a file for {option}")
    if path.parent.exists() and not path.parent.is_dir():
        raise Failure(f"{path}: {path.parent} is a file, not a folder")
    if not path.parent.is_dir():
        raise Failure(f"{path}: the folder {path.parent} does not exist")
    beside = _beside(path)
    try:
        beside.touch()  # permissions alone do not show that a file system is read-only or full
        beside.unlink()
    except OSError as error:
        raise Failure(
            f"{path}: cannot be written: {system_reason(error)}; choose another {option}"
        ) from error
    if path.exists() and not os.access(path, os.W_OK):
        raise Failure(f"{path}: cannot be written; choose another {option}")


def check_readable(path: Path, option: str) -> None:
    """Raise `Failure` unless there is a file at `path`, which `option` names."""
    if not path.is_file():
        raise Failure(f"{option}: {path} is {'a folder' if path.is_dir() else 'not there'}; expected a file")


def check_reports(html: Path | None, plot: Path | None) -> None:
    """Raise `Failure` unless the page (`--html`) and the figure (`--plot`) can be written."""
    if html:
        check_writable(html, "--html")
    if plot:
        if plot.suffix[1:] not in FIGURE_FORMATS:
            endings = ", ".join(f".{format}" for format in FIGURE_FORMATS)
            raise Failure(f"--plot: expected a file that ends with one of {endings}, got {plot}", exit_code=2)
        check_writable(plot, "--plot")


def write_reports(
    report: Report,
    page: tuple[Path | None, Callable[[Report, Path], None]],
    figure: tuple[Path | None, Callable[[Report, Path], None]],
) -> None:
    """Write the page and the figure of a report, each to its path, if there is one, and say so."""
    for path, write_to in (page, figure):
        if path:
            write_to(report, path)
            say(f"wrote {path}")


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a file beside `path`, then rename it to `path`.

    Raises:
        Failure: the file cannot be written; nothing is left behind.
    """
    beside = _beside(path)
    try:
        save(beside)
        beside.replace(path)
    except OSError as error:
        raise Failure(f"{path}: cannot be written: {system_reason(error)}") from error
    finally:
        beside.unlink(missing_ok=True)  # also after an interrupt


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")


def write_text(path: Path, text: str) -> None:
    """`write` a text."""
    write(path, lambda beside: beside.write_text(text, encoding="utf-8"))
