"""torch.compile: our own model's step with caches of fixed size, its weights frozen into the compiled code."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
import torch._inductor.config as inductor
from torch import Tensor

from sparsecli.bench.peers.decode_step import FixedStep
from sparsecli.spec.model import ModelSpec


def refusal(spec: ModelSpec, dtype: str) -> str | None:
    """See `PeerModule.refusal`."""
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        return f"torch {torch.__version__} cannot keep compiled models apart; install a newer one"
    return None


def load(
    spec: ModelSpec, weights: Mapping[str, Tensor], dtype: str, capacity: int, threads: int
) -> TorchCompileDecoder:
    """See `PeerModule.load`. Compilation takes about a minute."""
    return TorchCompileDecoder(FixedStep(spec, weights), capacity, threads)


class TorchCompileDecoder:
    """See `PeerDecoder`."""

    def __init__(self, step: FixedStep, capacity: int, threads: int) -> None:
        self.threads = threads
        self.settings = f"torch {torch.__version__}, threads {threads}, inductor, frozen weights, fixed cache"
        self.caches = step.new_caches(capacity)
        self.fresh = [cache.clone() for cache in self.caches]
        self.prompt = self.fresh
        self.context = self.position = 0
        # Without isolation every row would add a variant of the same function, among which each call would search.
        self.compiled = torch.compile(  # type: ignore[call-overload]  # its overloads lack the option
            step, fullgraph=True, dynamic=False, isolate_recompiles=True
        )
        # Freezing packs matrices for oneDNN. It must be set for the whole process while compiling: as an option of
        # torch.compile it is read too late, and weights stay arguments.
        with inductor.patch(freezing=True):
            self.prefill([0])

    def prefill(self, tokens: Sequence[int]) -> None:
        """See `PeerDecoder.prefill`; token by token."""
        self.prompt, self.context = self.fresh, 0
        self.rewind()
        for token in tokens:
            self.step(token)
        self.prompt, self.context = [cache.clone() for cache in self.caches], self.position

    def rewind(self) -> None:
        """See `PeerDecoder.rewind`."""
        torch.set_num_threads(self.threads)
        for cache, held in zip(self.caches, self.prompt, strict=True):
            cache.copy_(held)
        self.position = self.context

    @torch.no_grad()  # not inference mode, which freezing does not support
    def step(self, token: int) -> tuple[int, None]:
        """See `PeerDecoder.step`."""
        following, *_ = self.compiled(torch.tensor([[token]]), torch.tensor([self.position]), *self.caches)
        self.position += 1
        return int(following), None
