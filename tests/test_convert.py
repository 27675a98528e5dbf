"""The command: given layers, a search within a budget, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_conversions import losses, search, trained

from sparsecli.console import Failure, Mismatch, RecipeError, Stopped
from sparsecli.convert import command
from sparsecli.convert.candidates import list_candidates
from sparsecli.convert.run import check_written
from sparsecli.convert.text import ConversionText
from sparsecli.data.packing import Windows, pack
from sparsecli.data.tokenization import END_OF_TEXT
from sparsecli.decode.native import binding
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.layers.attention import LowRank
from sparsecli.model.loading import load_model
from sparsecli.recipe.loader import LoadedRecipe, load
from sparsecli.spec.model import ModelSpec

pytestmark = pytest.mark.skipif(binding.available() is not None, reason="the native engine is not there")


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedRecipe, Path]:
    return trained(tmp_path_factory.mktemp("convert"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sparsecli.convert.run.ROUNDS", 1)


def test_given_layers_recover_most_of_the_loss(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, cache: None
) -> None:
    loaded, dense = dense_run
    report = command.run(loaded, model=str(dense), output=tmp_path / "sparse")
    assert report
    stages = losses(report)
    told = json.loads((dense / "run.json").read_text())["result"]["held_out_loss"]
    assert stages["dense"] == pytest.approx(told, abs=1e-5)  # float32 here and there
    assert stages["distilled"] < stages["fitted"]
    assert stages["distilled"] < stages["dense"] * 1.1
    assert report.result.loss.nats_per_token == pytest.approx(stages["distilled"], abs=0.02)
    assert report.recovery
    assert report.recovery.loss_after <= report.recovery.loss_before
    assert report.kept_fraction_by_layer == pytest.approx([0.25, 0.25])
    assert report.result.bytes_per_token < report.models[1].bytes_per_token
    assert [row.name for row in report.models[:3]] == [
        "dense, bfloat16",
        "dense, int8",
        "dense, 4 bit, nearest",
    ]

    written = json.loads((tmp_path / "sparse" / "report.json").read_text())
    assert written == json.loads(json.dumps(report.as_json()))
    assert report.verdict in (tmp_path / "sparse" / "report.md").read_text()
    assert (tmp_path / "sparse" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "sparse.converting").exists()
    model, _ = load_model(tmp_path / "sparse" / "model")
    assert model.config.spec.feed_forward.kind == "sparse"

    contents = sorted((tmp_path / "sparse").rglob("*"))
    with pytest.raises(Failure, match=r"already holds a run; choose another --output$"):
        command.run(loaded, model=str(dense), output=tmp_path / "sparse")
    assert sorted((tmp_path / "sparse").rglob("*")) == contents
    with pytest.raises(RecipeError, match="are sparse already"):
        command.run(loaded, model=str(tmp_path / "sparse"), output=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_windows_begin_as_generate_begins_a_text(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of imported models alone: what a model trained here has read begins with nothing."""
    loaded, dense = dense_run
    folder = Path(shutil.copytree(dense / "model", tmp_path / "model"))
    fields = json.loads((folder / "tokenizer.json").read_text())
    text, first = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [0], "tokens": [END_OF_TEXT]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    read: list[ConversionText] = []

    def conversion(**given: Any) -> SimpleNamespace:
        read.append(given["text"])
        return SimpleNamespace(run=lambda _: SimpleNamespace(show=lambda _: None))

    monkeypatch.setattr(command, "Conversion", conversion)
    config = json.loads((folder / "config.json").read_text())
    for origin in ({"source": "theirs"}, None):
        (folder / "config.json").write_text(json.dumps({**config, "origin": origin}))
        command.run(loaded, model=str(folder), output=tmp_path / "sparse")
    ours, plain = read
    for windows in (ours.tuning, ours.held_out, [{"input_ids": ids} for ids in torch.cat(ours.calibration)]):
        assert {(len(window["input_ids"]), int(window["input_ids"][0])) for window in windows} == {(32, 0)}
    stream = torch.from_numpy(ours.corpus.held_out.tokens.astype("int64"))
    held_out = torch.cat([window["input_ids"][1:] for window in ours.held_out])
    assert torch.equal(held_out, stream[: len(held_out)])
    assert 0 <= len(stream) - len(held_out) < 31
    assert ours.held_out.bytes_per_token(ours.corpus.tokenizer) == pytest.approx(
        plain.held_out.bytes_per_token(plain.corpus.tokenizer), rel=0.02
    )
    assert torch.equal(plain.held_out[0]["input_ids"], stream[:32])


def test_of_a_model_that_is_sparse_and_has_an_encoder_the_encoder_is_told() -> None:
    """Which is why it cannot be converted, whatever its layers are."""
    model, convert = load("terraformer-copy").recipe.model, load("quickstart-convert").recipe.convert
    assert model
    assert convert
    with pytest.raises(
        RecipeError, match=r"^r\.yaml: convert\.model: it has an encoder; only decoders with one"
    ):
        list_candidates(model, convert, "r.yaml")


def test_a_search_keeps_its_budget(
    dense_run: tuple[LoadedRecipe, Path],
    tmp_path: Path,
    cache: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded, dense = dense_run
    report = command.run(search(loaded, "perplexity +3 %"), model=str(dense), output=tmp_path / "found")
    assert report
    assert report.result.loss.perplexity_increase <= 0.03
    assert report.result.bytes_per_token < report.models[1].bytes_per_token
    assert {each.name.split()[0].strip(",") for each in report.candidates} == {
        "precision",
        "selector",
        "controller",
        "exact",
    }
    assert report.distillation_tokens == 0  # the budget was kept without
    told = capsys.readouterr().err
    for stage in (
        *("tokenizing: 40/40", "the dense model on tuning and held-out text: ", "fitting layers: 2/2"),
        *("precision, 8 of 16 units: 16/16", "attention 4 bit: 16/16", "logits in 4 bits: 16/16"),
        *(
            "on tuning text: 16/16",
            "evaluating dense, int8 in the engine: ",
            "loading the models to measure: 4/4",
        ),
    ):
        assert stage in told


def test_a_kept_fraction_is_a_budget_too(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, cache: None
) -> None:
    loaded, dense = dense_run
    changed = search(loaded, "kept 1/4", "convert.methods=[selector]", "convert.distillation.tokens=0")
    report = command.run(changed, model=str(dense), output=tmp_path / "found")
    assert report
    assert report.kept_fraction <= 0.25
    assert report.kept_fraction_by_layer == pytest.approx([report.kept_fraction] * 2)
    assert list(losses(report)) == ["dense", "fitted", "refitted"]


@pytest.mark.parametrize("layer", ["selector, bypass: 4", "precision"])
def test_given_layers_may_differ_in_their_active_units(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, cache: None, layer: str
) -> None:
    loaded, dense = dense_run
    given = f"{{kind: {layer}, d_ff: 64, activation: relu, gated: false, units_per_block: [3, 12]}}"
    overrides = [f"convert.feed_forward={given}", "convert.distillation.tokens=0"]
    report = command.run(load(str(loaded.path), overrides), model=str(dense), output=tmp_path / "converted")
    assert report
    assert report.method.endswith(", by layer")
    assert report.kept_fraction == 15 / 32
    assert report.kept_fraction_by_layer == pytest.approx([3 / 16, 12 / 16])
    assert report.result.loss.nats_per_token == pytest.approx(report.stages[-1].loss.nats_per_token, abs=0.02)


def test_low_rank_attention_alone(
    dense_run: tuple[LoadedRecipe, Path],
    tmp_path: Path,
    cache: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded, dense = dense_run
    overrides = ["convert.feed_forward=null", "convert.distillation.tokens=0"]
    changed = load(str(loaded.path), [*overrides, "convert.attention={kind: low_rank, rank: 12}"])
    report = command.run(changed, model=str(dense), output=tmp_path / "low")
    assert report
    assert report.method == "dense, attention rank 12"
    assert report.result.loss.perplexity_increase < 0.05
    assert report.result.bytes_per_token < report.models[1].bytes_per_token
    told = capsys.readouterr().err
    assert "relative squared error of attention projections: layers 0-0: query " in told
    model, _ = load_model(tmp_path / "low" / "model")
    assert isinstance(model.model.layers[0].attention.projection.query, LowRank)
    with pytest.raises(RecipeError, match="attention is not made of dense layers"):
        command.run(changed, model=str(tmp_path / "low"), output=tmp_path / "again")


def test_multiplicative_attention_beside_given_layers(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, cache: None
) -> None:
    loaded, dense = dense_run
    changed = load(str(loaded.path), ["convert.attention.kind=multiplicative"])
    report = command.run(changed, model=str(dense), output=tmp_path / "made")
    assert report
    stages = losses(report)
    assert stages["distilled"] < stages["fitted"]
    assert report.method == "controller, 4/16, attention multiplicative"
    assert report.result.loss.nats_per_token == pytest.approx(stages["distilled"], abs=0.02)


def test_a_search_counts_what_attention_costs(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, cache: None
) -> None:
    loaded, dense = dense_run
    overrides = ["convert.methods=[precision]", "convert.distillation.tokens=0"]
    low = search(loaded, "perplexity +5 %", *overrides, "convert.attention={kind: low_rank, rank: 12}")
    report = command.run(low, model=str(dense), output=tmp_path / "low")
    assert report
    assert report.result.loss.perplexity_increase <= 0.05
    assert all("attention rank 12" in each.name for each in report.candidates)

    bad = search(loaded, "perplexity +0.1 %", *overrides, "convert.attention.kind=multiplicative")
    with pytest.raises(Mismatch, match=r"no candidate meets perplexity \+0\.1 %; `budget: .*` can be met"):
        command.run(bad, model=str(dense), output=tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_units_that_exact_skips_are_counted(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, cache: None
) -> None:
    loaded, dense = dense_run
    changed = search(loaded, "perplexity +3 %", "convert.methods=[exact]", "convert.quantization={}")
    report = command.run(changed, model=str(dense), output=tmp_path / "found")
    assert report
    assert report.kept_fraction_by_layer
    assert 0 < max(report.kept_fraction_by_layer) < 1
    (planned,) = report.candidates
    assert report.result.bytes_per_token < planned.bytes_per_token  # which knows no count


def test_an_output_without_a_name(dense_run: tuple[LoadedRecipe, Path]) -> None:
    with pytest.raises(Failure, match=r"--output must name the folder itself"):
        command.run(dense_run[0], model=str(dense_run[1]), output=Path("."))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("convert.feed_forward.d_ff=96", "d_ff: 96, but the dense model has 64 units"),
        ("convert.feed_forward.activation=silu", "activation: silu, but the dense model has relu"),
        ("convert.feed_forward.gated=true", "gated: True, but the dense model has False"),
        ("convert.feed_forward.rank=33", "rank: 33 is more than the model's width 32"),
        ("convert.feed_forward.units_per_block=[1,2,3]", "3 numbers for 2 layers"),
        (
            "convert.quantization.projection=4 model=null convert.feed_forward.units_per_block=[1]",
            "1 numbers for 2",
        ),
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
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("units", "overrides", "message"),
    [
        (40, ["convert.methods=[precision]"], "40 units are not a multiple of 16"),
        (
            64,
            ["convert.quantization={head: 4, projection: 3}"],
            "convert.quantization: needs dense projections",
        ),
        (64, ["convert.budget=kept 1/0"], r"convert\.budget.*keeps inf of the units"),
        (64, ["convert.budget=quick"], "'quick' is not a budget; expected `loss"),
    ],
)
def test_a_search_that_cannot_be(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, units: int, overrides: list[str], message: str
) -> None:
    loaded, _ = dense_run
    assert loaded.recipe.model
    fields = loaded.recipe.model.model_dump()
    fields["feed_forward"]["d_ff"] = units
    fields["attention"] |= {"projection": "multiplicative"}
    spec = ModelSpec(**fields)
    ScalingTransformerConfig.from_spec(spec).save_pretrained(tmp_path / "dense")
    with pytest.raises(RecipeError, match=message):
        command.run(
            search(loaded, "loss +2 %", *overrides), model=str(tmp_path / "dense"), output=tmp_path / "found"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_two_streams_are_not_converted(dense_run: tuple[LoadedRecipe, Path], tmp_path: Path) -> None:
    loaded, _ = dense_run
    assert loaded.recipe.model
    spec = ModelSpec(**loaded.recipe.model.model_dump() | {"residual": "reversible"})
    ScalingTransformerConfig.from_spec(spec).save_pretrained(tmp_path / "dense")
    with pytest.raises(
        RecipeError, match="it is reversible; only decoders with one residual stream can be converted"
    ):
        command.run(loaded, model=str(tmp_path / "dense"), output=tmp_path / "found")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["convert.feed_forward=null"], "give a budget to search within, or feed_forward"),
        (["convert.budget=loss +1 %"], r"give only one: .*; convert\.feed_forward=null .* removes the other"),
        (
            ["convert.attention={kind: low_rank, rank: 33}"],
            "convert.attention: a rank of 33 is more than the full rank 32",
        ),
        (
            ["convert.attention.kind=multiplicative", "convert.quantization.projection=4"],
            "convert.quantization: needs dense projections",
        ),
    ],
)
def test_attention_that_does_not_fit(
    dense_run: tuple[LoadedRecipe, Path],
    tmp_path: Path,
    overrides: list[str],
    message: str,
) -> None:
    loaded, dense = dense_run
    with pytest.raises(RecipeError, match=message):
        command.run(load(str(loaded.path), overrides), model=str(dense), output=tmp_path / "sparse")
    assert not list(tmp_path.iterdir())


def test_a_model_must_be_named(dense_run: tuple[LoadedRecipe, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"convert\.model: missing"):
        command.run(dense_run[0], model=None, output=tmp_path / "sparse")


def test_tuning_text_is_not_trained_on(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing but it decides on a distillation: that gets no held-out text."""
    seen: list[Any] = []

    def note(*arguments: Any) -> None:
        seen.extend(each for each in arguments if isinstance(each, Windows))
        raise Stopped("stopped")

    monkeypatch.setattr("sparsecli.convert.run.distil", note)
    loaded, dense = dense_run
    with pytest.raises(Stopped):
        command.run(loaded, model=str(dense), output=tmp_path / "sparse")
    assert loaded.recipe.data
    every = pack(loaded.recipe.data).train.windows(32)  # type: ignore[arg-type]
    trained, tuning = (Counter(str(window["input_ids"].tolist()) for window in each) for each in seen)
    assert trained + tuning == Counter(str(window["input_ids"].tolist()) for window in every)
    assert tuning.total() == 16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["convert.calibration_tokens=10000000"], r"training tokens, but .* need 10,000,512"),
        (['data.paths=["TEXTS/../noise/*.txt"]'], "hardly better than by chance"),
    ],
)
def test_text_that_does_not_do(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, cache: None, overrides: list[str], message: str
) -> None:
    loaded, dense = dense_run
    texts = dense.parent / "texts"
    noise = dense.parent / "noise"
    noise.mkdir(exist_ok=True)
    random = Random(0)
    for number in range(20):
        letters = "".join(chr(random.randrange(0x4E00, 0x9FFF)) for _ in range(400))
        (noise / f"{number}.txt").write_text(letters)
    changed = load(str(loaded.path), [override.replace("TEXTS", str(texts)) for override in overrides])
    with pytest.raises(Failure, match=message):
        command.run(changed, model=str(dense), output=tmp_path / "sparse")
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


def test_a_torn_model_is_noticed(dense_run: tuple[LoadedRecipe, Path], tmp_path: Path) -> None:
    model, _ = load_model(dense_run[1] / "model")
    model.save_pretrained(tmp_path / "model")
    check_written(model, tmp_path / "model")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    with pytest.raises(Mismatch, match="logits differ"):
        check_written(model, tmp_path / "model")
