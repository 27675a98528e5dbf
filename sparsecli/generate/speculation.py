"""Lossless speculative decoding: the target model checks several drafted tokens in one pass.

A pass over several tokens gives bit by bit the logits of single steps. So greedy text is exactly that of the target
alone, and sampled text has exactly its distribution (Leviathan et al., "Fast Inference from Transformers via
Speculative Decoding", 2023).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sparsecli.generate.drafts import Draft, Drafter
from sparsecli.generate.native_decoder import NativeDecoder
from sparsecli.generate.sampling import Sampler, distribution, draw
from sparsecli.recipe.schema import GenerateSpec

if TYPE_CHECKING:
    from sparsecli.generate.text import Generation

LONGEST_DRAFT = 16
FIRST_DRAFT = 4
"""Tokens of the first drafts, until their times are known."""
MEASURED = 2
"""Steps, and verifying passes, that are timed before draft lengths are chosen by them."""
FIRST_REST, LONGEST_REST = 16, 512
"""Tokens that are decoded without drafts if drafts do not pay, before the next trial; each time twice as many."""
TRIAL = 2
"""Tokens of a draft that only tests whether drafts pay again."""
FORGET = 0.95
"""Factor for the weights of earlier measurements at each new measurement."""
OUTLIER = 4.0
"""Times above this multiple of the expected time are caused by other programs, and are clipped to it."""


@dataclass
class SpeculationStats:
    """Counts of a speculative decoding."""

    passes: int = 0
    """Passes of the target model over at least one token, after the prompt."""
    verified: int = 0
    """Of them, those with drafted tokens."""
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    """Tokens that the passes gave."""

    def figures(self) -> dict[str, float | None]:
        """Figures of `--stats` and `--json`; None where nothing was measured."""
        return {
            "acceptance": self.accepted / self.drafted if self.drafted else None,
            "mean_accepted": self.accepted / self.verified if self.verified else None,
            "tokens_per_pass": self.tokens / self.passes if self.passes else None,
            "drafted_tokens": self.drafted,
            "accepted_tokens": self.accepted,
            "verifying_passes": self.verified,
            "passes": self.passes,
        }


# -- draft lengths -------------------------------------------------------------------------------------------


@dataclass
class Acceptance:
    """How often a drafted token is accepted, where all before it were."""

    accepted: float = 0.0
    tried: float = 0.0

    def add(self, accepted: int, rejected: bool) -> None:
        """Count a draft: tokens that were accepted, and whether the next was not."""
        self.accepted = FORGET * self.accepted + accepted
        self.tried = FORGET * self.tried + accepted + rejected

    def rate(self, before: float) -> float:
        """The share of the tried tokens; `before` is the guess where nothing is known, and weighs as two of them."""
        return (self.accepted + 2 * before) / (self.tried + 2)


def expected_tokens(rate: float, count: int) -> float:
    """Tokens of a pass over `count` drafted tokens, with the one that the target adds, at this acceptance below 1."""
    return (1 - rate ** (count + 1)) / (1 - rate)


@dataclass
class PassTime:
    """Seconds of a pass as a line over its tokens, fitted by least squares to weighted measurements."""

    measured: int = 0
    sums: np.ndarray = field(default_factory=lambda: np.zeros(5))  # weight, n, n^2, seconds, n * seconds

    def add(self, count: int, seconds: float) -> None:
        """Add a measurement."""
        if self.measured:
            seconds = min(seconds, OUTLIER * self.at(count))
        self.measured += 1
        self.sums = FORGET * self.sums + (1, count, count**2, seconds, count * seconds)

    def at(self, count: int) -> float:
        """Expected seconds of a pass over `count` tokens; flat until passes of two lengths were measured."""
        _, n, square, total, product = self.sums / self.sums[0]
        spread = square - n**2
        slope = max(0.0, (product - n * total) / spread) if spread > 1e-6 else 0.0
        return float(max(total + slope * (count - n), 0.1 * total))


@dataclass
class Rest:
    """Tokens to decode without drafts, if drafts do not pay, before the next trial."""

    length: int = FIRST_REST
    passed: int = 0


class Pace:
    """Chooses the length of each draft by measured acceptance and times; 0 where drafts do not pay."""

    def __init__(self) -> None:
        self.step, self.verifying, self.drafting = PassTime(), PassTime(), PassTime()
        self.overall = Acceptance()
        self.by_kind: dict[int, Acceptance] = defaultdict(Acceptance)
        self.rests: dict[int, Rest] = defaultdict(Rest)

    def length(self, kind: int) -> int:
        """Tokens of the next draft, which is of this kind."""
        if self.step.measured < MEASURED:
            return 0
        if self.verifying.measured < MEASURED:
            return FIRST_DRAFT
        if best := self._best(kind):
            self.rests.pop(kind, None)
            return best
        rest = self.rests[kind]
        rest.passed += 1
        if rest.passed < rest.length:
            return 0
        self.rests[kind] = Rest(min(2 * rest.length, LONGEST_REST))
        return TRIAL

    def count(self, kind: int, accepted: int, rejected: bool) -> None:
        """Count a draft: see `Acceptance.add`."""
        self.overall.add(accepted, rejected)
        self.by_kind[kind].add(accepted, rejected)

    def _best(self, kind: int) -> int:
        """The length that gives most tokens per second."""
        rate = self.by_kind[kind].rate(before=self.overall.rate(before=0.5))
        speeds = [1 / self.step.at(1)]
        for count in range(1, LONGEST_DRAFT + 1):
            drafting = self.drafting.at(count) if self.drafting.measured else 0.0
            speeds.append(expected_tokens(rate, count) / (self.verifying.at(count + 1) + drafting))
        return int(np.argmax(speeds))


# -- decoding ------------------------------------------------------------------------------------------------


def speculate(
    decoder: NativeDecoder,
    drafter: Drafter,
    prompt: Sequence[int],
    options: GenerateSpec,
    sampler: Sampler,
    seed: int,
    limit: int,
    result: Generation,
    pace: Pace | None = None,
) -> Iterator[int]:
    """Yield up to `limit` (at least 1) new tokens after `prompt`; timings and counts go to `result`.

    Args:
        sampler: the target's own, by the same options and seed. It alone decides where drafts are not random.
        pace: chooses draft lengths; by default by measured times.
    """
    stats = result.speculation = SpeculationStats()
    pace = pace or Pace()
    judge = _Judge(options, sampler, np.random.default_rng((seed, 2)))
    tokens = list(prompt)
    started = time.perf_counter()
    tokens.append(sampler(tokens, decoder.prefill(prompt, capacity=len(prompt) + limit)))
    if drafter.kind(prompt) is not None:
        drafter.catch_up(prompt)
    result.prefill_seconds = time.perf_counter() - started
    yield tokens[-1]
    while (left := len(prompt) + limit - len(tokens)) > 0:
        before = len(tokens)
        started = time.perf_counter()
        kind = drafter.kind(tokens) if left > 1 else None
        count = 0 if kind is None else min(pace.length(kind), left - 1)
        if count:
            drafter.catch_up(tokens)
            drafting = time.perf_counter()
            draft = drafter.propose(tokens, count)
            drafted = time.perf_counter()
            logits = decoder.verify([tokens[-1], *draft.tokens])
            accepted = judge.extend(tokens, draft, logits)
            decoder.truncate(len(tokens) - 1)
            ended = time.perf_counter()
            pace.drafting.add(len(draft.tokens), drafted - drafting)
            pace.verifying.add(len(draft.tokens) + 1, ended - drafted)
            pace.count(draft.kind, accepted, rejected=accepted < len(draft.tokens))
            stats.verified += 1
            stats.drafted += len(draft.tokens)
            stats.accepted += accepted
        else:
            stepped = time.perf_counter()
            tokens.append(sampler(tokens, decoder.step(tokens[-1])))
            ended = time.perf_counter()
            if stats.passes:  # the first step after a prompt is slow
                pace.step.add(1, ended - stepped)
        result.step_seconds.append(ended - started)
        stats.passes += 1
        stats.tokens += len(tokens) - before
        yield from tokens[before:]


@dataclass(frozen=True)
class _Judge:
    """Accepts drafted tokens so that the text is distributed as the target's own."""

    options: GenerateSpec
    sampler: Sampler
    generator: np.random.Generator

    def extend(self, tokens: list[int], draft: Draft, logits: np.ndarray) -> int:
        """Append the accepted tokens and one of the target's own; return the number of the accepted.

        Args:
            logits: the target's (n + 1, V), before each drafted token and after the last.
        """
        for index, token in enumerate(draft.tokens):
            if draft.probabilities is None:
                found = self.sampler(tokens, logits[index])
                accepted = found == token
            else:
                found, accepted = self._accept(tokens, token, draft.probabilities[index], logits[index])
            tokens.append(found)
            if not accepted:
                return index
        tokens.append(self.sampler(tokens, logits[-1]))
        return len(draft.tokens)

    def _accept(
        self, tokens: Sequence[int], token: int, proposed: np.ndarray, logits: np.ndarray
    ) -> tuple[int, bool]:
        """Keep `token`, drawn from `proposed` (V,), with the chance min(1, p / q); else draw from what p has over q."""
        wanted = distribution(tokens, logits, self.options)
        if self.generator.random() * proposed[token] < wanted[token]:
            return token, True
        rest = np.maximum(wanted - proposed, 0)
        return draw(rest if rest.any() else wanted, self.generator), False
