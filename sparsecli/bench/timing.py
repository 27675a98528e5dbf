"""Interleaved timing of decoders: they take turns in rounds, so that a disturbance affects all equally."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sparsecli.bench.decoders import EvictingDecoder, ProfiledDecoder, TimedDecoder
from sparsecli.bench.result import Spread, Times
from sparsecli.console import Progress

PERCENTILES = (10, 50, 90)
SETTLE_SECONDS = 0.01  # threads of other programs still spin for milliseconds after a step
NEVER_REPEATED = ("head",)  # parts outside of the blocks


@dataclass
class Timing:
    """A decoder and the times of its steps, to which every round adds."""

    decoder: TimedDecoder
    vocabulary: int
    layers: int  # of the whole model
    measured_layers: int  # that the decoder has
    context: int = 0  # tokens of the prefill
    steps: int = 1  # measured in a round
    warmup: int = 0  # steps before them
    tokens: int = 1  # of one step: sequences of a batch, or the length of a prompt
    profiled: ProfiledDecoder | None = None  # the decoder, where its parts are timed
    evicting: EvictingDecoder | None = None  # the decoder, where weights stay on disk
    token_ns: list[int] = field(default_factory=list)  # of a step
    block_stack_ns: list[int | None] = field(default_factory=list)
    part_seconds: dict[str, float] = field(default_factory=dict)
    bytes_read: list[int] = field(default_factory=list)

    @property
    def token_ms(self) -> np.ndarray:
        """Milliseconds per token of every measured step; blocks that were not built get the time of the others."""
        nanoseconds = np.array(self.token_ns, dtype=np.float64)
        if self._whole > 1:
            nanoseconds += (self._whole - 1) * np.array(self.block_stack_ns, dtype=np.float64)
        return nanoseconds / 1e6 / self.tokens

    @property
    def block_ms(self) -> np.ndarray | None:
        """Milliseconds per token and block of every measured step; None if the decoder does not measure them."""
        if None in self.block_stack_ns:
            return None
        return np.array(self.block_stack_ns, dtype=np.float64) / self.measured_layers / 1e6 / self.tokens

    @property
    def parts(self) -> dict[str, float]:
        """Mean milliseconds per token by part; `rest` is the time outside of all parts. Empty if not measured."""
        if not self.part_seconds:
            return {}
        tokens = len(self.token_ns) * self.tokens
        found = {
            name: seconds * 1e3 / tokens * (1 if name in NEVER_REPEATED else self._whole)
            for name, seconds in self.part_seconds.items()
        }
        found["rest"] = max(float(self.token_ms.mean()) - sum(found.values()), 0.0)
        return {name: round(milliseconds, 5) for name, milliseconds in found.items() if milliseconds}

    @property
    def _whole(self) -> float:
        return self.layers / self.measured_layers


def measure(
    timings: Sequence[Timing],
    rounds: int,
    seed: int,
    progress: Progress,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Run `rounds` rounds, in each of which every decoder has one turn, so that a disturbance affects all equally.

    Each turn starts from the same cached context, but from another token in each round: greedy decoding from the same
    token would read the same units in every round. `between` is called between rounds.
    """
    random = np.random.default_rng(seed)
    # Tokens as fractions of the vocabulary, whose size may differ between models.
    starts = random.random(rounds)
    prompt = random.random(max(timing.context for timing in timings))
    for timing in timings:
        timing.decoder.prefill([int(fraction * timing.vocabulary) for fraction in prompt[: timing.context]])
        progress.advance()
    gc.collect()
    gc.freeze()  # freeze existing objects: to scan them again in every turn could take longer than the turn
    try:
        for index, start in enumerate(starts):
            if index:
                between()
            for timing in timings:
                _take_turn(timing, int(start * timing.vocabulary))
                progress.advance()
    finally:
        gc.unfreeze()


def _take_turn(timing: Timing, token: int) -> None:
    """Warm up, then time every step, with the garbage collector switched off."""
    decoder, evicting = timing.decoder, timing.evicting
    decoder.rewind()
    gc.collect()
    time.sleep(SETTLE_SECONDS)
    gc.disable()
    try:
        for _ in range(timing.warmup):
            token, _ = decoder.step(token)
        if timing.profiled:
            timing.profiled.profile()
        for _ in range(timing.steps):
            if evicting:
                evicting.evict()
                timing.bytes_read.append(-evicting.bytes_read())
            start = time.perf_counter_ns()
            token, stack = decoder.step(token)
            timing.token_ns.append(time.perf_counter_ns() - start)
            timing.block_stack_ns.append(stack)
            if evicting:
                timing.bytes_read[-1] += evicting.bytes_read()
        if timing.profiled:
            for name, seconds in timing.profiled.profile().items():
                timing.part_seconds[name] = timing.part_seconds.get(name, 0.0) + seconds
    finally:
        gc.enable()


def spread(milliseconds: np.ndarray) -> Spread:
    """Percentiles of samples."""
    p10, p50, p90 = (round(float(value), 4) for value in np.percentile(milliseconds, PERCENTILES))
    return Spread(p10=p10, p50=p50, p90=p90)


def times(milliseconds: np.ndarray) -> Times:
    """Percentiles with their samples."""
    samples = [round(float(value), 4) for value in milliseconds]
    return Times(**dict(spread(milliseconds)), samples=samples)
