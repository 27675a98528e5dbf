"""The dense model and the converted one as they decode: loss and speed through the engine, interleaved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsecli.bench.measure import PromptReader, Turn, measure, spread
from sparsecli.bench.native_decoder import NativeDecoder
from sparsecli.bench.report import Spread
from sparsecli.bench.roofline import bandwidth
from sparsecli.bench.traffic import bytes_per_token
from sparsecli.console import progress
from sparsecli.convert.evaluation import engine_losses
from sparsecli.data.packing import Windows
from sparsecli.decode.engine import Engine
from sparsecli.decode.packing import PackedModel, Precision
from sparsecli.decode.weights import pack_folder
from sparsecli.model.architecture import ModelSpec

CONTEXT = 64  # tokens before the first that is timed
STEPS, WARMUP = 8, 2
PROMPT = 256  # tokens of a timed prompt


@dataclass(frozen=True)
class Contender:
    """A model on disk as it will be decoded."""

    name: str
    folder: Path
    spec: ModelSpec
    precision: Precision

    def pack(self) -> PackedModel:
        """Its weights in memory, as the engine reads them."""
        return pack_folder(self.folder, self.spec, self.precision)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a decoded token reads."""
        return bytes_per_token(self.spec, self.precision, context=0)


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


def decode(contender: Contender, windows: Windows) -> Decoded:
    """Losses of every window and counted units."""
    engine = Engine(contender.pack())
    try:
        engine.counts()
        with progress(f"checking {contender.name} in the engine", len(windows)) as bar:
            losses = engine_losses(engine, windows, bar)
        kept = None
        if contender.spec.feed_forward.kind != "dense":
            units = contender.spec.feed_forward.d_ff
            kept = [chosen / (units * tokens) for chosen, tokens in engine.counts()]
        return Decoded(losses, kept)
    finally:
        engine.close()


def speeds(contenders: Sequence[Contender], rounds: int, seed: int) -> tuple[list[Speed], float]:
    """Times of all contenders, each getting its turn in every round, and the bandwidth in GB/s after them."""
    engines = [Engine(contender.pack()) for contender in contenders]
    try:
        decoding, reading = [], []
        for engine, contender in zip(engines, contenders, strict=True):
            layers = contender.spec.layers
            decoder = NativeDecoder(engine, min(CONTEXT + STEPS + WARMUP, contender.spec.max_positions))
            decoding.append(
                Turn(decoder, engine.vocabulary, layers, layers, _context(contender), STEPS, WARMUP)
            )
            length = min(PROMPT, contender.spec.max_positions)
            reader = PromptReader(NativeDecoder(engine, length), engine.vocabulary)
            reading.append(Turn(reader, engine.vocabulary, layers, layers, length, 1, 0, tokens=length))
        with progress("measuring speed", len(engines) * (rounds + 1) + len(engines) * 4) as bar:
            measure(decoding, rounds, seed, bar)
            measure(reading, 3, seed, bar)
        pairs = zip(decoding, reading, strict=True)
        return [Speed(spread(turn.token_ms), spread(prompt.token_ms)) for turn, prompt in pairs], bandwidth()
    finally:
        for engine in engines:
            engine.close()


def _context(contender: Contender) -> int:
    return max(1, min(CONTEXT, contender.spec.max_positions - STEPS - WARMUP))
