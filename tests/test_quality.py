"""The claim that the sparse quickstart model learns more than its dense twin: three seeds an arm, about 45 minutes.

`make quality` runs it and shows the table.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

import pytest

from sparsecli import console
from sparsecli.model.sizes import count_parameters
from sparsecli.recipe.loader import load
from sparsecli.train import command

ARMS = ("quickstart-dense", "quickstart", "quickstart-dense-conv")
SEEDS = (0, 1, 2)


@pytest.mark.slow
def test_sparse_is_below_its_dense_twin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Held-out loss, equal parameters, same text, each arm at the best learning rate of its recipe."""
    nats: dict[str, list[float]] = {}
    for arm in ARMS:
        for seed in SEEDS:
            result = command.run(load(arm, [f"seed={seed}"]), output=tmp_path / f"{arm}-{seed}")
            assert result
            nats.setdefault(arm, []).append(result.held_out_loss)
    dense = mean(nats["quickstart-dense"])
    rows = []
    for arm, values in nats.items():
        model = load(arm).recipe.model
        assert model
        rows.append(
            (
                arm,
                f"{count_parameters(model).total:,}",
                *(f"{value:.3f}" for value in values),
                f"{mean(values):.3f} ± {stdev(values):.3f}",
                f"{mean(values) / dense - 1:+.1%}",
            )
        )
    with capsys.disabled():
        columns = ("recipe", "parameters", *(f"seed {seed}" for seed in SEEDS), "mean", "against dense")
        console.print_table(columns, rows, title="held-out loss (nats/token)")
    assert mean(nats["quickstart"]) < 0.97 * dense
