"""How good a measurement is: dense rows against the memory limit and other programs' dense rows, and cold units."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sparsecli.bench.report import Row

LEAST_SHARE = 0.7  # of the memory limit, below which a dense row is no good yardstick
DENSE_SHARE = 0.5  # of its parameters that a dense model uses for a token: all but its table of tokens
MEASURED_PARTS = ("units", "projection", "controller", "multiplicative", "head")
COLD_SHARE = 0.9  # of the bytes of chosen units that have to come from the disk
CACHE_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


def rated(rows: Sequence[Row], cache_bytes: int) -> list[Row]:
    """The rows with `speedup_rests_on` and `speedup_over_peer`.

    A dense row whose bytes fit into the last-level cache (`cache_bytes`) is not measured by the memory's speed.
    """
    baselines = {row.key[1:]: row for row in reversed(rows) if row.group == "dense"}
    return [
        row.model_copy(
            update={
                "speedup_rests_on": _weak_share(baselines.get(row.key[1:]), row, cache_bytes),
                "speedup_over_peer": _over_peer(row, rows),
            }
        )
        for row in rows
    ]


def warnings(rows: Sequence[Row]) -> list[str]:
    """A line for every kind of weights whose dense row is too slow to be compared with."""
    weak = {(row.backend, row.dtype): row.speedup_rests_on for row in rows if row.speedup_rests_on}
    return [
        f"the dense {dtype} row ({backend}) reaches {share:.0%} of the memory's speed, less than {LEAST_SHARE:.0%}: "
        "speed-ups against it (marked ~) are larger than against a good dense row"
        for (backend, dtype), share in weak.items()
    ]


def warm(rows: Sequence[Row]) -> list[str]:
    """A line for every row whose units did not come from the disk."""
    return [
        f"{row.variant} ({row.dtype}): {row.disk_bytes_per_token / 1e6:.1f} MB a token came from the disk, its units "
        f"have {row.disk_bytes_expected / 1e6:.1f}: they were not cold"
        for row in rows
        if row.disk_bytes_per_token is not None
        and row.disk_bytes_expected
        and row.disk_bytes_per_token < COLD_SHARE * row.disk_bytes_expected
    ]


def last_level_cache(path: Path = CACHE_SIZE) -> int:
    """Bytes of the last-level cache; 0 where the system does not say."""
    try:
        number, unit = re.fullmatch(r"(\d+)([KM]?)", path.read_text().strip()).groups()  # type: ignore[union-attr]
    except (OSError, AttributeError):
        return 0
    return int(number) * {"": 1, "K": 2**10, "M": 2**20}[unit]


def bits_of(row: Row) -> int:
    """Bits of a weight, the fewest of a row whose parts have several: `bfloat16` 16, `q4_0` 4."""
    kinds = [row.dtype]
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
    """Over the fastest dense row of another program that has as many bits or more, at the same sizes."""
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
