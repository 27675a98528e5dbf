"""How many threads a training on a CPU gets beside other programs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from sparsecli.console import say

SECONDS = 0.5
"""How long the use of the processors is watched."""


def choose_threads(facts: Mapping[str, Any]) -> None:
    """Give PyTorch as many threads as there are idle processors, at least one, and report it if that is less.

    Threads that share processors with other programs wait for one another at the end of each operation: two threads
    beside one busy program are slower than one. A run that is resumed keeps its number of threads, `facts["threads"]`,
    because sums depend on it. `OMP_NUM_THREADS` has precedence; `torchrun` sets it for each of its processes.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    all_threads = torch.get_num_threads()
    if all_threads == 1:
        return
    before = facts.get("threads")
    if isinstance(before, int) and 0 < before <= all_threads:
        if before < all_threads:
            say(f"{_counted(before)}, as when this run was started; OMP_NUM_THREADS={all_threads} changes it")
        torch.set_num_threads(before)
        return
    processors = psutil.cpu_count() or all_threads
    busy = psutil.cpu_percent(SECONDS) / 100 * processors  # while this process sleeps
    threads = max(1, min(all_threads, round(processors - busy)))
    if threads < all_threads:
        say(
            f"other programs use {busy:.1f} of {processors} processors: training with {_counted(threads)}; "
            f"OMP_NUM_THREADS={all_threads} changes it"
        )
        torch.set_num_threads(threads)


def _counted(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"
