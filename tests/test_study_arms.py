"""Variants of a study that start from another: pruned models, and weights in fewer bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import write_texts
from test_studies import facts, quick, table  # noqa: F401

from sparsecli.bench import host
from sparsecli.console import RecipeError
from sparsecli.decode.native import binding
from sparsecli.model.auto import Network, build_network
from sparsecli.model.loading import load_network
from sparsecli.recipe.loader import load, parse
from sparsecli.recipe.schema import PruneSpec
from sparsecli.spec.model import ModelSpec
from sparsecli.study import command, training
from sparsecli.study.pruning import pruned, zeros
from sparsecli.train import run_directory

RECIPE = """
model:
  d_model: 32
  layers: 1
  heads: 2
  max_positions: 32
  positions: rotary
  feed_forward: {kind: dense, d_ff: 64}
  vocabulary: {kind: dense, size: 300, tied: true}
data:
  source: files
  paths: ["TEXTS/*.txt"]
  sequence_length: 16
  held_out_fraction: 0.4
  held_out_tokens: 64
  tokenizer: {kind: bpe, vocabulary_size: 300}
train: {max_steps: 6, per_device_train_batch_size: 4, logging_steps: 1, eval_steps: 2, save_steps: 2, warmup_steps: 3}
study:
  learning_rates: [1.0e-2]
  tuning_tokens: 64
  variants:
    - {name: dense}
    - {name: four bits, init_from: fewer units, quantize: {bits: 4}}
    - {name: fewer units, init_from: dense, prune: {units: 50 %, heads: 50 %}, tokens: 128, distil_from: dense}
    - {name: zeros, init_from: dense, prune: {weights: 60 %}, learning_rates: [5.0e-3, 1.0e-2]}
    - {name: int8, init_from: dense, quantize: {bits: 8, rounding: nearest}}
    - {name: longer, init_from: dense, tokens: 128}
bench: {dtypes: [float32], context: 4, rounds: 1, tokens_per_round: 2, warmup_tokens: 0}
"""
needs_engine = pytest.mark.skipif(binding.available() is not None, reason="no native engine")
SIZES = {"d_model": 16, "layers": 2, "heads": 4, "max_positions": 16, "positions": "rotary"}
SPARSE = {"kind": "sparse", "d_ff": 48, "block_size": 8, "rank": 4, "units_per_block": 2}


def network(feed_forward: dict, **fields: Any) -> Network:
    torch.manual_seed(0)
    vocabulary = {"kind": "dense", "size": 50}
    spec = ModelSpec.model_validate(
        {**SIZES, "vocabulary": vocabulary, "feed_forward": feed_forward, **fields}
    )
    return build_network(spec, eos_token_id=1).eval()


def logits(model: Network) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


# -- pruned models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "feed_forward", [{"kind": "dense", "d_ff": 24, "gated": True, "activation": "silu"}, SPARSE]
)
def test_units_and_heads_that_do_nothing_can_be_removed(feed_forward: dict) -> None:
    """Units, blocks and heads whose weights are tiny go, and the function stays."""
    model = network(feed_forward, attention={"projection": "dense", "key_value_heads": 2})
    size = 8 if feed_forward["kind"] == "sparse" else 1
    with torch.no_grad():
        for layer in model.model.layers:
            rows = torch.arange(feed_forward["d_ff"]).view(-1, size)[1::2].flatten()  # every second one
            for name, weight in layer.feed_forward.named_parameters():
                axis = 1 if name == "down.weight" else 0
                if weight.shape[axis] == feed_forward["d_ff"]:
                    weight.movedim(axis, 0)[rows] *= 1e-9
            attention = layer.attention
            attention.output.weight[:, 8:] *= 1e-9  # the second group: two queries with one key and value
            for projection, start in (("query", 8), ("key", 4), ("value", 4)):
                getattr(attention.projection, projection).weight[start:] *= 1e-9
    made = pruned(model, PruneSpec(units="50 %", heads="50 %"))
    spec = made.config.spec
    assert (spec.feed_forward.d_ff, spec.heads, spec.width_of_head) == (feed_forward["d_ff"] // 2, 2, 4)
    assert spec.attention.key_value_heads == 1
    assert made.config.eos_token_id == 1
    torch.testing.assert_close(logits(made), logits(model), atol=1e-5, rtol=1e-5)
    assert sum(map(torch.numel, made.parameters())) < sum(map(torch.numel, model.parameters()))


@pytest.mark.parametrize(
    "feed_forward",
    [
        {"kind": "mixture", "d_ff": 48, "experts": 6, "experts_per_token": 2},
        {"kind": "spark", "d_ff": 40, "active_units": 10, "predictor_width": 6},
    ],
)
def test_the_units_with_the_largest_weights_stay(feed_forward: dict) -> None:
    model = network(feed_forward)
    size = 8 if feed_forward["kind"] == "mixture" else 1
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("up", "down"):
                weight = getattr(layer.feed_forward, name)
                weight.view(-1, size * weight.shape[1])[::2] *= 3
    made = pruned(model, PruneSpec(units="50 %"))
    for ours, theirs in zip(made.model.layers, model.model.layers, strict=True):
        up = theirs.feed_forward.up
        assert torch.equal(ours.feed_forward.up, up.view(-1, size, up.shape[1])[::2].flatten(0, 1))
    spec = made.config.spec.feed_forward
    assert spec.experts == 3 if size > 1 else spec.active_units == 5
    assert logits(made).isfinite().all()


def test_single_weights_become_zero() -> None:
    model = network(SPARSE)
    made = pruned(model, PruneSpec(weights="60 %"))
    assert zeros(model) == 0
    assert zeros(made) == pytest.approx(0.6, abs=0.001)
    assert made.config.spec == model.config.spec
    before, after = model.state_dict(), made.state_dict()
    assert before.keys() == after.keys()
    kept = [before[name][after[name] != 0].abs().min() for name in before if ".up" in name]
    gone = [before[name][after[name] == 0].abs().max() for name in before if ".up" in name]
    assert max(gone) < min(kept)  # the smallest of all layers together
    assert torch.equal(after["model.embedding.weight"], before["model.embedding.weight"])


# -- in a study ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("arms")
    write_texts(folder)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("TEXTS", str(folder / "texts")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSECLI_CACHE", str(folder / "cache"))
        patch.setattr(host, "bandwidth", lambda **_: 20.0)
        yield path


@pytest.fixture(scope="module")
def finished(file: Path) -> Path:
    """A whole study of such variants."""
    output = file.parent / "finished"
    command.run(load(str(file)), output=output)
    return output


@needs_engine
def test_every_variant_has_its_row(finished: Path) -> None:
    rows = table(finished)
    assert list(rows) == ["dense", "four bits", "fewer units", "zeros", "int8", "longer"]
    dense, pruned_row = rows["dense"], rows["fewer units"]
    whole = 6 * 4 * 16
    assert [row["tokens"] for row in rows.values()] == [
        *(whole, whole + 128, whole + 128),
        *(whole + 128, whole, whole + 128),  # a quarter of six steps: two
    ]
    assert pruned_row["parameters"] < dense["parameters"] == rows["zeros"]["parameters"]
    types = {name: row["decoding"][0]["dtype"] for name, row in rows.items()}
    assert types == {
        "dense": "float32",
        "four bits": "IQ4_NL",
        "fewer units": "float32",
        "zeros": "float32",
        "int8": "int8",
        "longer": "float32",
    }
    size = {name: row["decoding"][0]["bytes_per_token"] for name, row in rows.items()}
    assert size["four bits"] < size["fewer units"] < size["dense"] == size["zeros"]
    assert size["int8"] < 0.4 * size["dense"]
    assert all(row["held_out_loss"] > 0 for row in rows.values())
    assert rows["int8"]["held_out_loss"] == pytest.approx(dense["held_out_loss"], abs=0.01)
    assert rows["four bits"]["held_out_loss"] != pruned_row["held_out_loss"]
    assert rows["zeros"]["trials"].keys() == {"0.005", "0.01"}
    assert rows["zeros"]["border"]
    assert rows["int8"]["learning_rate"] == 0.01
    assert not rows["int8"]["border"]
    text = (finished / "study.md").read_text()
    for line in (
        "- fewer units: dense without 50 % of the units and 50 % of the heads, then 128 further tokens after 384.",
        "- zeros: dense without 60 % of the weights, which are zero and still read, then 128 further tokens after 384.",
        "- four bits: fewer units with weights of 4 bits, rounded to second order.",
        "- int8: dense with weights of 8 bits, rounded to the nearest.",
        "- longer: dense, then 128 further tokens after 384.",
    ):
        assert line in text
    points = {name: (row["decoding"][0]["ms_per_token"], row["held_out_loss"]) for name, row in rows.items()}
    best = [
        name
        for name, (time, loss) in sorted(points.items(), key=lambda pair: pair[1])
        if not any(each[0] <= time and each[1] <= loss for other, each in points.items() if other != name)
    ]
    assert f"No other variant has both a lower loss and a shorter time than: {', '.join(best)}.\n" in text
    assert "| weights | MB / token | ms / token |" in text
    assert (finished / "loss-time.png").stat().st_size > 5000


@needs_engine
def test_what_was_zero_stays_zero_and_heads_are_gone(finished: Path) -> None:
    runs = finished / "runs"
    model = load_network(
        runs / "zeros" / f"rate-{table(finished)['zeros']['learning_rate']:g}-seed-0" / "model"
    )
    start = load_network(runs / "zeros" / "weights-60-rate-0.01-seed-0")
    assert zeros(model) == zeros(start) == pytest.approx(0.6, abs=0.001)
    name = "model.layers.0.feed_forward.up.weight"
    assert not torch.equal(model.state_dict()[name], start.state_dict()[name])
    smaller = load_network(runs / "fewer-units" / "rate-0.01-seed-0" / "model").config.spec
    assert (smaller.heads, smaller.feed_forward.d_ff) == (1, 32)
    recipe = load(str(runs / "fewer-units" / "rate-0.01-seed-0" / "recipe.yaml")).recipe
    assert recipe.train
    assert recipe.train.distillation
    assert recipe.train.distillation.teacher == str(runs / "dense" / "rate-0.01-seed-0")
    assert recipe.train.init_from == str(runs / "fewer-units" / "units-50-heads-50-rate-0.01-seed-0")
    assert (recipe.train.max_steps, recipe.train.warmup_steps, recipe.train.keep_zeros) == (2, 1, False)
    rounded = load_network(runs / "four-bits" / "4-bits-second_order-rate-0.01-seed-0" / "model")
    assert set(rounded.config.spec.quantization.gguf.values()) == {"IQ4_NL"}


@needs_engine
def test_a_finished_study_makes_nothing_again(
    finished: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "draw", lambda *_: None)
    before = (finished / "study.json").read_bytes()
    for name in ("train", "pruned", "quantize", "measure"):
        monkeypatch.setattr(training, name, None)
    monkeypatch.setattr("sparsecli.bench.command._measure", None)
    command.run(load(str(file)), output=finished)
    assert (finished / "study.json").read_bytes() == before


@needs_engine
def test_what_was_cut_off_is_made_again(finished: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded weights without their figures, and a pruned model whose run did not begin."""
    before = {row["variant"]: row for row in json.loads((finished / "study.json").read_text())["rows"]}
    rounded = finished / "runs" / "four-bits" / "4-bits-second_order-rate-0.01-seed-0"
    (rounded / run_directory.FACTS).unlink()
    monkeypatch.setattr(command, "draw", lambda *_: None)
    monkeypatch.setattr(training, "train", None)
    command.run(load(str(file)), output=finished)
    after = table(finished)
    assert after["four bits"]["held_out_losses"] == before["four bits"]["held_out_losses"]
    assert facts(finished, str(rounded.relative_to(finished / "runs")))["source"].endswith("rate-0.01-seed-0")


# -- recipes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "study.variants.2.init_from=big",
            "study.variants[2].init_from: 'big' is not one of dense, four bits",
        ),
        ("study.variants.5.init_from=longer", "'longer' would start from itself"),
        ("study.variants.0.prune={units: 50 %}", "needs init_from, the variant whose model it changes"),
        ("study.variants.5.model={layers: 2}", "the architecture is that of init_from"),
        ("study.variants.4.tokens=100", "quantize trains nothing"),
        ("study.variants.5.init_from=int8", "'int8' has quantized weights, which nothing learns from"),
        ("study.variants.2.prune={}", "give a share of units, heads or weights"),
        ("study.variants.2.prune={units: 100 %}", "expected more than 0 % and less than 100 %"),
        ("study.variants.2.prune={units: 50 %, weights: 50 %}", "use two variants"),
        (
            "study.variants.0.model={attention: {projection: multiplicative, modules: 2}}",
            "study.variants[2].prune: cannot be done to dense: heads needs residual: single and dense projections",
        ),
        (
            "study.variants.0.model={feed_forward: {kind: sparse, d_ff: 64, block_size: 8, rank: 4}}",
            "study.variants[1].quantize.rounding: second_order is for decoders with dense feed-forward layers",
        ),
    ],
)
def test_wrong_variants_are_one_line(override: str, line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(RECIPE, "r.yaml", [override])
    (message,) = caught.value.message.splitlines()
    assert line in message


def test_a_share_of_blocks_keeps_whole_blocks() -> None:
    spec = network(SPARSE).config.spec
    assert [PruneSpec(units=f"{share} %").apply(spec).feed_forward.d_ff for share in (10, 50, 99)] == [
        40,
        24,
        8,
    ]
    assert np.isclose(PruneSpec(units="50 %").apply(spec).kept_fraction, spec.kept_fraction)
