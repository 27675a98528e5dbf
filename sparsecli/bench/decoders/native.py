"""The native decoder: the engine over packed weights, in memory or with the units of sparse layers in a file."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparsecli.bench.decoders import others
from sparsecli.decode.engine import Engine, source_streams

INPUT_OUTPUT = Path("/proc/self/io")


class NativeDecoder:
    """One sequence, or a batch of sequences: see `TimedDecoder`. The encoder's output for `source` tokens is random."""

    def __init__(self, engine: Engine, capacity: int, batch: int = 1, source: int = 0) -> None:
        self.engine = engine
        self.texts = [engine.sequence(capacity, source) for _ in range(batch)]
        for index, text in enumerate(self.texts if source else ()):
            spec = engine.model.spec
            shape = (source_streams(spec), source, spec.d_model)
            engine.read_source(text, np.random.default_rng(index).standard_normal(shape, np.float32))
        self.context = 0
        self.next: list[int] = []

    def prefill(self, tokens: Sequence[int]) -> None:
        """See `TimedDecoder.prefill`; every sequence of a batch has other tokens."""
        for index, text in enumerate(self.texts):
            text.truncate(0)
            self.engine.prefill(text, [others(token, index, self.engine.vocabulary) for token in tokens])
        self.context = len(tokens)

    def rewind(self) -> None:
        """See `TimedDecoder.rewind`."""
        for text in self.texts:
            text.truncate(self.context)
        self.next = []

    def step(self, token: int) -> tuple[int, int]:
        """See `TimedDecoder.step`. The other sequences of a batch continue with their own greedy tokens."""
        if len(self.texts) == 1:
            return int(self.engine.step(self.texts[0], token).argmax()), self.engine.block_stack_ns
        added = self.next or [
            others(token, index, self.engine.vocabulary) for index in range(len(self.texts))
        ]
        self.next = self.engine.step_batch(self.texts, added).argmax(-1).tolist()
        return self.next[0], self.engine.block_stack_ns

    def profile(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        return self.engine.profile()


class DiskDecoder(NativeDecoder):
    """A decoder whose units are mapped from an open `file` and can be evicted: see `EvictingDecoder`."""

    def __init__(self, engine: Engine, capacity: int, batch: int, source: int, file: int) -> None:
        super().__init__(engine, capacity, batch, source)
        self.file = file
        units = (tensor for name, tensor in engine.model.tensors.items() if name.endswith(".units"))
        self.mapping = _mapping(next(units))

    def evict(self) -> None:
        """Drop the mapped pages, then evict them from the system's cache, which keeps mapped pages."""
        self.mapping.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_DONTNEED)

    def bytes_read(self) -> int:
        """Bytes that the system has read from disk for all threads of this process."""
        counters = dict(line.split(": ") for line in INPUT_OUTPUT.read_text().splitlines())
        return int(counters["read_bytes"])


def _mapping(array: object) -> mmap.mmap:
    """The mapped file that a tensor is a view into."""
    while not isinstance(array, mmap.mmap):
        array = array.obj if isinstance(array, memoryview) else array.base  # type: ignore[attr-defined]
    return array
