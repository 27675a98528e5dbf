"""Span corruption, the pre-training of T5 and Terraformer: text without some spans, and those spans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsecli.data.examples import PairExamples
from sparsecli.recipe.data import SpanCounts
from sparsecli.spec.vocabulary import END


def corrupt(
    tokens: np.ndarray, counts: SpanCounts, sentinels: Sequence[int], random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Remove `counts.spans` spans from tokens (counts.window,), of which the first is always kept.

    Returns the source, in which a sentinel replaces each span, and the target: each sentinel followed by its span.
    Kept and hidden tokens are each cut into that many pieces, all ways equally likely. Both results end with the end
    token.
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
    """Lengths of `pieces` pieces, each at least 1, with the sum `total`; all compositions are equally likely."""
    cuts = np.sort(random.choice(total - 1, pieces - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


class CorruptedSpans(PairExamples):
    """Windows of a stream of tokens. Each window is always corrupted in the same way.

    Args:
        tokens: the stream; an incomplete window at its end is dropped.
        sentinels: token ids, at least one for each span.
        seed: determines, with the index of a window, the places of its spans.
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
