"""Figures: rows from the times of cases, their speed-ups, and the quality of the baselines."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from sparsecli.bench.bytes_read import chosen_unit_bytes
from sparsecli.bench.cases import Case
from sparsecli.bench.decoders import PromptReader
from sparsecli.bench.result import Row
from sparsecli.bench.timing import Timing, spread, times

FEED_FORWARD_PARTS = (
    "controller",
    "unit rows in",
    "unit rows out",
    "dense feed-forward",
    "barriers",  # all of them: rather too much is attributed to the native layer than too little
    "feed-forward",
)
"""Parts of a profile that belong to the feed-forward layer, in the native engine and in PyTorch."""
LEAST_SHARE = 0.7  # share of the memory limit; a dense row below it is not a good baseline
DENSE_SHARE = 0.5  # share of parameters that a dense model uses for a token: all but its embedding
MEASURED_PARTS = ("units", "projection", "controller", "multiplicative", "head")
COLD_SHARE = 0.9  # share of the bytes of chosen units that must come from the disk

COMPARED = ("dense", "peer")
"""Groups of rows with which `over` may compare."""

Measured = tuple[Case, Timing]


def rows(measured: Sequence[Measured], gb_per_second: float, over: str | None) -> list[Row]:
    """The measured rows. A dense row is the baseline of rows with the same backend, dtype and sizes.

    `over` names the backend and dtype of another baseline, as in `torch:bfloat16`.
    """
    baselines: dict[tuple[object, ...], Measured] = {}
    named: dict[tuple[object, ...], Measured] = {}
    for case, timing in measured:
        group = case.facts["group"]
        if group == "dense":
            baselines.setdefault(case.key[1:], (case, timing))
        if group in COMPARED and over == f"{case.backend}:{case.dtype}":
            named.setdefault(case.key[3:], (case, timing))
    return [
        _row(case, timing, baselines.get(case.key[1:]), named.get(case.key[3:]), gb_per_second)
        for case, timing in measured
    ]


def _row(
    case: Case, timing: Timing, baseline: Measured | None, over_row: Measured | None, gb_per_second: float
) -> Row:
    variant = case.variant
    token, block_ms, parts = times(timing.token_ms), timing.block_ms, timing.parts
    paper = None if case.prefill or case.batch > 1 else variant.paper
    paper_baseline = baseline[0].variant.paper if baseline else None
    limited = not (case.prefill or case.from_disk or variant.vision)  # by the memory's bandwidth
    share = case.facts["bytes_per_token"] / (gb_per_second * 1e9) / (token.p50 / 1e3)
    layer = sum(parts.get(name, 0.0) for name in FEED_FORWARD_PARTS) / variant.spec.layers
    read = int(np.median(timing.bytes_read)) if timing.bytes_read else None
    expected = None if read is None else chosen_unit_bytes(variant.spec, case.precision, case.batch)
    decoder = timing.decoder.decoder if isinstance(timing.decoder, PromptReader) else timing.decoder
    return Row(
        **case.facts,
        ms_per_token=token,
        ms_per_block=None if block_ms is None else spread(block_ms),
        tokens_per_second=round(1e3 / token.p50, 3),
        speedup=_speedup(baseline, token.p50),
        speedup_over=_speedup(over_row, token.p50),
        bandwidth_fraction=round(share, 4) if limited else None,
        held_out_loss=variant.held_out_loss,
        held_out_accuracy=variant.held_out_accuracy,
        paper=paper,
        paper_speedup=round(paper_baseline.ms_per_token / paper.ms_per_token, 4)
        if paper_baseline and paper
        else None,
        parts=parts or None,
        ms_feed_forward=round(layer, 5) if parts else None,
        disk_bytes_per_token=read,
        disk_bytes_expected=expected,
        disk_mb_s=None if read is None else round(read / token.p50 / 1e3, 1),
        peer_settings=getattr(decoder, "settings", None),
    )


def _speedup(baseline: Measured | None, milliseconds: float) -> float | None:
    return round(times(baseline[1].token_ms).p50 / milliseconds, 4) if baseline else None


# -- the baselines of speed-ups ------------------------------------------------------------------------------


def rated(rows: Sequence[Row], cache_bytes: int) -> list[Row]:
    """The rows with `baseline_bandwidth_fraction` and `speedup_over_peer`.

    A dense row whose bytes fit into the last-level cache (`cache_bytes`) is not compared with the memory's speed.
    """
    baselines = {row.key[1:]: row for row in reversed(rows) if row.group == "dense"}
    return [
        row.model_copy(
            update={
                "baseline_bandwidth_fraction": _weak_share(baselines.get(row.key[1:]), row, cache_bytes),
                "speedup_over_peer": _over_peer(row, rows),
            }
        )
        for row in rows
    ]


def warnings(rows: Sequence[Row]) -> list[str]:
    """A warning for every weight type whose dense row is too slow to be a baseline."""
    weak = {
        (row.backend, row.dtype): row.baseline_bandwidth_fraction
        for row in rows
        if row.baseline_bandwidth_fraction
    }
    return [
        f"the dense {dtype} row ({backend}) reaches {share:.0%} of the memory bandwidth, less than {LEAST_SHARE:.0%}: "
        "speed-ups over it (marked ~) are larger than over a good dense row"
        for (backend, dtype), share in weak.items()
    ]


def warm(rows: Sequence[Row]) -> list[str]:
    """A warning for every row whose units did not come from the disk."""
    return [
        f"{row.variant} ({row.dtype}): {row.disk_bytes_per_token / 1e6:.1f} MB per token came from the disk, but its "
        f"units have {row.disk_bytes_expected / 1e6:.1f} MB: some were in the system's cache"
        for row in rows
        if row.disk_bytes_per_token is not None
        and row.disk_bytes_expected
        and row.disk_bytes_per_token < COLD_SHARE * row.disk_bytes_expected
    ]


def bits_of(row: Row) -> int:
    """Bits of a weight, as 16 for `bfloat16` and 4 for `q4_0`; the fewest if parts have different types."""
    kinds = row.dtype.split()
    if row.precision:
        kinds += [str(row.precision[part]) for part in MEASURED_PARTS if part in row.precision]
    found = [int(match.group()) for kind in kinds if (match := re.search(r"\d+", kind))]
    return min(found, default=32)


def _weak_share(baseline: Row | None, row: Row, cache_bytes: int) -> float | None:
    if baseline is None or baseline is row or row.speedup is None:
        return None
    share = baseline.bandwidth_fraction
    if share is None or share >= LEAST_SHARE or baseline.bytes_per_token <= cache_bytes:
        return None
    return share


def _over_peer(row: Row, rows: Sequence[Row]) -> float | None:
    """The speed-up over the fastest dense row of another program with at least as many bits, at the same sizes."""
    if row.group == "peer":
        return None
    times = [
        peer.ms_per_token.p50
        for peer in rows
        if peer.group == "peer"
        and peer.key[3:] == row.key[3:]
        and peer.active_parameters >= DENSE_SHARE * peer.parameters
        and bits_of(peer) >= bits_of(row)
    ]
    return round(min(times) / row.ms_per_token.p50, 4) if times else None
