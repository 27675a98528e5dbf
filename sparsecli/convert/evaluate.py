"""Evaluation of decoders: losses and active units on held-out text, and decoding speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from sparsecli.bench.bytes_read import bits_per_weight, bytes_per_token
from sparsecli.bench.decoders import PromptReader, TimedDecoder
from sparsecli.bench.decoders.native import NativeDecoder
from sparsecli.bench.host import bandwidth
from sparsecli.bench.result import Spread
from sparsecli.bench.timing import Timing, measure, spread
from sparsecli.console import progress
from sparsecli.data.packing import Windows
from sparsecli.decode.engine import Engine
from sparsecli.decode.packed.folder import pack_folder
from sparsecli.decode.packed.pack import PackedModel
from sparsecli.decode.packed.precision import Precision
from sparsecli.evaluate.losses import engine_losses
from sparsecli.spec.model import ModelSpec

CONTEXT = 64  # tokens before the first that is timed
STEPS, WARMUP = 8, 2
PROMPT = 256  # tokens of a timed prompt
PROMPT_ROUNDS = 3

# -- models as they decode -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOutResult:
    """Losses and active units on held-out text, as a decoder computed them."""

    losses: np.ndarray
    """Mean loss of every window (W,), nats/token."""
    kept_fractions: list[float] | None
    """By layer: share of the units that were computed in full, as the kernels counted them; None for dense layers."""


class Contender(Protocol):
    """A model that is decoded and timed beside others."""

    @property
    def name(self) -> str:
        """Name of its row."""

    @property
    def spec(self) -> ModelSpec:
        """Its architecture."""

    def bytes_per_token(self, kept_fractions: Sequence[float] | None) -> int:
        """Bytes of weights that a decoded token reads, with the counted shares of units by layer, where known."""

    def bits_per_weight(self, kept_fractions: Sequence[float] | None) -> float:
        """Bits of each weight that a decoded token reads, on average: see `bytes_read.bits_per_weight`."""

    @property
    def settings(self) -> str:
        """The settings of another program; empty for our engine."""

    def evaluate(self, windows: Windows) -> HeldOutResult:
        """Losses of every window, and counted units."""

    def loaded(
        self, positions: int, prompt: int
    ) -> AbstractContextManager[tuple[TimedDecoder, TimedDecoder]]:
        """A context manager with a decoder for `positions` tokens, and one for prompts of `prompt` tokens."""


@dataclass(frozen=True)
class NativeContender:
    """A model folder in our engine: see `Contender`."""

    name: str
    folder: Path
    spec: ModelSpec
    precision: Precision
    settings: str = ""
    threads: int | None = None
    """Threads of the decoders; by default one for each processor."""

    def pack(self) -> PackedModel:
        """Its weights in memory, in the engine's layout."""
        return pack_folder(self.folder, self.spec, self.precision)

    def bytes_per_token(self, kept_fractions: Sequence[float] | None) -> int:
        """See `Contender.bytes_per_token`."""
        return bytes_per_token(self.spec, self.precision, context=0, shares=kept_fractions)

    def bits_per_weight(self, kept_fractions: Sequence[float] | None) -> float:
        """See `Contender.bits_per_weight`."""
        return bits_per_weight(self.spec, self.precision, shares=kept_fractions)

    def evaluate(self, windows: Windows) -> HeldOutResult:
        """See `Contender.evaluate`."""
        with closing(Engine(self.pack())) as engine:
            engine.counts()
            with progress(f"evaluating {self.name} in the engine", len(windows)) as bar:
                losses = engine_losses(engine, windows, bar)
            kept = None
            if self.spec.feed_forward.kind != "dense":
                units = self.spec.feed_forward.d_ff
                kept = [active / (units * tokens) for active, tokens in engine.counts()]
            return HeldOutResult(losses, kept)

    @contextmanager
    def loaded(self, positions: int, prompt: int) -> Iterator[tuple[TimedDecoder, TimedDecoder]]:
        """See `Contender.loaded`."""
        with closing(Engine(self.pack(), self.threads)) as engine:
            yield NativeDecoder(engine, positions), NativeDecoder(engine, prompt)


# -- speed ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodingSpeed:
    """Times over all rounds."""

    decode_ms: Spread
    """Of a decoded token."""
    prompt_ms: Spread
    """Of a prompt, per token."""


def measure_speed(
    contenders: Sequence[Contender], rounds: int, seed: int
) -> tuple[list[DecodingSpeed], float]:
    """Times of all contenders, interleaved in every round, and the memory bandwidth (GB/s) after them."""
    with ExitStack() as stack:
        decoding, reading = [], []
        loading = stack.enter_context(progress("loading the models to measure", len(contenders)))
        for contender in contenders:
            spec = contender.spec
            vocabulary, layers = spec.vocabulary.size, spec.layers
            length = min(PROMPT, spec.max_positions)
            context, warmup, steps = timed_lengths(spec.max_positions)
            decoder, reader = stack.enter_context(contender.loaded(context + warmup + steps, length))
            decoding.append(Timing(decoder, vocabulary, layers, layers, context, steps, warmup))
            prompt = PromptReader(reader, vocabulary)
            reading.append(Timing(prompt, vocabulary, layers, layers, length, 1, 0, tokens=length))
            loading.advance()
        measurements = (rounds + 1) + (PROMPT_ROUNDS + 1)
        with progress("measuring speed", len(contenders) * measurements) as bar:
            measure(decoding, rounds, seed, bar)
            measure(reading, PROMPT_ROUNDS, seed, bar)
        pairs = zip(decoding, reading, strict=True)
        times = [DecodingSpeed(spread(token.token_ms), spread(prompt.token_ms)) for token, prompt in pairs]
        return times, bandwidth()


def timed_lengths(positions: int) -> tuple[int, int, int]:
    """Tokens of context, warm-up and timing: fewer for a model with few `positions`, of which it has at least two."""
    warmup = min(WARMUP, positions - 2)
    steps = min(STEPS, positions - warmup - 1)
    return min(CONTEXT, positions - warmup - steps), warmup, steps
