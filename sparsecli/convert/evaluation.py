"""Held-out loss window by window, of a model in PyTorch and of packed weights in the engine; differences in pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from sparsecli.console import Progress, progress
from sparsecli.data.packing import Windows
from sparsecli.decode.engine import Engine
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM

BATCH = 4


@torch.no_grad()
def window_losses(
    model: ScalingTransformerForCausalLM, windows: Windows, description: str = "judging"
) -> np.ndarray:
    """Mean nats a token of every window (W,), of a model that decodes as it does in evaluation, in float32.

    How far it is shows as `description`.
    """
    found = []
    with progress(description, len(windows)) as bar:
        for start in range(0, len(windows), BATCH):
            batch = range(start, min(start + BATCH, len(windows)))
            ids = torch.stack([windows[index]["input_ids"] for index in batch])
            logits = model(ids, use_cache=False).logits
            for row, tokens in zip(logits, ids, strict=True):
                found.append(F.cross_entropy(row[:-1].float(), tokens[1:]).item())
            bar.advance(len(batch))
    return np.array(found)


def engine_losses(engine: Engine, windows: Windows, bar: Progress) -> np.ndarray:
    """The same of an engine, which reads every window as a prompt: (W,)."""
    sequence = engine.sequence(windows.sequence_length)

    def read(tokens: list[int]) -> np.ndarray:
        sequence.truncate(0)
        return engine.logits(sequence, tokens)

    found = prompt_losses(read, windows, bar)
    sequence.close()
    return found


def prompt_losses(read: Callable[[list[int]], np.ndarray], windows: Windows, bar: Progress) -> np.ndarray:
    """The same of whatever reads tokens (T,) and gives the logits (T, vocabulary) after each: (W,)."""
    found = []
    for index in range(len(windows)):
        tokens = windows[index]["input_ids"].tolist()
        logits = read(tokens[:-1])
        top = logits.max(axis=1)
        total = np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)) + top
        found.append(float((total - logits[np.arange(len(logits)), tokens[1:]]).mean()))
        bar.advance()
    return np.array(found)


@dataclass(frozen=True)
class Loss:
    """Held-out loss of one stage, in pairs with the dense model's on the same windows."""

    nats_per_token: float
    change: float
    """Nats a token over the dense model's."""
    standard_error: float | None
    """Of `change`, from the differences of windows; None of a single one."""

    @classmethod
    def of(cls, losses: np.ndarray, dense: np.ndarray) -> Loss:
        """From mean losses of windows (W,)."""
        differences = losses - dense
        count = len(differences)
        error = float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else None
        return cls(float(losses.mean()), float(differences.mean()), error)

    @property
    def perplexity_change(self) -> float:
        """Rise of the perplexity, as a share."""
        return math.expm1(self.change)

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" (± {self.standard_error:.2%})"
        return f"{self.perplexity_change:+z.2%} perplexity{error}"

    @property
    def loss_change(self) -> float:
        """Rise of the loss, as a share."""
        return self.change / (self.nats_per_token - self.change)
