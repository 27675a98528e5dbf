"""Each shipped recipe works: at its real sizes for a few steps; benchmarks build one block."""

from __future__ import annotations

from pathlib import Path

import pytest
from shipped_runs import SHORT_BENCH, run, trained

from sparsecli.recipe.loader import load, shipped


@pytest.mark.parametrize("name", [name for name in shipped() if load(name).recipe.train])
def test_training_recipes(place: Path, name: str) -> None:
    assert Path(trained(name), "loss.png").stat().st_size > 5000


@pytest.mark.parametrize("name", [name for name in shipped() if load(name).recipe.convert])
def test_converting_recipes(place: Path, name: str) -> None:
    report = Path(trained(name), "report.md").read_text()
    assert "x the speed of dense, bfloat16" in report
    methods = load(name).recipe.convert.methods
    assert ("| fitted |" in report) == (methods != ["rounding"])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if "17b" in name else name
        for name in shipped()
        if load(name).recipe.bench
    ],
)
def test_benchmark_recipes(place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("bench", name, *SHORT_BENCH)
    table = capsys.readouterr().out
    for variant in load(name).recipe.bench.variants:
        assert variant.name in table
