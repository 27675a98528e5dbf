"""Span corruption (T5; Terraformer's pre-training): text with spans left out, and the spans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsecli.data.examples import PairExamples
from sparsecli.recipe.data import SpanCounts
from sparsecli.spec.vocabulary import END


def corrupt(
    tokens: np.ndarray, counts: SpanCounts, sentinels: Sequence[int], random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Leave `counts.spans` spans out of tokens (counts.window,), which begin with a token that is kept.

    Returns the source, in which a sentinel stands for each span, and the target: each sentinel and then its span.
    Every way to cut the kept and the hidden tokens into as many pieces is equally likely. Both end with the end token.
    """
    kept = _pieces(counts.window - counts.hidden, counts.spans, random)
    hidden = _pieces(counts.hidden, counts.spans, random)
    source, target, start = [], [], 0
    for keep, hide, sentinel in zip(kept, hidden, sentinels, strict=False):
        source += [tokens[start : start + keep], [sentinel]]
        target += [[sentinel], tokens[start + keep : start + keep + hide]]
        start += keep + hide
    return np.concatenate([*source, [END]]), np.concatenate([*target, [END]])


def _pieces(total: int, pieces: int, random: np.random.Generator) -> np.ndarray:
    """Lengths of `pieces` pieces of at least 1 that are `total` together, drawn evenly among all ways."""
    cuts = np.sort(random.choice(total - 1, pieces - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


class CorruptedSpans(PairExamples):
    """Windows of a stream of tokens, each corrupted the same way every time.

    Args:
        tokens: the stream; what does not fill a window at its end is left out.
        sentinels: token ids, at least one for each span.
        seed: of the spans; with the index of a window it decides where they are.
        limit: use at most this many windows.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        counts: SpanCounts,
        sentinels: Sequence[int],
        seed: int,
        limit: int | None = None,
    ) -> None:
        self.tokens, self.counts, self.sentinels, self.seed = tokens, counts, sentinels, seed
        windows = len(tokens) // counts.window
        self.windows = windows if limit is None else min(windows, limit)

    def __len__(self) -> int:
        return self.windows

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start = index * self.counts.window
        window = np.asarray(self.tokens[start : start + self.counts.window])
        return corrupt(window, self.counts, self.sentinels, np.random.default_rng((self.seed, index)))
