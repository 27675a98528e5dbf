"""Sampling: the next token from logits, in numpy. Options and their order are those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparsecli.console import Failure

if TYPE_CHECKING:
    from sparsecli.recipe.schema import GenerateSpec

Logits = np.ndarray
"""(V,) float32."""
Sampler = Callable[[Sequence[int], Logits], int]
"""Maps all tokens so far and the logits after them to the next token."""


def make_sampler(options: GenerateSpec, seed: int) -> Sampler:
    """A sampler by `options`; all randomness comes from `seed`.

    The sampler raises Failure for logits that are NaN or infinite.
    """
    generator = np.random.default_rng(seed)

    def greedy(tokens: Sequence[int], logits: Logits) -> int:
        scores = penalized(logits, tokens, options.repetition_penalty)
        best = int(scores.argmax())  # the index of a NaN, if there is one
        _check(scores[best])
        return best

    def sample(tokens: Sequence[int], logits: Logits) -> int:
        return draw(distribution(tokens, logits, options), generator)

    return greedy if options.temperature == 0 else sample


def draw(weights: np.ndarray, generator: np.random.Generator) -> int:
    """An index, as likely as its share of `weights` (V,), by one random number."""
    candidates = np.flatnonzero(weights)
    cumulative = np.cumsum(weights[candidates], dtype=np.float64)
    index = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
    return int(candidates[index])


def distribution(tokens: Sequence[int], logits: Logits, options: GenerateSpec) -> np.ndarray:
    """Probabilities (V,) float32 of the next token, for a temperature above 0. Excluded tokens have zero."""
    scores = penalized(logits, tokens, options.repetition_penalty)
    # Relative to the largest, so that no low temperature overflows float32. The distribution stays the same.
    best = scores.max()  # NaN, if there is one
    _check(best)
    with np.errstate(over="ignore"):
        scores = (scores - best) / max(options.temperature, float(np.finfo(np.float32).tiny))
    weights = np.exp(scores)
    if options.top_k:
        weights = keep_top_k(weights, options.top_k)
    if options.top_p < 1:
        weights = keep_top_p(weights, options.top_p)
    if options.min_p:
        weights = keep_min_p(weights, options.min_p)
    return weights / weights.sum()


def penalized(logits: Logits, tokens: Sequence[int], penalty: float) -> Logits:
    """Logits with the repetition penalty: those of used tokens are divided by it, negative ones multiplied."""
    if penalty == 1:
        return logits
    used = np.asarray(tokens)
    scores = logits.copy()
    scores[used] = np.where(logits[used] < 0, logits[used] * penalty, logits[used] / penalty)
    return scores


def keep_top_k(weights: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest weights, with ties; zero for the others."""
    if count >= weights.size:
        return weights
    return np.where(weights < np.partition(weights, -count)[-count], 0, weights)


def keep_top_p(weights: np.ndarray, share: float) -> np.ndarray:
    """The fewest largest weights that hold `share` of the sum, with ties; zero for the others."""
    total = weights.sum(dtype=np.float64)
    # All weights below this threshold hold less than 1 - share together. They are nearly all, and need no sorting.
    descending = np.sort(weights[weights >= (1 - share) * total / weights.size])[::-1]
    before = np.cumsum(descending[:-1], dtype=np.float64)  # the sum before the second, the third, ...
    last = np.searchsorted(before, share * total, side="left")
    return np.where(weights < descending[last], 0, weights)


def keep_min_p(weights: np.ndarray, share: float) -> np.ndarray:
    """The weights of at least `share` of the largest; zero for the others."""
    return np.where(weights < share * weights.max(), 0, weights)


def _check(value: np.floating) -> None:
    if not np.isfinite(value):
        raise Failure("the model's logits are NaN or infinite; its weights are damaged")


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the probabilities of one token and of the likeliest ones, before temperature."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def logprobs_of(row: np.ndarray, token: int, top: int) -> TokenLogprobs:
    """Of `token` and of the `top` likeliest tokens, from logits (V,)."""
    largest = row.max()
    total = largest + np.log(np.exp(row - largest).sum(dtype=np.float64))
    best = np.argpartition(row, -top)[-top:] if top else np.empty(0, np.int64)
    ordered = best[np.argsort(-row[best], kind="stable")]
    return TokenLogprobs(token, float(row[token] - total), [(int(i), float(row[i] - total)) for i in ordered])
