"""The machine that measures: its processor, its threads, and whether others use it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from sparsecli import console

CPUINFO = Path("/proc/cpuinfo")
BUSY_SECONDS = 0.5


def processor(cpuinfo: Path = CPUINFO) -> tuple[str, set[str] | None]:
    """Name and instruction flags of the first processor; flags are None where the system does not tell.

    Python's own answer is often only the architecture.
    """
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), None
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    flags = found.get("flags")
    return found.get("model name") or platform.machine(), None if flags is None else set(flags.split())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory_gb() -> float | None:
    """The most memory that this process has held at once; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(held * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)


def warn_if_busy() -> None:
    """Threads of one step wait for one another, so one that has to share its processor delays them all."""
    processors = psutil.cpu_count() or 1
    others = psutil.cpu_percent(interval=BUSY_SECONDS) / 100 * processors  # while this process sleeps
    own = torch.get_num_threads()
    if own > 1 and others + own > processors + 0.5:
        console.warn(
            f"other processes use {others:.1f} of {processors} processors, and {own} threads have to share: "
            "expect several times slower rows, or use fewer --threads"
        )
