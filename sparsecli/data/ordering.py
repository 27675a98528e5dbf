"""A random order of examples in which the examples of a batch have similar lengths."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

POOL = 32
"""Batches that are sorted together. A larger number reduces padding, but also randomness."""


class SimilarLengths(Sampler[int]):
    """Indices of all examples, each once per epoch. The order depends only on the seed and the epoch.

    Args:
        lengths: lengths of the examples, (n,).
        batch_size: consecutive indices that become one batch.
        count: indices in an epoch, fewer than all; the others are random.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, count: int | None = None) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.count = len(lengths) if count is None else count
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, and with it the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))[: self.count]
        pool = POOL * self.batch_size
        for start in range(0, len(order), pool):
            chosen = order[start : start + pool]
            chosen = chosen[np.argsort(self.lengths[chosen], kind="stable")]
            whole = len(chosen) // self.batch_size * self.batch_size
            batches = random.permutation(chosen[:whole].reshape(-1, self.batch_size))
            yield from batches.ravel().tolist()
            yield from chosen[whole:].tolist()
