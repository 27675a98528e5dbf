"""Comparison with an earlier bench: finds rows that are slower beyond the threshold and the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from sparsecli import console
from sparsecli.bench.host import drifted
from sparsecli.bench.result import BenchResult, Change, Processor, Row, RowKey

LARGEST = 64 << 20
"""Largest size in bytes of an earlier result; a sample takes some twenty bytes."""
MOST_SAMPLES = 2**17
RESAMPLES = 2000
SHOWN = 3
"""Rows of each side that a message names."""
AT_ONCE = 2**22
"""Most samples of a row. It bounds the memory of the bootstrap; usual results have far fewer."""
INTERVAL = (2.5, 97.5)  # percentiles of the resampled ratios


def read(path: Path) -> BenchResult:
    """An earlier result. Raises `Failure` when the file is missing or is not a result of this format."""
    try:
        if path.stat().st_size > LARGEST:
            raise console.Failure(f"{path}: is larger than {LARGEST >> 20} MiB; is it a result of bench?")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = console.system_reason(error) or "not a text file"
        raise console.Failure(f"{path}: cannot read the earlier result: {reason}") from error
    try:
        result = BenchResult.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise console.Failure(
            f"{path}: not a bench result of schema 1: {where}: {first['msg']}; make one with --output FILE.json"
        ) from error
    if (samples := result.settings.rounds * result.settings.tokens_per_round) > MOST_SAMPLES:
        raise console.Failure(f"{path}: has {samples} samples a row; at most {MOST_SAMPLES} can be compared")
    return result


def check_comparable(
    processor: Processor, facts: Mapping[RowKey, Mapping[str, Any]], before: BenchResult, path: Path
) -> None:
    """Raise `Failure` unless rows with these facts can be compared with `before`, which was read from `path`.

    Facts are known before measuring. The memory's bandwidth is not; `compare` corrects for it.
    """
    pairs: list[tuple[str, object, object]] = [
        ("machine.cpu", before.machine.cpu, processor.cpu),
        ("machine.isa", before.machine.isa, processor.isa),
    ]
    common = [row for row in before.rows if row.key in facts]
    for row in common:
        pairs += [
            (f"{field} of {row.variant}", getattr(row, field), facts[row.key][field])
            for field in ("parameters", "active_parameters", "bytes_per_token", "projected", "precision")
        ]
    for name, theirs, ours in pairs:
        if theirs != ours:
            raise console.Failure(f"{path}: cannot be compared: {name} was {theirs!r}, is {ours!r}")
    if not common:
        raise console.Failure(f"{path}: has no row of {_difference(list(facts), before)}")


def _difference(keys: Sequence[RowKey], before: BenchResult) -> str:
    """The reason why two results have no row in common."""
    for key in keys:
        for row in before.rows:
            if row.key[:3] == key[:3]:
                theirs, ours = row.key.sizes, key.sizes
                return f"the same sizes as this bench: {row.variant} was measured at {theirs}, now at {ours}"
    there, here = (
        ", ".join(list(dict.fromkeys(" ".join(key[:3]) for key in ours))[:SHOWN])
        for ours in ([row.key for row in before.rows], keys)
    )
    return (
        f"the same variant, backend and dtype as this bench: it has {there or 'none'}; this bench has {here}"
    )


def compare(now: BenchResult, before: BenchResult, threshold: float) -> list[Change]:
    """A comparison of every row that both results have. `threshold` is a fraction: 0.05 allows a row to be 5 % slower.

    A row is `slower` if the ratio of the medians exceeds 1 + threshold and the lower end of its 95 % interval exceeds
    1. If the machine's memory has become slower by more than `host.DRIFT`, both limits are multiplied by that slowdown.
    """
    bandwidths = before.machine.bandwidth_gb_s.mean, now.machine.bandwidth_gb_s.mean
    explained = bandwidths[0] / bandwidths[1] if drifted(*bandwidths) else 1.0
    earlier = {row.key: row for row in before.rows}
    rounds = now.settings.rounds, before.settings.rounds
    return [
        _change(row, earlier[row.key], rounds, threshold, explained) for row in now.rows if row.key in earlier
    ]


def _change(row: Row, earlier: Row, rounds: tuple[int, int], threshold: float, explained: float) -> Change:
    ratio = row.ms_per_token.p50 / earlier.ms_per_token.p50
    low, high = ratio_interval(
        rounds_of(row.ms_per_token.samples, rounds[0]), rounds_of(earlier.ms_per_token.samples, rounds[1])
    )
    slow, fast = max(explained, 1.0), min(explained, 1.0)
    verdict: Literal["slower", "faster", "same"] = "same"
    if ratio > slow * (1 + threshold) and low > slow:
        verdict = "slower"
    elif ratio < fast / (1 + threshold) and high < fast:
        verdict = "faster"
    return Change(
        **row.key._asdict(),
        before_ms=earlier.ms_per_token.p50,
        now_ms=row.ms_per_token.p50,
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        verdict=verdict,
    )


def rounds_of(samples: list[float], rounds: int) -> np.ndarray:
    """The samples as an array (rounds, tokens of a round)."""
    return np.array(samples).reshape(rounds, -1)


def ratio_interval(now: np.ndarray, before: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of median(now) / median(before), both (rounds, tokens), by a two-stage bootstrap.

    All tokens of a round share its disturbances. So rounds are drawn first, then tokens within them; drawing only
    tokens would report such a disturbance as a difference.
    """
    random = np.random.default_rng(seed)
    medians = [_medians(samples, random) for samples in (now, before)]
    low, high = np.percentile(medians[0] / medians[1], INTERVAL)
    return float(low), float(high)


def _medians(samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The medians (RESAMPLES,) of resamples of samples (rounds, tokens)."""
    rounds, tokens = samples.shape
    draws = max(1, min(RESAMPLES, AT_ONCE // samples.size))
    found = []
    for start in range(0, RESAMPLES, draws):
        size = min(draws, RESAMPLES - start)
        chosen_rounds = random.integers(rounds, size=(size, rounds, 1))
        chosen_tokens = random.integers(tokens, size=(size, rounds, tokens))
        found.append(np.median(samples[chosen_rounds, chosen_tokens], axis=(1, 2)))
    return np.concatenate(found)
