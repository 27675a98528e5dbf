"""Models whose units stay on disk, and how fast that disk reads."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from sparsecli.bench.report import Disk
from sparsecli.console import Failure
from sparsecli.decode.packed.file import open_packed, save
from sparsecli.decode.packed.pack import PackedModel

PROBE_SECONDS = 1.0
READERS = 16  # reads in flight
SEQUENTIAL_BYTES = 2**20  # of one read
RANDOM_BYTES = 32 * 2**10
ALIGNMENT = 4096
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")


def check_supported(folder: Path) -> None:
    """Raise `Failure` where the pages of a file in `folder` cannot be made to leave the memory."""
    if (kind := file_system(folder)) in MEMORY_FILE_SYSTEMS:
        raise Failure(
            f"--from-disk: {folder.absolute()} is a {kind}, which lies in memory; name a --disk-folder on a disk"
        )
    if not hasattr(os, "posix_fadvise") or not hasattr(mmap, "MADV_DONTNEED"):
        raise Failure("--from-disk needs Linux, which can drop a file from memory")


def file_system(folder: Path) -> str:
    """Type of the file system that `folder` lies on; empty where the system does not say."""
    path = folder.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[place] for place in (path, *path.parents) if place in mounts), "")


def load(model: PackedModel, folder: Path, *, probed: bool) -> tuple[PackedModel, int, Disk | None]:
    """`model` with its units mapped from a file in `folder`, that file open, and if `probed` the disk's speed.

    The file has no name from then on: its space is free again when the program ends, however it ends.
    Raises `Failure` when it cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix=".sparsecli-bench-", dir=folder) as temporary:
        path = Path(temporary) / "model.spk"
        save(model, path)
        mapped = open_packed(path, from_disk=True)
        return mapped, os.open(path, os.O_RDONLY), probe(path) if probed else None


def probe(path: Path, seconds: float = PROBE_SECONDS) -> Disk:
    """Read a file past the system's cache, in large pieces one after the other and in small ones here and there."""
    size = path.stat().st_size
    at = np.random.default_rng(0).integers(max(size - RANDOM_BYTES, 1), size=1 << 16)
    random = [int(offset) // ALIGNMENT * ALIGNMENT for offset in at]
    sequential = range(0, max(size - SEQUENTIAL_BYTES, 1), SEQUENTIAL_BYTES)
    return Disk(
        sequential_mb_s=round(_speed(path, sequential, SEQUENTIAL_BYTES, seconds), 1),
        random_mb_s=round(_speed(path, random, RANDOM_BYTES, seconds), 1),
        random_kb=RANDOM_BYTES // 2**10,
    )


def _speed(path: Path, offsets: Sequence[int], length: int, seconds: float) -> float:
    """MB/s of reads of `length` bytes at `offsets`, so many of them as `seconds` allow."""
    # Where a file system refuses to be read past its cache, the file's pages are at least dropped first.
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
            if time.perf_counter() - start > seconds:
                break
            done += os.preadv(file, [buffer], offset)
        return done

    try:
        with ThreadPoolExecutor(READERS) as readers:
            done = sum(readers.map(read, range(READERS)))
    finally:
        os.close(file)
    return done / (time.perf_counter() - start) / 1e6
