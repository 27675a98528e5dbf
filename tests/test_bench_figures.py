"""Speed-ups that rest on a slow dense row are marked; other programs' dense rows are compared with."""

from pathlib import Path

import pytest
from small_benches import made_up, noisy

from sparsecli.bench import figures, host, render
from sparsecli.bench.result import Row

CACHE = 32 * 2**20


def row(variant: str, milliseconds: float, **facts: object) -> Row:
    plain = made_up({variant: noisy(milliseconds, 0, 0.0)}).rows[0]
    return plain.model_copy(update={"backend": "native", **facts})


def rated(*rows: Row) -> list[Row]:
    return figures.rated(rows, CACHE)


def sparse(milliseconds: float = 10, **facts: object) -> Row:
    return row("both", milliseconds, group="sparse", speedup=5.0, active_parameters=72_000_000, **facts)


def test_a_speedup_over_a_slow_dense_row_is_marked() -> None:
    slow, both = rated(row("dense", 50, bandwidth_fraction=0.24), sparse())
    assert (slow.baseline_bandwidth_fraction, both.baseline_bandwidth_fraction) == (None, 0.24)
    (line,) = figures.warnings([slow, both])
    assert "dense float32 row (native) reaches 24% of the memory bandwidth" in line


def test_a_good_dense_row_is_not() -> None:
    rows = rated(row("dense", 50, bandwidth_fraction=0.7), sparse())
    assert [each.baseline_bandwidth_fraction for each in rows] == [None, None]
    assert figures.warnings(rows) == []


def test_weights_that_fit_into_the_cache_are_not_judged_by_the_memory() -> None:
    rows = rated(row("dense", 1, bandwidth_fraction=0.1, bytes_per_token=CACHE), sparse())
    assert rows[1].baseline_bandwidth_fraction is None


def test_other_sizes_have_their_own_dense_row() -> None:
    rows = rated(row("dense", 50, bandwidth_fraction=0.24), sparse(batch=2))
    assert rows[1].baseline_bandwidth_fraction is None


def test_the_mark_is_in_the_table_and_its_caption() -> None:
    result = made_up({"dense": noisy(50, 0), "both": noisy(10, 1)})
    weak = result.model_copy(update={"rows": rated(row("dense", 50, bandwidth_fraction=0.24), sparse())})
    assert "~5.00x" in render.as_markdown(weak)
    assert "marked ~" in render.caption(weak)
    assert "~" not in render.as_markdown(result)


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [
        ("float32", None, 10.0),  # of 100 ms
        ("bfloat16", None, 5.0),  # of the faster of 100 and 50
        ("bfloat16", {"units": "int8", "head": "bfloat16"}, 3.0),
        ("int8", None, 3.0),
        ("int4", None, 2.0),
    ],
)
def test_the_fastest_dense_peer_of_as_many_bits(
    dtype: str, precision: dict[str, str] | None, expected: float
) -> None:
    peers = [
        row("Llama-shaped", ms, group="peer", backend="llama.cpp", dtype=kind)
        for ms, kind in ((100, "float32"), (50, "bfloat16"), (30, "q8_0"), (20, "q4_0"))
    ]
    ours_there = row("both", 1, group="peer", backend="openvino", active_parameters=72_000_000)
    both = rated(sparse(dtype=dtype, precision=precision), *peers, ours_there)[0]
    assert both.speedup_over_peer == pytest.approx(expected)


def test_a_peer_with_a_large_vocabulary_is_dense() -> None:
    """A token reads one row of the table of tokens, which may be an eighth of a dense model."""
    whole = row("Llama-shaped", 40, group="peer", backend="llama.cpp").parameters
    peer = row("Llama-shaped", 40, group="peer", backend="llama.cpp", active_parameters=whole * 7 // 8)
    assert rated(sparse(), peer)[0].speedup_over_peer == pytest.approx(4)


def test_no_peer_no_figure() -> None:
    assert rated(sparse())[0].speedup_over_peer is None


def test_the_cache_as_the_system_says_it(tmp_path: Path) -> None:
    size = tmp_path / "size"
    size.write_text("32768K\n")
    assert host.last_level_cache(size) == CACHE
    size.write_text("?")
    assert host.last_level_cache(size) == host.last_level_cache(tmp_path / "none") == 0


def test_units_that_did_not_come_from_the_disk_are_told() -> None:
    cold = sparse(disk_bytes_per_token=91, disk_bytes_expected=100)
    warm = sparse(disk_bytes_per_token=89_000_000, disk_bytes_expected=100_000_000)
    assert figures.warm([cold, sparse()]) == []
    assert figures.warm([warm]) == [
        "both (float32): 89.0 MB per token came from the disk, but its units have 100.0 MB: "
        "some were in the system's cache"
    ]
