"""Timing: turns of all rows, interleaved."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from sparsecli.bench.report import Spread, Times
from sparsecli.console import Progress

PERCENTILES = (10, 50, 90)
SETTLE_SECONDS = 0.01  # other programs' threads go on spinning for milliseconds after a step
NEVER_REPEATED = ("head",)  # parts outside of the blocks


class Decoder(Protocol):
    """A loaded model with its cache, for one sequence."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """Start the sequence with these tokens."""

    def rewind(self) -> None:
        """Forget every token after the prefill."""

    def step(self, token: int) -> tuple[int, int | None]:
        """Add one token; the greedy next one, and the nanoseconds that the block stack took, where that is known."""


class Profiled(Decoder, Protocol):
    """A decoder that times the parts of its steps."""

    def profile(self) -> dict[str, float]:
        """Seconds by part since the last call."""


class FromDisk(Decoder, Protocol):
    """A decoder that leaves weights in a file."""

    def evict(self) -> None:
        """Make the file's weights leave the memory."""

    def bytes_read(self) -> int:
        """Bytes that the process has read from disk so far."""


class PromptReader:
    """Reading a whole prompt, as the step of a `Decoder`."""

    def __init__(self, decoder: Decoder, vocabulary: int) -> None:
        self.decoder, self.vocabulary = decoder, vocabulary
        self.tokens: Sequence[int] = ()

    def prefill(self, tokens: Sequence[int]) -> None:
        """The prompt."""
        self.tokens = tokens

    def rewind(self) -> None:
        """See `Decoder.rewind`; every step starts anew."""

    def step(self, token: int) -> tuple[int, None]:
        """Read the prompt, shifted by `token` so that no two rounds read the same one."""
        self.decoder.prefill([(each + token) % self.vocabulary for each in self.tokens])
        return 0, None


def others(token: int, index: int, vocabulary: int) -> int:
    """A token for sequence `index` of a batch whose first sequence has `token`: theirs should differ."""
    return (token + 7919 * index) % vocabulary


@dataclass
class Turn:
    """A row while it is measured; `samples` fill up round after round."""

    decoder: Decoder
    vocabulary: int
    layers: int  # of the whole model
    measured_layers: int  # that the decoder has
    context: int = 0  # tokens of the prefill
    steps: int = 1  # measured in a round
    warmup: int = 0  # steps before them
    tokens: int = 1  # of one step: sequences of a batch, or the length of a prompt
    profiled: Profiled | None = None  # the decoder, where its parts are timed
    from_disk: FromDisk | None = None  # the decoder, where weights stay on disk
    token_ns: list[int] = field(default_factory=list)  # of a step
    block_stack_ns: list[int | None] = field(default_factory=list)
    part_seconds: dict[str, float] = field(default_factory=dict)
    bytes_read: list[int] = field(default_factory=list)

    @property
    def token_ms(self) -> np.ndarray:
        """Milliseconds a token of every measured step; missing blocks cost what the measured ones did."""
        nanoseconds = np.array(self.token_ns, dtype=np.float64)
        if self._whole > 1:
            nanoseconds += (self._whole - 1) * np.array(self.block_stack_ns, dtype=np.float64)
        return nanoseconds / 1e6 / self.tokens

    @property
    def block_ms(self) -> np.ndarray | None:
        """Milliseconds a token and block of every measured step; None where the decoder does not know."""
        if None in self.block_stack_ns:
            return None
        return np.array(self.block_stack_ns, dtype=np.float64) / self.measured_layers / 1e6 / self.tokens

    @property
    def parts(self) -> dict[str, float]:
        """Mean milliseconds a token by part; `rest` is what no part accounts for. Empty where nothing was timed."""
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
    turns: Sequence[Turn],
    rounds: int,
    seed: int,
    progress: Progress,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Give every row its turn, `rounds` times over, so that a disturbance hits all rows alike.

    A turn starts from the same cached context every time, with a token that is new in every round: greedy
    decoding from the same token would read the same units in every round. `between` is called between rounds.
    """
    random = np.random.default_rng(seed)
    # Tokens as fractions of the vocabulary, whose size may differ from row to row.
    starts = random.random(rounds)
    prompt = random.random(max(turn.context for turn in turns))
    for turn in turns:
        turn.decoder.prefill([int(fraction * turn.vocabulary) for fraction in prompt[: turn.context]])
        progress.advance()
    gc.collect()
    gc.freeze()  # what is there stays: to look through it again in every turn would take longer than many a turn
    try:
        for index, start in enumerate(starts):
            if index:
                between()
            for turn in turns:
                _take(turn, int(start * turn.vocabulary))
                progress.advance()
    finally:
        gc.unfreeze()


def _take(turn: Turn, token: int) -> None:
    """Warm up, then time every step; the garbage collector waits meanwhile."""
    decoder, disk = turn.decoder, turn.from_disk
    decoder.rewind()
    gc.collect()
    time.sleep(SETTLE_SECONDS)
    gc.disable()
    try:
        for _ in range(turn.warmup):
            token, _ = decoder.step(token)
        if turn.profiled:
            turn.profiled.profile()
        for _ in range(turn.steps):
            if disk:
                disk.evict()
                turn.bytes_read.append(-disk.bytes_read())
            start = time.perf_counter_ns()
            token, stack = decoder.step(token)
            turn.token_ns.append(time.perf_counter_ns() - start)
            turn.block_stack_ns.append(stack)
            if disk:
                turn.bytes_read[-1] += disk.bytes_read()
        if turn.profiled:
            for name, seconds in turn.profiled.profile().items():
                turn.part_seconds[name] = turn.part_seconds.get(name, 0.0) + seconds
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
