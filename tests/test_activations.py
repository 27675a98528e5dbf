"""The benchmark of activation memory: reversible blocks store nothing, and the figures are of the step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsecli.bench.studies import activations
from sparsecli.bench.studies.activations import TrainedShape, TrainingStep, measure
from sparsecli.model.auto import build_network


def stored_bytes(kind: str, layers: int, attention: str) -> int:
    """Bytes that wait for the backward pass, without weights."""
    model = build_network(TrainedShape(64, attention, tokens=192).spec(kind, layers)).train()
    held = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    found: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    ids = torch.randint(activations.VOCABULARY, (1, 192))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = model(ids)  # alive while it is counted
    assert output.logits.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("attention", ["full", "lsh"])
def test_depth_stores_nothing_in_reversible_blocks(attention: str) -> None:
    growth = {
        kind: stored_bytes(kind, 5, attention) - stored_bytes(kind, 2, attention)
        for kind in ("stored", "reversible")
    }
    assert growth["stored"] > 3 * 192 * 64 * 4 * 10
    assert growth["reversible"] < 0.05 * growth["stored"]


@pytest.mark.parametrize("kind", activations.KINDS)
@pytest.mark.parametrize("source", [0, 160])
def test_a_step_is_measured(kind: str, source: int) -> None:
    step = measure(kind, TrainedShape(64, chunk=128, tokens=96, source=source), 2, "cpu")
    assert 0 <= step.activations < step.peak
    assert step.seconds > 0


def test_the_table_says_what_a_layer_adds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def pretend(kind: str, shape: TrainedShape, layers: int, *rest: object) -> TrainingStep:
        per_layer = 1 if kind == "reversible" else 100
        return TrainingStep((10 + per_layer * layers) * activations.MIB, 0, 0.002 * layers)

    monkeypatch.setattr(activations, "in_a_process", pretend)
    activations.run(TrainedShape(), [4, 8, 16], ["stored", "reversible"], "cpu", 1)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["stored", "410", "810", "1,610", "100.0", "2"] in rows
    assert ["reversible", "14", "18", "26", "1.0", "2"] in rows
