"""What a conversion says before and after: the plan and the report in every format, and the verdict."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_conversions import search, trained
from tokenizers import Tokenizer

from sparsecli.console import Failure, RecipeError
from sparsecli.convert import command
from sparsecli.convert.report import MeasuredModel, Report, StageLoss
from sparsecli.decode.native import binding
from sparsecli.evaluate.losses import HeldOutLoss
from sparsecli.recipe.loader import LoadedRecipe, load
from sparsecli.train.recovery import Recovery, Trial

needs_engine = pytest.mark.skipif(binding.available() is not None, reason="the native engine is not there")


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedRecipe, Path]:
    return trained(tmp_path_factory.mktemp("convert"))


# -- plans ---------------------------------------------------------------------------------------------------


@needs_engine
def test_dry_run_writes_nothing(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, dense = dense_run
    command.run(loaded, model=str(dense), output=tmp_path / "sparse", dry_run=True)
    assert "controller, 4/16" in capsys.readouterr().out
    command.run(search(loaded, "loss +1 %"), model=str(dense), output=tmp_path / "sparse", dry_run=True)
    assert "precision, 1/16, attention 4 bit, logits 4 bit" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


@needs_engine
def test_a_plan_comes_in_every_format(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, dense = dense_run
    changed = search(loaded, "loss +1 %", "convert.methods=[precision]", "data.held_out_tokens=512")
    shown = {}
    for format in ("json", "csv", "markdown"):
        command.run(changed, model=str(dense), output=tmp_path / "x", dry_run=True, format=format)
        shown[format] = capsys.readouterr().out
    plan = json.loads(shown["json"])
    assert (plan["convert"]["budget"], plan["data"]["held_out_tokens"]) == ("loss +1 %", 512)
    sizes = {each["name"]: each["bytes_per_token"] for each in plan["candidates"]}
    rows = list(csv.DictReader(io.StringIO(shown["csv"])))
    assert {row["candidate"]: int(row["bytes_per_token"]) for row in rows} == sizes
    assert len(sizes) == 20
    assert "| held-out text | at most 512 tokens of 5.0% of the documents |" in shown["markdown"]
    told = "| distillation | 10,240 tokens, skipped if the budget is met without |"
    assert told in shown["markdown"]
    assert "| precision, 0/16 |" in shown["markdown"]


@needs_engine
def test_a_dry_run_refuses_what_the_run_would(dense_run: tuple[LoadedRecipe, Path], tmp_path: Path) -> None:
    loaded, dense = dense_run
    long = load(str(loaded.path), ["model.max_positions=64", "data.sequence_length=33"])
    with pytest.raises(
        RecipeError, match="sequence_length: 33 is longer than the dense model's context of 32"
    ):
        command.run(long, model=str(dense), output=tmp_path / "sparse", dry_run=True)

    model = tmp_path / "model"
    model.mkdir()
    for path in (dense / "model").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens(["one", "more"])
    tokenizer.save(str(model / "tokenizer.json"))
    for dry_run in (True, False):
        with pytest.raises(Failure, match="the tokenizer has 302 tokens, the model 300"):
            command.run(loaded, model=str(model), output=tmp_path / "sparse", dry_run=dry_run)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# -- reports -------------------------------------------------------------------------------------------------


def report(
    dense_ms: float = 1.0, dense_change: float = 0.01, error: float | None = 0.002, budget: str | None = None
) -> Report:
    """A dense row that is compared with a converted one of 2 ms, which costs 0.008 nats."""
    models = [
        MeasuredModel(
            name, HeldOutLoss(3.0 + loss, loss, error), size, ms, 1.0, converted, bits_per_weight=bits
        )
        for name, loss, error, size, ms, converted, bits in (
            ("dense, bfloat16", -1e-9, 0.0, 4_000_000, 4.0, False, 16.0),
            ("dense, int8", dense_change, error, 2_000_000, dense_ms, False, 8.25),
            ("precision, 1/16", 0.008, error, 1_000_000, 2.0, True, 4.75),
        )
    ]
    stages = [StageLoss("fitted", HeldOutLoss(3.008, 0.008, error))]
    facts = {"source": "m", "output": "o", "method": "precision, 1/16", "kept_fraction_by_layer": None}
    counts = {"calibration_tokens": 1, "held_out_tokens": 1, "distillation_tokens": 0, "threads": 1}
    return Report(
        budget=budget,
        kept_fraction=1.0,
        bandwidth_gb_per_second=1.0,
        stages=stages,
        models=models,
        source_weights="Q4_0 file: q4_0",
        **facts,  # type: ignore[arg-type]
        **counts,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("made", "verdict"),
    [
        (report(), "dense, int8 is faster and no worse: prefer it"),
        (report(error=0.001), None),
        (report(error=None), None),
        (report(error=None, dense_change=0.007), "dense, int8 is faster and no worse: prefer it"),
        (report(dense_ms=3.0), None),
        (report(error=0.001, budget="perplexity +1.1 %"), "is faster and also within the budget: prefer it"),
        (report(error=0.001, budget="loss +0.3 %"), None),
        (report(error=0.001, budget="bytes 9 MB"), None),
    ],
)
def test_a_dense_model_that_is_as_good_is_preferred(made: Report, verdict: str | None) -> None:
    if verdict is None:
        assert "prefer" not in made.verdict
    else:
        assert made.verdict.endswith(verdict)


def test_a_report_as_csv(capsys: pytest.CaptureFixture[str]) -> None:
    made = report(error=None)
    made.show("csv")
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["model"] for row in rows] == [row.name for row in made.models]
    assert [row["standard_error"] for row in rows] == ["0.0", "", ""]
    assert [float(row["loss_increase"]) for row in rows] == [-1e-9, 0.01, 0.008]
    assert [int(row["bytes_per_token"]) for row in rows] == [4_000_000, 2_000_000, 1_000_000]
    assert [float(row["bits_per_weight"]) for row in rows] == [16.0, 8.25, 4.75]


def test_a_report_as_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    made = report()
    made.show("markdown")
    shown = capsys.readouterr().out
    assert shown.startswith("# m converted\n")
    assert "| fitted | 3.0080 | +0.80% | 0.20% |" in shown
    assert "| dense, bfloat16 | 3.0000 | +0.00% | 0.00% | 16.00 | 4.0 | 4.00 | 1.00x | 1.00 |" in shown
    assert "- source: Q4_0 file: q4_0" in shown
    assert f"- verdict: {made.verdict}" in shown


def test_a_report_lists_the_trials(capsys: pytest.CaptureFixture[str]) -> None:
    trials = [Trial("all", 1e-4, 0.1, 2, 0.02), Trial("fitted", 1e30, 0.1, 2, None)]
    recovery = Recovery("all parameters", trials, 12, 3072, 8, 0.03, 0.02, 3.0, 2.9)
    made = replace(report(), recovery=recovery)
    made.show("markdown")
    shown = capsys.readouterr().out
    assert "| all | 0.0001 | 10% | 2 | 0.0200 |" in shown
    assert "| fitted | 1e+30 | 10% | 2 | not finite |" in shown
    assert "all parameters: the state after 8 of 12 steps is kept" in shown
    made.show("json")
    assert json.loads(capsys.readouterr().out)["recovery"]["trials"][1]["kl"] is None
    kept = replace(recovery, best_step=0)
    assert "the start is kept, none of 12 steps was better" in replace(made, recovery=kept).markdown()


def test_nothing_is_minus_zero() -> None:
    assert str(HeldOutLoss(3.0, -1e-9, 0.0)).startswith("+0.00% perplexity")
