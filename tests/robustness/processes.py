"""Commands of sparsecli in forked processes: what it imports is imported once, and a kill or a limit hits one command.

PyTorch and transformers take seconds to import. The parent imports them and computes nothing, so that a fork is safe.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MODULES = (
    *("sparsecli.cli", "sparsecli.train.command", "sparsecli.convert.command", "sparsecli.generate.command"),
    *("sparsecli.interchange.importing", "sparsecli.pack", "sparsecli.bench.command", "sparsecli.evaluate.command"),
    *("sparsecli.interchange.exporting", "sparsecli.interchange.gguf_file", "tensorboard.summary.writer.record_writer"),
    *("tensorboard.compat.proto.summary_pb2", "matplotlib.figure", "rich.table", "rich.progress", "datasets"),
    *("transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto"),
)  # fmt: skip
HUNG = 600.0
"""Seconds after which a command counts as hung."""


def warm() -> None:
    """Import what the commands need, and let every command use one thread."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    for name in MODULES:
        importlib.import_module(name)


@dataclass
class Command:
    """A command that runs in a process of its own, with what it writes in a file.

    Attributes:
        code: its exit code, negative for a signal; None while it runs.
        pipe: holds what it writes until it ends, where it can write no file.
    """

    pid: int
    log: Path
    code: int | None = None
    pipe: int | None = None

    @property
    def text(self) -> str:
        """What it has written to stdout and stderr."""
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = HUNG) -> int | None:
        """The exit code, negative for a signal; None if it still runs after `seconds`."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                if self.pipe is not None:
                    with open(self.pipe, "rb") as said:
                        self.log.write_bytes(said.read())
            elif time.monotonic() > end:
                break
            else:
                time.sleep(0.002)
        return self.code

    def kill(self) -> None:
        """SIGKILL to it and its children."""
        os.killpg(self.pid, signal.SIGKILL)
        self.wait()


def fork(work: Callable[[], object], log: Path) -> Command:
    """Call `work` in a forked process: its exit code is 0, that of a SystemExit, or 70 for any other exception."""
    pid = os.fork()
    if pid:
        with_group(pid)
        return Command(pid, log)
    code = 70
    try:
        with_group(0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 71
        os._exit(code)


def with_group(pid: int) -> None:
    """Make a process the first of a group; both sides of a fork do so, as either may be first."""
    with suppress(OSError):
        os.setpgid(pid, pid)


def start(
    arguments: Sequence[object],
    log: Path,
    *,
    largest_file: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Command:
    """Start `sparsecli` with these arguments.

    Args:
        largest_file: bytes that a file can have; a longer one cannot be written, as on a full disk.
    """

    reader, writer = os.pipe() if largest_file is not None else (None, None)

    def work() -> None:
        from sparsecli.cli import main

        os.environ |= environment or {}
        if largest_file is not None and writer is not None:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        sys.argv = ["sparsecli", *map(str, arguments)]
        main()

    command = fork(work, log)
    command.pipe = reader
    if writer is not None:
        os.close(writer)
    return command


def run(arguments: Sequence[object], log: Path, **options: object) -> Command:
    """`start`, and wait for the end. Raises RuntimeError if the command fails or hangs."""
    command = start(arguments, log, **options)  # type: ignore[arg-type]
    if command.wait() != 0:
        raise RuntimeError(f"{' '.join(map(str, arguments))}: exit code {command.code}: {command.text}")
    return command


def call(work: Callable[[], object], log: Path) -> None:
    """Call `work` in a forked process, so that the parent computes nothing. Raises RuntimeError if it fails."""
    command = fork(work, log)
    if command.wait() != 0:
        raise RuntimeError(f"exit code {command.code}: {command.text}")


@contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder, worked in, with a cache of its own."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="sparsecli-robustness-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        os.environ |= {"SPARSECLI_CACHE": str(folder / "cache"), "XDG_CACHE_HOME": str(folder / "xdg")}
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


UNEXPECTED = ("Traceback", "error: unexpected ", "terminate called", "Segmentation", "panicked")


def undesigned(command: Command, codes: Sequence[int] = (0, 1, 2, 3, 4)) -> str | None:
    """Why the end of a command is not one that was designed; None if it is."""
    text = command.text
    if command.code not in codes:
        return f"exit code {command.code}: {text[-500:]}"
    found = next((word for word in UNEXPECTED if word in text), None)
    return f"{found.strip()!r} in: {text[-500:]}" if found else None
