"""Each shipped recipe works: at its real sizes for a few steps; benchmarks build one block."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from shipped_runs import run, short_bench, shortened, trained

from sparsecli.model.card import CARD
from sparsecli.recipe import commands
from sparsecli.recipe.loader import load, shipped
from sparsecli.train import journal

STUDIES = [name for name in shipped() if load(name).recipe.study]


@pytest.mark.parametrize(
    "name", [name for name in shipped() if load(name).recipe.train and name not in STUDIES]
)
def test_training_recipes(place: Path, name: str) -> None:
    assert Path(trained(name), "loss.png").stat().st_size > 5000


@pytest.mark.usefixtures("quick_probe")
@pytest.mark.parametrize(
    "name",
    [name if name == "study-quick" else pytest.param(name, marks=pytest.mark.slow) for name in STUDIES],
)
def test_studies(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)  # these two take longer than such a short run
    monkeypatch.setattr(journal, "draw_loss", lambda *_: None)
    run("train", *shortened(name), "--output", f"runs/{name}")
    study = load(name).recipe.study
    assert study
    table = Path(f"runs/{name}/study.md").read_text()
    assert all(f"| {variant.name} |" in table for variant in study.variants)


@pytest.mark.parametrize("name", [name for name in STUDIES if load(name).recipe.study.equal_parameters])
def test_variants_of_studies_agree_in_size(name: str) -> None:
    study, sizes = load(name).recipe.study, dict(commands.sizes(load(name).recipe))
    assert study
    assert study.equal_parameters
    commands.check_sizes(study, sizes, Path(name))
    if name == "study-equal-quality":
        sparse = sizes["Sparse FF 2 of 32"].active
        for mixture in ("MoE 1 of 5", "MoE 2 of 10"):
            assert sizes[mixture].active == pytest.approx(sparse, rel=0.01)


@pytest.mark.parametrize("name", [name for name in shipped() if load(name).recipe.convert])
def test_converting_recipes(place: Path, name: str) -> None:
    report = Path(trained(name), "report.md").read_text()
    assert "x the speed of dense, bfloat16" in report
    card = Path("runs", name, "model", CARD).read_text()
    assert "| dense, bfloat16 |" in card
    assert "not known; ask the makers" in card
    methods = load(name).recipe.convert.methods
    assert ("| fitted |" in report) == (methods != ["rounding"])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if "17b" in name else name
        for name in shipped()
        if load(name).recipe.bench and name not in STUDIES
    ],
)
def test_benchmark_recipes(place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("bench", name, *short_bench(name))
    table = capsys.readouterr().out
    for variant in load(name).recipe.bench.variants:
        assert variant.name in table
