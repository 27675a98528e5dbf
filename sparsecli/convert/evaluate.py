"""Evaluation: held-out losses in PyTorch and in the engine, paired differences from dense, and decoding speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F

from sparsecli.bench.bytes_read import bytes_per_token
from sparsecli.bench.decoders import PromptReader, TimedDecoder
from sparsecli.bench.decoders.native import NativeDecoder
from sparsecli.bench.host import bandwidth
from sparsecli.bench.result import Spread
from sparsecli.bench.timing import Timing, measure, spread
from sparsecli.console import Progress, progress
from sparsecli.data.packing import Windows
from sparsecli.decode.engine import Engine
from sparsecli.decode.packed.folder import pack_folder
from sparsecli.decode.packed.pack import PackedModel
from sparsecli.decode.packed.precision import Precision
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.spec.model import ModelSpec

WINDOWS_PER_BATCH = 4
CONTEXT = 64  # tokens before the first that is timed
STEPS, WARMUP = 8, 2
PROMPT = 256  # tokens of a timed prompt
PROMPT_ROUNDS = 3

# -- loss ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def window_losses(
    model: ScalingTransformerForCausalLM, windows: Windows, description: str = "evaluating"
) -> np.ndarray:
    """Mean loss (nats/token) of every window (W,) in PyTorch, computed in float32.

    Args:
        description: label of the progress bar.
    """
    found = []
    with progress(description, len(windows)) as bar:
        for start in range(0, len(windows), WINDOWS_PER_BATCH):
            batch = range(start, min(start + WINDOWS_PER_BATCH, len(windows)))
            ids = torch.stack([windows[index]["input_ids"] for index in batch])
            logits = model(ids, use_cache=False).logits
            for row, tokens in zip(logits, ids, strict=True):
                found.append(F.cross_entropy(row[:-1].float(), tokens[1:]).item())
            bar.advance(len(batch))
    return np.array(found)


def engine_losses(engine: Engine, windows: Windows, bar: Progress) -> np.ndarray:
    """Mean loss (nats/token) of every window (W,) in the engine, which reads each as a prompt."""
    sequence = engine.sequence(windows.sequence_length)

    def logits(tokens: list[int]) -> np.ndarray:
        sequence.truncate(0)
        return engine.logits(sequence, tokens)

    found = prompt_losses(logits, windows, bar)
    sequence.close()
    return found


def prompt_losses(
    read_logits: Callable[[list[int]], np.ndarray], windows: Windows, bar: Progress
) -> np.ndarray:
    """Mean loss (nats/token) of every window (W,).

    Args:
        read_logits: gives the logits (T, vocabulary) after each of T tokens.
    """
    found = []
    for index in range(len(windows)):
        tokens = windows[index]["input_ids"].tolist()
        logits = read_logits(tokens[:-1])
        top = logits.max(axis=1)
        total = np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)) + top
        found.append(float((total - logits[np.arange(len(logits)), tokens[1:]]).mean()))
        bar.advance()
    return np.array(found)


@dataclass(frozen=True)
class HeldOutLoss:
    """Held-out loss of a model, paired with the dense model's on the same windows."""

    nats_per_token: float
    increase: float
    """Over the dense model's loss, nats/token."""
    standard_error: float | None
    """Of `increase`, from the differences of windows; None for a single window."""

    @classmethod
    def paired(cls, losses: np.ndarray, dense: np.ndarray) -> HeldOutLoss:
        """From mean losses of windows (W,)."""
        differences = losses - dense
        count = len(differences)
        error = float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else None
        return cls(float(losses.mean()), float(differences.mean()), error)

    @property
    def perplexity_increase(self) -> float:
        """Increase of the perplexity, as a share of the dense model's."""
        return math.expm1(self.increase)

    @property
    def relative_increase(self) -> float:
        """Increase of the loss, as a share of the dense model's."""
        return self.increase / (self.nats_per_token - self.increase)

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" (± {self.standard_error:.2%})"
        return f"{self.perplexity_increase:+z.2%} perplexity{error}"


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

    @property
    def settings(self) -> str:
        """The settings of another program; empty for our engine."""

    def evaluate(self, windows: Windows) -> HeldOutResult:
        """Losses of every window, and counted units."""

    def loaded(
        self, positions: int, prompt: int
    ) -> AbstractContextManager[tuple[TimedDecoder, TimedDecoder]]:
        """A decoder for `positions` tokens, and one for prompts of `prompt` tokens, until the context ends."""


@dataclass(frozen=True)
class NativeContender:
    """A model folder in our engine: see `Contender`."""

    name: str
    folder: Path
    spec: ModelSpec
    precision: Precision
    settings: str = ""

    def pack(self) -> PackedModel:
        """Its weights in memory, in the engine's layout."""
        return pack_folder(self.folder, self.spec, self.precision)

    def bytes_per_token(self, kept_fractions: Sequence[float] | None) -> int:
        """See `Contender.bytes_per_token`."""
        return bytes_per_token(self.spec, self.precision, context=0, shares=kept_fractions)

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
        with closing(Engine(self.pack())) as engine:
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
