"""The next token from logits, on numpy alone: the same options, in the same order, as transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparsecli.console import Failure

if TYPE_CHECKING:
    from sparsecli.recipe.schema import GenerateSpec

Logits = np.ndarray
"""(V,) float32."""
Sampler = Callable[[Sequence[int], Logits], int]
"""From all tokens so far and the logits after them to the next token."""


def make_sampler(options: GenerateSpec, seed: int) -> Sampler:
    """A sampler by `options`; all randomness comes from `seed`.

    The sampler raises Failure where the logits are no numbers, as those of a damaged model.
    """
    generator = np.random.default_rng(seed)

    def greedy(tokens: Sequence[int], logits: Logits) -> int:
        scores = penalized(logits, tokens, options.repetition_penalty)
        best = int(scores.argmax())  # of a NaN, where there is one
        _check(scores[best])
        return best

    def sample(tokens: Sequence[int], logits: Logits) -> int:
        probabilities = distribution(tokens, logits, options)
        candidates = np.flatnonzero(probabilities)
        cumulative = np.cumsum(probabilities[candidates], dtype=np.float64)
        place = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
        return int(candidates[place])

    return greedy if options.temperature == 0 else sample


def distribution(tokens: Sequence[int], logits: Logits, options: GenerateSpec) -> np.ndarray:
    """Probabilities (V,) float32 of the next token, where the temperature is not 0; zero for what is left out."""
    scores = penalized(logits, tokens, options.repetition_penalty)
    # From the largest down, so that no temperature is too low for float32; the distribution is the same.
    best = scores.max()  # NaN, where there is one
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
    """Logits with those of used tokens divided by `penalty`, or multiplied where they are negative."""
    if penalty == 1:
        return logits
    used = np.asarray(tokens)
    scores = logits.copy()
    scores[used] = np.where(logits[used] < 0, logits[used] * penalty, logits[used] / penalty)
    return scores


def keep_top_k(weights: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest weights and whatever equals the last of them; zero for the others."""
    if count >= weights.size:
        return weights
    return np.where(weights < np.partition(weights, -count)[-count], 0, weights)


def keep_top_p(weights: np.ndarray, share: float) -> np.ndarray:
    """The fewest largest weights that hold `share` of the sum, and whatever equals the last of them."""
    total = weights.sum(dtype=np.float64)
    # All weights below this hold less than 1 - share together: they are nearly all, and need no sorting.
    descending = np.sort(weights[weights >= (1 - share) * total / weights.size])[::-1]
    before = np.cumsum(descending[:-1], dtype=np.float64)  # what is held without the second, the third, ...
    last = np.searchsorted(before, share * total, side="left")
    return np.where(weights < descending[last], 0, weights)


def keep_min_p(weights: np.ndarray, share: float) -> np.ndarray:
    """The weights of at least `share` of the largest; zero for the others."""
    return np.where(weights < share * weights.max(), 0, weights)


def _check(value: np.floating) -> None:
    if not np.isfinite(value):
        raise Failure("the model computes no numbers (NaN or infinity); its weights are damaged")
