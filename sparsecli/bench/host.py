"""The measuring machine: its processor, its load, and the read speed of memory, disk and engine."""

from __future__ import annotations

import mmap
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch

from sparsecli import console
from sparsecli.bench.random_weights import Pools, packed_elements, packed_model
from sparsecli.bench.result import Disk
from sparsecli.console import Failure
from sparsecli.decode.engine import Engine
from sparsecli.decode.packed.precision import Precision
from sparsecli.decode.packed.tensor_file import WIDTHS
from sparsecli.spec.model import ModelSpec

CPUINFO = Path("/proc/cpuinfo")
CACHE_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
BUSY_SECONDS = 0.5


# -- the processor -------------------------------------------------------------------------------------------


def processor(cpuinfo: Path = CPUINFO) -> tuple[str, set[str] | None]:
    """Name and instruction flags of the first processor; flags are None if the system does not give them.

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


def last_level_cache(path: Path = CACHE_SIZE) -> int:
    """Bytes of the last-level cache; 0 if the system does not give them."""
    try:
        number, unit = re.fullmatch(r"(\d+)([KM]?)", path.read_text().strip()).groups()  # type: ignore[union-attr]
    except (OSError, AttributeError):
        return 0
    return int(number) * {"": 1, "K": 2**10, "M": 2**20}[unit]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with this number of threads while open."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def warn_if_busy(remedy: str = "") -> None:
    """Warn if other processes are busy, and name a remedy.

    Threads of a step wait for each other: one that shares its CPU delays all.
    """
    processors = psutil.cpu_count() or 1
    others = psutil.cpu_percent(interval=BUSY_SECONDS) / 100 * processors  # while this process sleeps
    own = torch.get_num_threads()
    if own > 1 and others + own > processors + 0.5:
        console.warn(
            f"other processes use {others:.1f} of {processors} processors, which {own} threads must share with "
            f"them: figures may be several times too slow{remedy}"
        )


# -- memory --------------------------------------------------------------------------------------------------

BANDWIDTH_BYTES = 512 * 2**20  # several times the largest last-level caches, so that every pass reads memory
BANDWIDTH_SECONDS = 0.3
DRIFT = 0.15  # relative difference of two probes from which on the machine has changed


def bandwidth(probe_bytes: int = BANDWIDTH_BYTES, seconds: float = BANDWIDTH_SECONDS) -> float:
    """Sequential read bandwidth in GB/s, all torch threads together: the best pass of about `seconds`.

    The passes add up a float32 buffer. The best of them is the least disturbed by other processes.
    """
    buffer = torch.ones(probe_bytes // 4)  # written, so that every page exists
    best = float("inf")
    end = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        buffer.sum()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return buffer.nbytes / best / 1e9


def drifted(before: float, after: float) -> bool:
    """Whether two bandwidths (same unit) differ so much that times measured with them are not comparable."""
    return abs(before - after) > DRIFT * max(before, after)


def peak_memory_gb() -> float | None:
    """Peak memory of this process; None if the system does not give it."""
    try:
        import resource
    except ImportError:
        return None
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(held * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)


# -- the disk ------------------------------------------------------------------------------------------------

DISK_SECONDS = 1.0
READERS = 16  # reads in flight
SEQUENTIAL_BYTES = 2**20  # of one read
RANDOM_BYTES = 32 * 2**10
ALIGNMENT = 4096
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")


def check_evictable(folder: Path) -> None:
    """Raise `Failure` if the pages of a file in `folder` cannot be evicted from memory."""
    if (kind := file_system(folder)) in MEMORY_FILE_SYSTEMS:
        raise Failure(
            f"--from-disk: {folder.absolute()} is on {kind}, which is in memory; choose a --disk-folder on a disk"
        )
    if not hasattr(os, "posix_fadvise") or not hasattr(mmap, "MADV_DONTNEED"):
        raise Failure("--from-disk needs Linux, which can evict a file from memory")


def file_system(folder: Path) -> str:
    """Type of the file system of `folder`; empty if the system does not give it."""
    path = folder.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[place] for place in (path, *path.parents) if place in mounts), "")


def disk_speed(path: Path) -> Disk:
    """Read a file without the system's cache, in large sequential pieces and in small random ones."""
    size = path.stat().st_size
    at = np.random.default_rng(0).integers(max(size - RANDOM_BYTES, 1), size=1 << 16)
    random = [int(offset) // ALIGNMENT * ALIGNMENT for offset in at]
    sequential = range(0, max(size - SEQUENTIAL_BYTES, 1), SEQUENTIAL_BYTES)
    return Disk(
        sequential_mb_s=round(_read_speed(path, sequential, SEQUENTIAL_BYTES), 1),
        random_mb_s=round(_read_speed(path, random, RANDOM_BYTES), 1),
        random_kb=RANDOM_BYTES // 2**10,
    )


def _read_speed(path: Path, offsets: Sequence[int], length: int) -> float:
    """MB/s of reads of `length` bytes at `offsets`, as many of them as DISK_SECONDS allow."""
    # If a file system has no direct reads, the file's pages are at least evicted first.
    flags = os.O_RDONLY | getattr(os, "O_DIRECT", 0)
    try:
        file = os.open(path, flags)
    except OSError:
        file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()

    def read(index: int) -> int:
        buffer, done = mmap.mmap(-1, length), 0
        for offset in offsets[index::READERS]:
            if time.perf_counter() - start > DISK_SECONDS:
                break
            done += os.preadv(file, [buffer], offset)
        return done

    try:
        with ThreadPoolExecutor(READERS) as readers:
            done = sum(readers.map(read, range(READERS)))
    finally:
        os.close(file)
    return done / (time.perf_counter() - start) / 1e6


# -- the engine ----------------------------------------------------------------------------------------------

ENGINE_TYPES = ("float32", "bfloat16", "int8", "int4")
ENGINE_BYTES = 128 * 2**20  # of weights: several times the last-level cache of most processors
ENGINE_WIDTH = 2048
ENGINE_STEPS = 4  # of which the best counts
WEIGHT_BYTES = {**WIDTHS, "int4": 0.55}  # with a scale and a zero for 64 weights


def engine_shares(gb_per_second: float) -> dict[str, float]:
    """Share of `gb_per_second` that the native engine's gemv reaches, by weight type.

    It is measured on one dense layer with about ENGINE_BYTES of weights.

    Raises:
        Failure: there is too little memory, or the native engine cannot be used.
    """
    return {kind: round(_engine_speed(kind, ENGINE_BYTES) / gb_per_second, 3) for kind in ENGINE_TYPES}


def _engine_speed(kind: str, weight_bytes: int) -> float:
    """GB/s of a step."""
    units = int(weight_bytes / WEIGHT_BYTES[kind] / (2 * ENGINE_WIDTH)) // 64 * 64
    spec = ModelSpec.model_validate(
        {
            "d_model": ENGINE_WIDTH,
            "layers": 1,
            "heads": 16,
            "max_positions": 64,
            "feed_forward": {"kind": "dense", "d_ff": units},
            "attention": {"projection": "dense"},
            "vocabulary": {"kind": "dense", "size": 256},
        }
    )
    precision = Precision.of(kind)
    packed = packed_model(spec, precision, Pools.of(packed_elements(spec, precision)))
    engine = Engine(packed)
    try:
        sequence, best = engine.sequence(64), float("inf")
        for token in range(ENGINE_STEPS):
            start = time.perf_counter()
            engine.step(sequence, token)
            best = min(best, time.perf_counter() - start)
    finally:
        engine.close()
    read = sum(
        tensor.nbytes for name, tensor in packed.tensors.items() if name not in ("embedding", "positions")
    )
    return read / best / 1e9
