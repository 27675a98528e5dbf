"""What a benchmark makes of its samples: figures, formats, and what is compared."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from small_benches import VARIANTS, loaded, made_up, needs_native, noisy

from sparsecli import console
from sparsecli.bench import command, compare, host, random_weights, render, timing
from sparsecli.bench.result import Bandwidth, BenchResult, Change, Machine, Row, Settings, Times
from sparsecli.recipe.schema import Recipe

pytestmark = pytest.mark.usefixtures("quick_probe")


# -- figures -------------------------------------------------------------------------------------------------


def test_rows_of_a_run(result: BenchResult) -> None:
    assert [(row.variant, row.dtype) for row in result.rows] == [
        ("dense", "float32"),
        ("both", "float32"),
        ("dense", "bfloat16"),
        ("both", "bfloat16"),
    ]
    dense, both = result.rows[:2]
    assert len(dense.ms_per_token.samples) == 6
    assert dense.speedup == 1.0
    assert both.speedup == pytest.approx(dense.ms_per_token.p50 / both.ms_per_token.p50, rel=1e-3)
    assert both.active_parameters < both.parameters
    assert dense.bytes_per_token == 2 * result.rows[2].bytes_per_token
    assert both.paper_speedup == pytest.approx(160 / 61, abs=1e-4)
    limit_ms = both.bytes_per_token / 20e9 * 1e3
    assert both.bandwidth_fraction == pytest.approx(limit_ms / both.ms_per_token.p50, abs=1e-4)
    assert both.held_out_loss is None


def test_rows_are_compared_with_the_dense_row_that_is_named() -> None:
    measured = command.run(loaded(context=[4, 8]), over="torch:bfloat16", format="json")
    dense = {row.context: row for row in measured.rows if row.variant == "dense" and row.dtype == "bfloat16"}
    for row in measured.rows:
        expected = dense[row.context].ms_per_token.p50 / row.ms_per_token.p50
        assert row.speedup_over == pytest.approx(expected, rel=1e-3)
    assert "the first dense or peer row of torch:bfloat16" in render.as_markdown(measured)


def test_percentiles() -> None:
    spread = timing.spread(np.arange(101.0))
    assert (spread.p10, spread.p50, spread.p90) == (10, 50, 90)


def test_the_recipe_of_a_result_is_what_was_run() -> None:
    chosen = {"dtypes": ["bfloat16"], "context": [5], "rounds": 1, "tokens_per_round": 2}
    measured = command.run(loaded(**chosen), sparse=True, format="json")
    recipe = Recipe.model_validate_json(json.dumps(measured.recipe))
    assert recipe.model == loaded().recipe.model
    assert recipe.bench == loaded(variants=VARIANTS[1:], **chosen).recipe.bench


# -- formats -------------------------------------------------------------------------------------------------


def test_json_is_the_documented_format(result: BenchResult) -> None:
    record = json.loads(render.as_json(result))
    assert list(record) == [
        "schema",
        "command",
        "recipe",
        "settings",
        "versions",
        "machine",
        "rows",
        "over",
        "peak_memory_gb",
        "comparison",
    ]
    assert record["schema"] == 1
    assert set(record["machine"]) == {"cpu", "isa", "threads", "bandwidth_gb_s", "memory_gb", "disk"}
    assert set(record["rows"][0]) >= {
        "variant",
        "group",
        "backend",
        "dtype",
        "parameters",
        "active_parameters",
        "bytes_per_token",
        "ms_per_token",
        "ms_per_block",
        "tokens_per_second",
        "speedup",
        "bandwidth_fraction",
        "held_out_loss",
    }
    assert set(record["rows"][0]["ms_per_token"]) == {"p10", "p50", "p90", "samples"}
    assert BenchResult.model_validate_json(render.as_json(result)) == result


def test_every_field_is_documented() -> None:
    text = (Path(__file__).parent.parent / "docs" / "benchmark.md").read_text(encoding="utf-8")
    models = (BenchResult, Settings, Machine, Bandwidth, Row, Times, Change)
    names = {field.alias or name for model in models for name, field in model.model_fields.items()}
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_csv_and_markdown_have_every_row(result: BenchResult) -> None:
    lines = list(csv.DictReader(io.StringIO(render.as_csv(result))))
    assert [line["variant"] for line in lines] == [row.variant for row in result.rows]
    assert float(lines[1]["ms_per_token_p50"]) == result.rows[1].ms_per_token.p50
    assert lines[0]["held_out_loss"] == ""
    lines = render.as_markdown(result).splitlines()
    assert len({line.count("|") for line in lines[: 2 + len(result.rows)]}) == 1


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_fits_and_keeps_what_matters(width: int) -> None:
    shown = made_up({"dense": noisy(120, 1), "+ Sparse FF + QKV + loss": noisy(15, 2)})
    screen = Console(file=io.StringIO(), width=width, markup=False)
    screen.print(render.table(shown, width))
    text = " ".join(screen.file.getvalue().split())
    assert ("Left out to fit 80 characters: " in text) == (width == 80)
    lines = screen.file.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    assert "+ Sparse FF + QKV + loss" in text
    for title in ("MB /", "ms /", "speed-", "of memory"):
        assert title in text


def test_numbers_read_well() -> None:
    assert [render.count(n) for n in (999, 819_000_000, 16_900_000_000)] == ["999", "819M", "16.9B"]
    assert [render.milliseconds(n) for n in (126.4, 19.44, 3.619)] == ["126", "19.4", "3.62"]


# -- comparing -----------------------------------------------------------------------------------------------


def verdicts(now: BenchResult, before: BenchResult, threshold: float = 0.05) -> list[str]:
    return [change.verdict for change in compare.compare(now, before, threshold)]


def test_a_slower_row_is_found_and_an_equal_one_is_not() -> None:
    before = made_up({"dense": noisy(100, 1), "both": noisy(20, 2)})
    now = made_up({"dense": noisy(100, 3), "both": noisy(23, 4)})
    assert verdicts(now, before) == ["same", "slower"]
    assert verdicts(before, now) == ["same", "faster"]
    assert verdicts(now, before, threshold=0.3) == ["same", "same"]


def test_one_disturbed_round_is_noise() -> None:
    calm, disturbed = noisy(20, 1, rounds=3), noisy(20, 2, rounds=3)
    disturbed[:2] += 6  # two of three rounds, so that the median moves by 30 %
    before, now = made_up({"both": calm}), made_up({"both": disturbed})
    assert compare.compare(now, before, 0.05)[0].ratio > 1.2
    assert verdicts(now, before) == ["same"]


def test_slower_memory_explains_slower_rows() -> None:
    before = made_up({"both": noisy(20, 1)}, bandwidth=50)
    assert verdicts(made_up({"both": noisy(24, 2)}, bandwidth=40), before) == ["same"]
    assert verdicts(made_up({"both": noisy(30, 2)}, bandwidth=40), before) == ["slower"]


def set_all(record: object, name: str, value: object) -> None:
    """Replace every field called `name`, at any depth."""
    for inner in record.values() if isinstance(record, dict) else record if isinstance(record, list) else []:
        set_all(inner, name, value)
    if isinstance(record, dict) and name in record:
        record[name] = value


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("cpu", "b", "machine.cpu was 'b'"),
        ("isa", "none", "machine.isa was 'none'"),
        ("threads", 3, "dense was measured at 3 threads, context 8, now at 1 thread, context 8"),
        ("context", 9, "dense was measured at 1 thread, context 9, now at 1 thread, context 8"),
        ("batch", 4, "dense was measured at 1 thread, context 8, batch 4, now at 1 thread, context 8"),
        ("parameters", 7, "parameters of dense was 7"),
        ("active_parameters", 7, "active_parameters of dense was 7"),
        ("bytes_per_token", 7, "bytes_per_token of dense was 7"),
        ("projected", True, "projected of dense was True, is False"),
        ("backend", "other", "no row of the same variant, backend and dtype"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_what_cannot_be_compared_is_refused_before_anything_is_measured(
    result: BenchResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    value: object,
    told: str,
    dry_run: bool,
) -> None:
    record = json.loads(render.as_json(result))
    for part in ("machine", "settings", "rows"):
        set_all(record[part], field, value)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setattr(random_weights.Pools, "of", lambda *_: pytest.fail("built"))
    with pytest.raises(console.Failure, match=f"old.json: .*{told}") as caught:
        command.run(loaded(threads=[1]), against=path, dry_run=dry_run)
    assert caught.value.exit_code == 1


@needs_native
def test_another_precision_does_not_compare(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    both = [{**VARIANTS[1], "precision": {"projection": "float32"}}]
    chosen = {"backends": ["native"], "dtypes": ["bfloat16"]}
    command.run(loaded(variants=both, **chosen), output=path, format="json")
    both[0]["precision"] = {"head": "float32", "embedding": "float32"}
    with pytest.raises(console.Failure, match="of both was"):
        command.run(loaded(variants=both, **chosen), against=path, format="json")


def test_slower_memory_is_told_after_the_result_is_written(
    result: BenchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(render.as_json(result), encoding="utf-8")
    monkeypatch.setattr(host, "bandwidth", lambda **_: 10.0)
    command.run(loaded(threads=[1]), against=old, output=new, format="json")
    told = " ".join(capsys.readouterr().err.split())
    assert 0 <= told.find("wrote") < told.find("memory reads 10.0 GB/s, 20.0 in the earlier result")
    assert compare.read(new).comparison is not None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "rows": 3}', "\udcff"])
def test_a_malformed_file_is_one_clear_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "old.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(console.Failure) as caught:
        command.run(loaded(), against=path)
    assert str(path) in caught.value.message
    assert len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "sample", "told"),
    [
        ({"rounds": 0}, 1.0, "settings.rounds"),
        ({"rounds": 10**6, "tokens_per_round": 10**6}, 1.0, "samples"),
        ({"context": 10**20}, 1.0, "settings.context"),
        ({}, 0.0, "samples"),
        ({}, float("inf"), "samples"),
        ({}, float("nan"), "samples"),
    ],
)
def test_numbers_that_no_bench_measures(
    settings: dict[str, int], sample: float, told: str, result: BenchResult, tmp_path: Path
) -> None:
    record = json.loads(render.as_json(result))
    record["settings"] |= settings
    record["rows"][0]["ms_per_token"]["samples"][0] = sample
    path = tmp_path / "old.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(console.Failure, match=f"old.json: .*{told}") as caught:
        compare.read(path)
    assert len(caught.value.message.splitlines()) == 1


def test_many_samples_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = np.random.default_rng(0).normal(10, 1, (4, 5))
    whole = compare.ratio_interval(samples * 1.1, samples)
    monkeypatch.setattr(compare, "AT_ONCE", 999)
    np.testing.assert_allclose(compare.ratio_interval(samples * 1.1, samples), whole, atol=0.02)


def test_a_result_with_samples_that_do_not_fit_its_settings_is_refused(
    result: BenchResult, tmp_path: Path
) -> None:
    record = json.loads(render.as_json(result))
    record["rows"][0]["ms_per_token"]["samples"].pop()
    path = tmp_path / "old.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(console.Failure, match="samples"):
        compare.read(path)
