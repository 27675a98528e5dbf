"""Losses on windows of text, in the engine and in PyTorch; and their paired differences between two models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecli.console import Progress, progress

if TYPE_CHECKING:
    from sparsecli.data.packing import Windows
    from sparsecli.decode.engine import Engine
    from sparsecli.model.causal_lm import ScalingTransformerForCausalLM

WINDOWS_PER_BATCH = 4
LOGITS_AT_ONCE = 1 << 24
"""Numbers of logits that the engine hands over in one call: 64 MB."""


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """The loss in bits for each byte of the text, which does not depend on the tokenizer."""
    return nats_per_token / math.log(2) / bytes_per_token


# -- PyTorch -------------------------------------------------------------------------------------------------


def window_losses(
    model: ScalingTransformerForCausalLM, windows: Windows, description: str = "evaluating"
) -> np.ndarray:
    """Mean loss (nats/token) of every window (W,) in PyTorch, computed in float32.

    Args:
        description: label of the progress bar.
    """
    with progress(description, len(windows)) as bar:
        rows = _predictions(model, windows, bar)
        return np.array([F.cross_entropy(logits, targets).item() for logits, targets in rows])


def network_token_losses(model: ScalingTransformerForCausalLM, windows: Windows, bar: Progress) -> np.ndarray:
    """Loss (nats) of every predicted token (W, T - 1) in PyTorch, computed in float32."""
    rows = _predictions(model, windows, bar)
    return np.stack([F.cross_entropy(logits, ids, reduction="none").numpy() for logits, ids in rows])


@torch.no_grad()
def _predictions(
    model: ScalingTransformerForCausalLM, windows: Windows, bar: Progress
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every window: logits (T - 1, V) in float32, and the tokens (T - 1,) that they predict."""
    for start in range(0, len(windows), WINDOWS_PER_BATCH):
        batch = range(start, min(start + WINDOWS_PER_BATCH, len(windows)))
        ids = torch.stack([windows[index]["input_ids"] for index in batch])
        for row, tokens in zip(model(ids, use_cache=False).logits, ids, strict=True):
            yield row[:-1].float(), tokens[1:]
        bar.advance(len(batch))


# -- the engine, and other programs that read a prompt -------------------------------------------------------


def token_losses(logits: np.ndarray, targets: np.ndarray | list[int]) -> np.ndarray:
    """Loss (nats) of every target (T,) by logits (T, V) in float32: float64 (T,)."""
    top = logits.max(axis=1)
    total = np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)) + top
    losses: np.ndarray = total - logits[np.arange(len(logits)), targets]
    return losses


def engine_token_losses(engine: Engine, windows: Windows, bar: Progress) -> np.ndarray:
    """Loss (nats) of every predicted token (W, T - 1) in the engine, which reads each window as a prompt."""
    found = []
    sequence = engine.sequence(windows.sequence_length)
    piece = max(1, LOGITS_AT_ONCE // engine.vocabulary)  # pieces of a prompt give the logits of the whole
    switch = engine.model.spec.rotary_switch
    if switch and windows.sequence_length - 1 > switch:  # unless its length decides on rotary frequencies
        piece = windows.sequence_length
    for index in range(len(windows)):
        tokens = windows[index]["input_ids"].tolist()
        sequence.truncate(0)
        parts = []
        for start in range(0, len(tokens) - 1, piece):
            read = tokens[start : min(start + piece, len(tokens) - 1)]
            targets = tokens[start + 1 : start + 1 + len(read)]
            parts.append(token_losses(engine.logits(sequence, read), targets))
        found.append(np.concatenate(parts))
        bar.advance()
    sequence.close()
    return np.stack(found)


def engine_losses(engine: Engine, windows: Windows, bar: Progress) -> np.ndarray:
    """Mean loss (nats/token) of every window (W,) in the engine, which reads each as a prompt."""
    means: np.ndarray = engine_token_losses(engine, windows, bar).mean(axis=1)
    return means


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
        found.append(float(token_losses(read_logits(tokens[:-1]), tokens[1:]).mean()))
        bar.advance()
    return np.array(found)


# -- differences ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss of a model, paired with another model's (in a conversion: the dense one's) on the same windows."""

    nats_per_token: float
    increase: float
    """Over the other model's loss, nats/token."""
    standard_error: float | None
    """Of `increase`, from the differences of windows; None for a single window."""

    @classmethod
    def paired(cls, losses: np.ndarray, other: np.ndarray) -> HeldOutLoss:
        """From mean losses of windows (W,)."""
        differences = losses - other
        count = len(differences)
        error = float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else None
        return cls(float(losses.mean()), float(differences.mean()), error)

    @property
    def perplexity_increase(self) -> float:
        """Increase of the perplexity, as a share of the other model's."""
        return math.expm1(self.increase)

    @property
    def relative_increase(self) -> float:
        """Increase of the loss, as a share of the other model's."""
        return self.increase / (self.nats_per_token - self.increase)

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" (± {self.standard_error:.2%})"
        return f"{self.perplexity_increase:+z.2%} perplexity{error}"
