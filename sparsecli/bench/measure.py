"""Single-token decoding, timed: backends, and turns of all rows interleaved."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from sparsecli.bench.report import Settings, Spread, Times
from sparsecli.bench.variants import empty_model
from sparsecli.console import Progress
from sparsecli.model import DecodeCache
from sparsecli.model.architecture import ModelSpec

PERCENTILES = (10, 50, 90)


class Decoder(Protocol):
    """A loaded model with its cache, for one sequence."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """Start the sequence with these tokens."""

    def rewind(self) -> None:
        """Forget every token after the prefill."""

    def step(self, token: int) -> tuple[int, int]:
        """Add one token; the greedy next one, and the nanoseconds that the block stack took."""


class Backend(Protocol):
    """Something that decodes."""

    name: str

    def load(
        self, spec: ModelSpec, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, capacity: int
    ) -> Decoder:
        """A decoder with room for `capacity` tokens. `weights` may be used in place."""


# -- the PyTorch backend -------------------------------------------------------------------------------------


class TorchBackend:
    """The model as `generate` runs it: eager PyTorch with the preallocated cache."""

    name = "torch"

    def load(
        self, spec: ModelSpec, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, capacity: int
    ) -> Decoder:
        """See `Backend.load`."""
        return TorchDecoder(spec, weights, dtype, capacity)


class TorchDecoder:
    """See `Decoder`."""

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, capacity: int
    ) -> None:
        self.model = empty_model(spec)
        unknown = self.model.load_state_dict(dict(weights), strict=False, assign=True).unexpected_keys
        assert not unknown, unknown
        self.model.tie_weights()
        self.model.eval()
        self.cache = DecodeCache(spec.layers, capacity)
        self.context = self.entered = self.left = 0
        blocks = self.model.model.blocks
        blocks[0].register_forward_pre_hook(self._enter)
        blocks[-1].register_forward_hook(self._leave)

    def _enter(self, *_: object) -> None:
        self.entered = time.perf_counter_ns()

    def _leave(self, *_: object) -> None:
        self.left = time.perf_counter_ns()

    def prefill(self, tokens: Sequence[int]) -> None:
        """See `Decoder.prefill`."""
        self.cache.reset()
        self._forward(tokens)
        self.context = len(tokens)

    def rewind(self) -> None:
        """See `Decoder.rewind`."""
        self.cache.crop(self.context - self.cache.get_seq_length())

    def step(self, token: int) -> tuple[int, int]:
        """See `Decoder.step`."""
        return int(self._forward([token]).argmax()), self.left - self.entered

    @torch.inference_mode()
    def _forward(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits (V) after the last of `tokens`."""
        output = self.model(
            torch.tensor([tokens]), past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return output.logits[0, -1]


BACKENDS: dict[str, Backend] = {"torch": TorchBackend()}


# -- turns ---------------------------------------------------------------------------------------------------


@dataclass
class Turn:
    """A row while it is measured; `samples` fill up round after round."""

    decoder: Decoder
    vocabulary: int
    layers: int  # of the whole model
    measured_layers: int  # that the decoder has
    token_ns: list[int] = field(default_factory=list)
    block_stack_ns: list[int] = field(default_factory=list)

    @property
    def token_ms(self) -> np.ndarray:
        """Milliseconds of every measured token; missing blocks cost what the measured ones did."""
        stack = np.array(self.block_stack_ns, dtype=np.float64)
        missing = self.layers / self.measured_layers - 1
        return (np.array(self.token_ns) + missing * stack) / 1e6

    @property
    def block_ms(self) -> np.ndarray:
        """Milliseconds a block of every measured token."""
        return np.array(self.block_stack_ns) / self.measured_layers / 1e6


def measure(turns: Sequence[Turn], settings: Settings, seed: int, progress: Progress) -> None:
    """Give every row its turn, `settings.rounds` times over, so that a disturbance hits all rows alike.

    A turn starts from the same cached context every time, with a token that is new in every round: greedy
    decoding from the same token would read the same units in every round.
    """
    random = np.random.default_rng(seed)
    # Tokens as fractions of the vocabulary, whose size may differ from row to row.
    fractions = random.random(settings.context + settings.rounds)
    prompt, starts = np.split(fractions, [settings.context])
    for turn in turns:
        turn.decoder.prefill([int(fraction * turn.vocabulary) for fraction in prompt])
        progress.advance()
    for start in starts:
        for turn in turns:
            _take(turn, int(start * turn.vocabulary), settings)
            progress.advance()


def _take(turn: Turn, token: int, settings: Settings) -> None:
    """Warm up, then time every token; the garbage collector waits meanwhile."""
    decoder = turn.decoder
    decoder.rewind()
    gc.collect()
    gc.disable()
    try:
        for _ in range(settings.warmup_tokens):
            token, _ = decoder.step(token)
        for _ in range(settings.tokens_per_round):
            start = time.perf_counter_ns()
            token, stack = decoder.step(token)
            turn.token_ns.append(time.perf_counter_ns() - start)
            turn.block_stack_ns.append(stack)
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
