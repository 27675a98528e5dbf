"""The dense model and the converted one as they decode: loss and speed, interleaved, other programs' too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from sparsecli.bench.bytes_read import bytes_per_token
from sparsecli.bench.decoders import PromptReader, TimedDecoder
from sparsecli.bench.decoders.native import NativeDecoder
from sparsecli.bench.host import bandwidth
from sparsecli.bench.result import Spread
from sparsecli.bench.timing import Timing, measure, spread
from sparsecli.console import progress
from sparsecli.convert.evaluation import engine_losses
from sparsecli.data.packing import Windows
from sparsecli.decode.engine import Engine
from sparsecli.decode.packed.folder import pack_folder
from sparsecli.decode.packed.pack import PackedModel
from sparsecli.decode.packed.precision import Precision
from sparsecli.spec.model import ModelSpec

CONTEXT = 64  # tokens before the first that is timed
STEPS, WARMUP = 8, 2
PROMPT = 256  # tokens of a timed prompt


@dataclass(frozen=True)
class Speed:
    """Measured times, medians of all rounds; a prompt's are for each of its tokens."""

    decode_ms: Spread
    prompt_ms: Spread


@dataclass(frozen=True)
class Decoded:
    """What the engine computed on held-out text."""

    losses: np.ndarray
    kept_fractions: list[float] | None
    """By layer: share of the units that were computed in full, as the kernels counted them; None for dense layers."""


class Contender(Protocol):
    """A model as it will be decoded."""

    @property
    def name(self) -> str:
        """What its row is called."""

    @property
    def spec(self) -> ModelSpec:
        """Its architecture."""

    def bytes_per_token(self, shares: Sequence[float] | None) -> int:
        """Bytes of weights that a decoded token reads; `shares` of the units by block, where they were counted."""

    @property
    def settings(self) -> str:
        """What there is to say of how another program runs it; empty for our own."""

    def decode(self, windows: Windows) -> Decoded:
        """Losses of every window and counted units."""

    def loaded(
        self, positions: int, prompt: int
    ) -> AbstractContextManager[tuple[TimedDecoder, TimedDecoder]]:
        """What decodes `positions` tokens, and what reads prompts of `prompt` tokens, until the context ends."""


@dataclass(frozen=True)
class OwnContender:
    """A model on disk, in our engine: see `Contender`."""

    name: str
    folder: Path
    spec: ModelSpec
    precision: Precision
    settings: str = ""

    def pack(self) -> PackedModel:
        """Its weights in memory, as the engine reads them."""
        return pack_folder(self.folder, self.spec, self.precision)

    def bytes_per_token(self, shares: Sequence[float] | None) -> int:
        """See `Contender.bytes_per_token`."""
        return bytes_per_token(self.spec, self.precision, context=0, shares=shares)

    def decode(self, windows: Windows) -> Decoded:
        """Losses of every window and counted units."""
        with closing(Engine(self.pack())) as engine:
            engine.counts()
            with progress(f"checking {self.name} in the engine", len(windows)) as bar:
                losses = engine_losses(engine, windows, bar)
            kept = None
            if self.spec.feed_forward.kind != "dense":
                units = self.spec.feed_forward.d_ff
                kept = [chosen / (units * tokens) for chosen, tokens in engine.counts()]
            return Decoded(losses, kept)

    @contextmanager
    def loaded(self, positions: int, prompt: int) -> Iterator[tuple[TimedDecoder, TimedDecoder]]:
        """What decodes `positions` tokens, and what reads prompts of `prompt` tokens."""
        with closing(Engine(self.pack())) as engine:
            yield NativeDecoder(engine, positions), NativeDecoder(engine, prompt)


def speeds(contenders: Sequence[Contender], rounds: int, seed: int) -> tuple[list[Speed], float]:
    """Times of all contenders, each getting its turn in every round, and the bandwidth in GB/s after them."""
    with ExitStack() as stack:
        decoding, reading = [], []
        loading = stack.enter_context(progress("loading the models to measure", len(contenders)))
        for contender in contenders:
            spec = contender.spec
            vocabulary, layers = spec.vocabulary.size, spec.layers
            length = min(PROMPT, spec.max_positions)
            context, warmup, steps = _tokens(spec.max_positions)
            decoder, reader = stack.enter_context(contender.loaded(context + warmup + steps, length))
            decoding.append(Timing(decoder, vocabulary, layers, layers, context, steps, warmup))
            prompt = PromptReader(reader, vocabulary)
            reading.append(Timing(prompt, vocabulary, layers, layers, length, 1, 0, tokens=length))
            loading.advance()
        with progress("measuring speed", len(contenders) * (rounds + 1) + len(contenders) * 4) as bar:
            measure(decoding, rounds, seed, bar)
            measure(reading, 3, seed, bar)
        pairs = zip(decoding, reading, strict=True)
        return [Speed(spread(turn.token_ms), spread(prompt.token_ms)) for turn, prompt in pairs], bandwidth()


def _tokens(positions: int) -> tuple[int, int, int]:
    """Tokens before, to warm up, and to time: fewer where a model has few `positions`, at least two of which it has."""
    warmup = min(WARMUP, positions - 2)
    steps = min(STEPS, positions - warmup - 1)
    return min(CONTEXT, positions - warmup - steps), warmup, steps
