"""The memory limit of a decode step: how fast this machine reads, and how much a token has to read."""

from __future__ import annotations

import time

import torch

PROBE_BYTES = 512 * 2**20  # several times the largest last-level caches, so that every pass comes from memory
PROBE_SECONDS = 0.3
DRIFT = 0.15  # relative difference of two probes from which the machine counts as having changed


def bandwidth(probe_bytes: int = PROBE_BYTES, seconds: float = PROBE_SECONDS) -> float:
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


def fraction_of_limit(bytes_read: int, milliseconds: float, gb_per_second: float) -> float:
    """Share of the memory limit that a token reached: its bytes at full bandwidth over its measured time."""
    return bytes_read / (gb_per_second * 1e9) / (milliseconds / 1e3)


def drifted(before: float, after: float) -> bool:
    """Whether two bandwidths (same unit) differ so much that times measured beside them do not compare."""
    return abs(before - after) > DRIFT * max(before, after)
