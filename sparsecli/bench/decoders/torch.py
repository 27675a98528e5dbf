"""The PyTorch decoder: the model in eager mode, as `transformers` runs it, with the preallocated cache; and what reads
images with it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from sparsecli.bench.decoders import others
from sparsecli.bench.random_weights import empty_model
from sparsecli.model import DecodeCache
from sparsecli.spec.model import ModelSpec
from sparsecli.spec.vision import CHANNELS, AnySpec, VisionSpec


class TorchModel:
    """A model that uses the given weights without a copy. `profile` times attention, feed-forward and head."""

    def __init__(self, spec: AnySpec, weights: Mapping[str, torch.Tensor], profile: bool = False) -> None:
        self.spec = spec
        self.network = empty_model(spec)
        unknown = self.network.load_state_dict(dict(weights), strict=False, assign=True).unexpected_keys
        assert not unknown, unknown
        self.network.tie_weights()
        self.network.eval()
        self.stack = _Stopwatch()
        blocks = self.network.model.layers
        # Not the blocks themselves: reversible blocks are run in halves.
        last = "feed_forward" if getattr(spec, "sru", None) is None else "sru"
        self.stack.watch(blocks[0].get_submodule("attention_norm"), blocks[-1].get_submodule(last))
        self.parts: dict[str, _Stopwatch] = {}
        if profile:
            self.parts = {name: _Stopwatch() for name in ("attention", "feed-forward", "head")}
            for block in blocks:
                for name, layer in block.named_children():
                    if name.endswith("attention"):  # there may be two
                        self.parts["attention"].watch(layer)
                self.parts["feed-forward"].watch(block.get_submodule("feed_forward"))
            self.parts["head"].watch(self.network.head)


class _Stopwatch:
    """Nanoseconds from entering one module to leaving another."""

    total = started = 0

    def watch(self, first: nn.Module, last: nn.Module | None = None) -> None:
        first.register_forward_pre_hook(self._start)
        (last or first).register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self.started = time.perf_counter_ns()

    def _stop(self, *_: object) -> None:
        self.total += time.perf_counter_ns() - self.started

    def read(self) -> int:
        """The sum since the last reading."""
        total, self.total = self.total, 0
        return total


class TorchDecoder:
    """One sequence, or a batch of sequences with prompts of the same length: see `TimedDecoder`."""

    def __init__(self, model: TorchModel, threads: int, capacity: int, batch: int = 1) -> None:
        assert isinstance(model.spec, ModelSpec)
        self.model, self.threads, self.batch = model, threads, batch
        self.vocabulary = model.spec.vocabulary.size
        self.cache = DecodeCache.for_model(model.spec, capacity)
        self.context = 0
        self.next: list[int] = []

    def prefill(self, tokens: Sequence[int]) -> None:
        """See `TimedDecoder.prefill`; every sequence of a batch has other tokens."""
        torch.set_num_threads(self.threads)
        self.cache.reset()
        size = self.vocabulary
        self._forward([[others(token, index, size) for token in tokens] for index in range(self.batch)])
        self.context = len(tokens)

    def rewind(self) -> None:
        """See `TimedDecoder.rewind`."""
        torch.set_num_threads(self.threads)
        self.cache.crop(self.context - self.cache.get_seq_length())
        self.next = []

    def step(self, token: int) -> tuple[int, int]:
        """See `TimedDecoder.step`. The other sequences of a batch continue with their own greedy tokens."""
        size = self.vocabulary
        added = self.next or [others(token, index, size) for index in range(self.batch)]
        self.model.stack.read()
        found = self._forward([[each] for each in added]).argmax(-1).tolist()
        if self.batch > 1:
            self.next = found
        return found[0], self.model.stack.read()

    def profile(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        return {name: watch.read() / 1e9 for name, watch in self.model.parts.items()}

    @torch.inference_mode()
    def _forward(self, tokens: list[list[int]]) -> torch.Tensor:
        """Logits (B, V) after the last of `tokens` (B, T)."""
        output = self.model.network(
            torch.tensor(tokens), past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return output.logits[:, -1]


IMAGES = 4
"""Batches of different images that turns read, one after the other."""


class ImageReader:
    """Classifies a batch of images in each step: see `TimedDecoder`, whose tokens are numbers of batches here."""

    def __init__(self, model: TorchModel, threads: int, batch: int) -> None:
        assert isinstance(model.spec, VisionSpec)
        self.model, self.threads = model, threads
        shape = IMAGES, batch, CHANNELS, model.spec.image_size, model.spec.image_size
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(shape, generator=generator).to(model.network.dtype)

    def prefill(self, tokens: Sequence[int]) -> None:
        """Images follow nothing."""

    def rewind(self) -> None:
        """See `TimedDecoder.rewind`."""
        torch.set_num_threads(self.threads)

    @torch.inference_mode()
    def step(self, token: int) -> tuple[int, int]:
        """Classify the batch `token`, taken around the end. Returns the number of the next one."""
        self.model.stack.read()
        self.model.network(pixel_values=self.images[token % IMAGES]).logits.argmax(dim=-1)
        return token + 1, self.model.stack.read()

    def profile(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        return {name: watch.read() / 1e9 for name, watch in self.model.parts.items()}
