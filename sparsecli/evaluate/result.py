"""The result of an evaluation: losses of a model, and the difference to another model's on the same text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.evaluate.losses import HeldOutLoss, bits_per_byte
from sparsecli.evaluate.text import TokenizedText

LARGEST_LOSS = 700.0
"""Nats/token, above which the perplexity is not a float."""


@dataclass(frozen=True)
class ModelLoss:
    """Loss of a model on windows of a text."""

    model: str
    backend: str
    isa: str
    threads: int
    dtype: str
    cache_dtype: str
    windows: int
    tokens: int
    """Predicted tokens."""
    nats_per_token: float
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True)
class Difference:
    """A model's loss minus another's, with the standard error of the mean, on the same windows or bytes."""

    unit: Literal["nats/token", "bits/byte"]
    value: float
    standard_error: float | None
    """None for a single window."""
    perplexity_increase: float | None
    """Share of the other model's perplexity; None in bits per byte."""
    windows: int
    """Pairs that are compared: windows, or the spans of text in which both models predict every byte."""
    bytes: int | None = None
    """Bytes that are compared; None where the windows are the same tokens."""


@dataclass(frozen=True)
class Evaluation:
    """The result of the command."""

    text: str
    window: int
    loss: ModelLoss
    against: ModelLoss | None = None
    difference: Difference | None = None

    def show(self, json: bool) -> None:
        """Write it to stdout."""
        if json:
            console.json_out(self.to_json())
            return
        rows = [loss for loss in (self.loss, self.against) if loss]
        console.print_table(
            ["model", "weights", "nats/token", "perplexity", "bits/byte", "tokens", "windows"],
            [
                (
                    row.model,
                    row.dtype,
                    f"{row.nats_per_token:.4f}",
                    f"{row.perplexity:.4g}",
                    f"{row.bits_per_byte:.4f}",
                    f"{row.tokens:,}",
                    f"{row.windows:,}",
                )
                for row in rows
            ],
        )
        if self.difference:
            console.out(describe(self.difference))

    def to_json(self) -> dict[str, Any]:
        """The JSON document."""
        found: dict[str, Any] = {"text": self.text, "window": self.window, **asdict(self.loss)}
        if self.against and self.difference:
            found |= {"against": asdict(self.against), "difference": asdict(self.difference)}
        return found


def describe(difference: Difference) -> str:
    """The difference as a line."""
    error = difference.standard_error
    text = (
        f"difference: {difference.value:+z.4f}{'' if error is None else f' ± {error:.4f}'} {difference.unit}"
    )
    if difference.perplexity_increase is not None:
        share = "" if error is None else f" ± {error:.2%}"
        return f"{text}, {difference.perplexity_increase:+z.2%}{share} perplexity, over {difference.windows:,} windows"
    return f"{text}, over {difference.bytes:,} bytes in {difference.windows:,} spans of text"


@dataclass(frozen=True)
class Scored:
    """A text and a model's losses on windows of it."""

    losses: np.ndarray
    """Of every predicted token (W, T - 1), nats."""
    text: TokenizedText
    stride: int
    """Tokens of the text in a window; the window may begin with other tokens."""

    def __post_init__(self) -> None:
        nats = self.losses.mean()
        if not nats <= LARGEST_LOSS:
            raise Failure(f"the loss is {nats:g} nats/token; the model's weights are damaged")

    @property
    def window_ends(self) -> np.ndarray:
        """Bytes of the text before the end of each window (W,)."""
        return self.text.ends[self.stride - 1 : self.stride * len(self.losses) : self.stride]

    @property
    def nats_per_token(self) -> float:
        """Mean over all predicted tokens."""
        return float(self.losses.mean(axis=1).mean())

    @property
    def bits_per_byte(self) -> float:
        """The loss for each byte of the windows' text."""
        size = int(self.window_ends[-1])
        if not size:
            raise Failure("the first windows hold no text; give another text")
        return bits_per_byte(self.nats_per_token, size / (len(self.losses) * self.stride))

    def cumulative(self) -> _Cumulative:
        """Sums up to each place where a token ends."""
        by_token = np.full(len(self.text.tokens), np.nan)
        windows, predicted = self.losses.shape
        rows = by_token[: windows * self.stride].reshape(windows, self.stride)
        count = min(predicted, self.stride)
        rows[:, self.stride - count :] = self.losses[:, predicted - count :]
        ends, from_last = np.unique(self.text.ends[::-1], return_index=True)
        last = len(by_token) - 1 - from_last  # of the tokens that end there
        nats, missing = np.cumsum(np.nan_to_num(by_token))[last], np.cumsum(np.isnan(by_token))[last]
        if ends[0]:
            ends, nats, missing = (np.concatenate(([0], values)) for values in (ends, nats, missing))
        return _Cumulative(ends, nats, missing)


@dataclass(frozen=True)
class _Cumulative:
    """Sums over the tokens of a text up to each place where one ends, and before the text."""

    ends: np.ndarray
    """Bytes before the place (P,), rising from 0."""
    nats: np.ndarray
    missing: np.ndarray
    """Tokens that were not predicted."""

    def between(self, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nats and missing tokens between neighbours of `cuts`, some of the ends (C,): each (C - 1,)."""
        at = np.searchsorted(self.ends, cuts)
        return np.diff(self.nats[at]), np.diff(self.missing[at])


def paired_by_window(scored: Scored, other: Scored) -> Difference:
    """The difference of two models that read the same windows."""
    paired = HeldOutLoss.paired(scored.losses.mean(axis=1), other.losses.mean(axis=1))
    error, count = paired.standard_error, len(scored.losses)
    return Difference("nats/token", paired.increase, error, paired.perplexity_increase, count)


def paired_by_text(scored: Scored, other: Scored) -> Difference:
    """The difference of two models that read the same text as different tokens, in bits per byte.

    The text is cut where tokens of both models end. Pieces count in which both models predict every token. The
    standard error is taken over spans: the pieces that end in one window of the first model.

    Raises:
        Failure: there is no such piece.
    """
    first, second = scored.cumulative(), other.cumulative()
    cuts = np.intersect1d(first.ends, second.ends)
    (nats, missing), (other_nats, other_missing) = first.between(cuts), second.between(cuts)
    kept = (missing == 0) & (other_missing == 0)
    if not kept.any():
        raise Failure("the models predict no piece of the text in common; give more text")
    span = np.searchsorted(scored.window_ends, cuts[1:][kept])
    bits = np.bincount(span, (nats - other_nats)[kept] / math.log(2))
    sizes = np.bincount(span, np.diff(cuts)[kept])
    bits, sizes = bits[sizes > 0], sizes[sizes > 0]
    count, mean = len(bits), float(bits.sum() / sizes.sum())
    error = None
    if count > 1:  # of a ratio of two sums
        rest = bits - mean * sizes
        error = math.sqrt((rest**2).sum() / (count * (count - 1))) / float(sizes.mean())
    return Difference("bits/byte", mean, error, None, count, int(sizes.sum()))
