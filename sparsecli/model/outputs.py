"""Writes a model whole or not at all: checks of its place, a folder beside it, locks, permissions."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from sparsecli.console import Failure, system_reason

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two processes out of one folder
    fcntl = None  # type: ignore[assignment]

BESIDE = ".partial"
"""End of the names of folders in which something is written before it takes its own name."""


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold `folder`, which exists, against other processes while open; False if another process holds it.

    The system releases it when the process ends, also when it is killed. Nothing is written.
    """
    if fcntl is None:
        yield True
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # the process that held it has just deleted or renamed it
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(handle), folder.stat())
        except (BlockingIOError, FileNotFoundError):
            free = False
        except OSError:  # a file system without locks
            free = True
        yield free
    finally:
        os.close(handle)


def check_output(output: Path) -> None:
    """Raise Failure unless a file can be written in `output`, or in the nearest folder above it that exists."""
    place = output
    while not os.path.lexists(place):
        place = place.parent
    if place.exists() and not place.is_dir():
        raise Failure(f"{output}: cannot be written: {place} is a file, not a folder")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise Failure(f"{output}: cannot be written: {place}: {system_reason(error)}") from None


def check_new(output: Path, argument: str = "--output") -> None:
    """Raise Failure if `output`, which `argument` names, is there already or cannot be written."""
    if os.path.lexists(output):
        raise Failure(f"{output}: already exists; choose another {argument}")
    check_output(output)


@contextmanager
def written_beside(output: Path, file: bool = False) -> Iterator[Path]:
    """An empty folder, or the place of a `file`, beside `output`, which takes its name at the end: all or nothing.

    Raises:
        Failure: it cannot be written (by any library), or another process has written `output` meanwhile.
    """
    check_output(output)
    try:
        with _written_beside(output, file) as beside:
            yield beside
    except Failure:
        raise
    except Exception as error:
        reason = system_reason(error)
        named = getattr(error, "filename", None) is not None
        if reason is None or (named and BESIDE not in str(error)):  # another file could not be read
            raise
        raise Failure(f"{output}: cannot be written: {reason}") from error


@contextmanager
def _written_beside(output: Path, file: bool) -> Iterator[Path]:
    output.parent.mkdir(parents=True, exist_ok=True)
    for left in output.parent.glob(f"{escape(output.name)}.*{BESIDE}"):  # by a process that was killed
        with held(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=f"{output.name}.", suffix=BESIDE, dir=output.parent) as beside,
        held(Path(beside)),
    ):
        made = Path(beside) / output.name  # with the permissions of any other folder
        if not file:
            made.mkdir()
        yield made
        share(Path(beside) if file else made)
        try:
            made.rename(output)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise Failure(f"{output}: another process has written it meanwhile") from None


def share(folder: Path) -> None:
    """Give the files of a model the permissions that new files have; safetensors lets only the owner read its own."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)
