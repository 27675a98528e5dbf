"""From a dense run to a sparse one: units copied, controllers fitted, loss recovered, nothing overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparsecli.console import Failure, Mismatch, RecipeError
from sparsecli.convert import command
from sparsecli.convert.feed_forward import (
    captured_share,
    copy_units,
    fit_controller,
    start_controller,
)
from sparsecli.model.checkpoint import load_model
from sparsecli.model.layers.feed_forward import DenseFeedForward, SparseFeedForward
from sparsecli.recipe.loader import LoadedRecipe, load
from sparsecli.train import trainer
from sparsecli.train.controllers import unit_scores

RECIPE = """
model:
  d_model: 32
  layers: 2
  heads: 4
  max_positions: 32
  positions: rotary
  feed_forward: {kind: dense, d_ff: 64}
  vocabulary: {kind: dense, size: 300, tied: true}
data:
  source: files
  paths: ["TEXTS/*.txt"]
  sequence_length: 32
  tokenizer: {kind: bpe, vocabulary_size: 300}
train: {max_steps: 120, per_device_train_batch_size: 8, learning_rate: 0.003, eval_steps: 120, save_steps: 120}
convert:
  feed_forward: {kind: sparse, d_ff: 64, block_size: 16, units_per_block: 4, rank: 12}
  calibration_tokens: 2048
  controller_steps: 100
  distillation: {tokens: 10_240, batch_size: 8, learning_rate: 0.002}
"""


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedRecipe, Path]:
    """A recipe, and the dense run that it trained on text with something to learn."""
    folder = tmp_path_factory.mktemp("convert")
    (folder / "texts").mkdir()
    for number in range(40):
        words = [f"{a} plus {b} is {a + b}. " for a in range(number, number + 8) for b in range(6)]
        (folder / "texts" / f"{number}.txt").write_text("".join(words))
    recipe = folder / "sums.yaml"
    recipe.write_text(RECIPE.replace("TEXTS", str(folder / "texts")))
    loaded = load(str(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSECLI_CACHE", str(folder / "cache"))
        trainer.run(loaded, output=folder / "dense")
    return loaded, folder / "dense"


def layers(
    activation: str = "relu", gated: bool = False, rank: int = 12
) -> tuple[DenseFeedForward, SparseFeedForward]:
    torch.manual_seed(0)
    dense = DenseFeedForward(24, 64, activation, gated, bias=not gated)
    for parameter in dense.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    sparse = SparseFeedForward(24, 64, 16, rank, 4, activation, gated, unit_bias=not gated).eval()
    copy_units(dense, sparse)
    return dense, sparse


@pytest.mark.parametrize(("activation", "gated"), [("relu", False), ("gelu", False), ("silu", True)])
@torch.no_grad()
def test_copied_units_compute_the_same(activation: str, gated: bool) -> None:
    """With a mask that lets every unit through, the sparse layer is the dense one."""
    dense, sparse = layers(activation, gated)
    x = torch.randn(5, 24)
    everything = torch.ones(5, 4, 16)
    torch.testing.assert_close(sparse._masked(x, everything, None), dense(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rank", "least"), [(4, 0.75), (20, 0.98)])
def test_fitting_a_controller_finds_the_units_that_matter(rank: int, least: float) -> None:
    _, sparse = layers(rank=rank)
    # Inputs that spread less and less along 24 directions, as real ones do.
    x = (torch.randn(4096, 24) * 3 * 0.95 ** torch.arange(24)) @ torch.linalg.qr(torch.randn(24, 24))[0]
    scores = unit_scores(sparse, x)
    by_chance = captured_share(sparse, x, scores)
    start_controller(sparse, x)
    started = captured_share(sparse, x, scores)
    fitted = fit_controller(sparse, x, steps=200, generator=torch.Generator().manual_seed(0))
    assert by_chance < 0.6 < started
    assert fitted == captured_share(sparse, x, scores) >= max(started, least)
    assert rank > 4 or fitted > started


def test_conversion_recovers_most_of_the_loss(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, dense = dense_run
    monkeypatch.setenv("SPARSECLI_CACHE", str(tmp_path / "cache"))
    report = command.run(loaded, model=str(dense), output=tmp_path / "sparse")
    assert report
    before, fitted, distilled = (stage.nats_per_token for stage in report.stages)
    trained = json.loads((dense / "run.json").read_text())["result"]["held_out_nats"]
    assert before == pytest.approx(trained, abs=1e-3)
    assert distilled < fitted
    assert distilled < before * 1.1
    written = json.loads((tmp_path / "sparse" / "report.json").read_text())
    assert written == report.as_json()
    assert "against dense" in (tmp_path / "sparse" / "report.md").read_text()

    model, _ = load_model(tmp_path / "sparse" / "model")
    assert model.config.spec.feed_forward.kind == "sparse"
    assert report.sparse_bytes_per_token < report.dense_bytes_per_token

    contents = sorted((tmp_path / "sparse").rglob("*"))
    with pytest.raises(Failure, match=r"already holds a run; choose another --output$"):
        command.run(loaded, model=str(dense), output=tmp_path / "sparse")
    assert sorted((tmp_path / "sparse").rglob("*")) == contents
    with pytest.raises(RecipeError, match="are sparse already"):
        command.run(loaded, model=str(tmp_path / "sparse"), output=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_dry_run_writes_nothing(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, dense = dense_run
    command.run(loaded, model=str(dense), output=tmp_path / "sparse", dry_run=True)
    assert "4 of every 16" in capsys.readouterr().out
    assert not (tmp_path / "sparse").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("convert.feed_forward.d_ff=96", "d_ff: 96, but the dense model has 64 units"),
        ("convert.feed_forward.activation=silu", "activation: silu, but the dense model has relu"),
        ("convert.feed_forward.gated=true", "gated: True, but the dense model has False"),
        ("convert.feed_forward.rank=33", "rank: 33 is more than the model's width 32"),
        (
            "model.max_positions=64 data.sequence_length=33",
            "sequence_length: 33 is longer than the dense model's context of 32",
        ),
    ],
)
def test_layers_that_do_not_fit(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, override: str, message: str
) -> None:
    loaded, dense = dense_run
    changed = load(str(loaded.path), override.split())
    with pytest.raises(RecipeError, match=message):
        command.run(changed, model=str(dense), output=tmp_path / "sparse")


def test_a_model_must_be_named(dense_run: tuple[LoadedRecipe, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"convert\.model: missing"):
        command.run(dense_run[0], model=None, output=tmp_path / "sparse")


def test_a_seed_reproduces_a_conversion(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, dense = dense_run
    monkeypatch.setenv("SPARSECLI_CACHE", str(tmp_path / "cache"))
    config = json.loads((dense / "model" / "config.json").read_text())
    (dense / "model" / "config.json").write_text(json.dumps(config | {"dropout": 0.1}))
    short = load(str(loaded.path), ["convert.distillation.tokens=768", "convert.controller_steps=3"])
    weights = []
    for attempt in range(2):
        torch.manual_seed(attempt)  # whatever was drawn before
        command.run(short, model=str(dense), output=tmp_path / str(attempt))
        weights.append((tmp_path / str(attempt) / "model" / "model.safetensors").read_bytes())
    (dense / "model" / "config.json").write_text(json.dumps(config))
    assert weights[0] == weights[1]


def test_all_but_the_feed_forward_layers_is_kept(dense_run: tuple[LoadedRecipe, Path]) -> None:
    loaded, folder = dense_run
    dense, _ = load_model(folder / "model")
    spec = command.sparse_spec(dense.config.spec, loaded.recipe.convert.feed_forward, "recipe")
    sparse = command._with_units_of(dense, spec).state_dict()
    kept = {name: value for name, value in dense.state_dict().items() if ".feed_forward." not in name}
    assert len(kept) > 20
    for name, value in kept.items():
        assert torch.equal(sparse[name], value), name


def test_a_torn_model_is_noticed(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_model(dense_run[1] / "model")
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((dense_run[1] / "model" / name).read_bytes())
    command._verify(model, tmp_path / "model")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    with pytest.raises(Mismatch, match="logits differ"):
        command._verify(model, tmp_path / "model")
