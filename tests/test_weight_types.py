"""The method `rounding`: its native loops, grids, estimates, the choice of types, and the whole command."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_conversions import search, trained
from torch.nn import functional as F

from sparsecli.console import Mismatch, RecipeError
from sparsecli.convert import command
from sparsecli.convert.linear_layers import (
    NARROW_TYPES,
    WIDE_TYPES,
    LinearLayer,
    TypeOption,
    choose_types,
    frontier,
    least_increase,
    linear_layers,
)
from sparsecli.convert.methods.grids import fit_grid
from sparsecli.convert.methods.rounding import InputMoment, inverse_factor, round_to_type, second_moment
from sparsecli.convert.streaming import dequantized, output_gradients, streamed_losses
from sparsecli.convert.type_search import TypeSearch
from sparsecli.convert.weight_types import RoundedLayers
from sparsecli.data.packing import Windows
from sparsecli.decode.native import binding
from sparsecli.decode.native.rounding import (
    fit_groups,
    fit_groups_slowly,
    nearest_codes,
    round_columns,
    round_columns_slowly,
)
from sparsecli.evaluate.losses import window_losses
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.gguf_types import IQ4_VALUES, TYPES, panels_of, values
from sparsecli.model.tokenizer import GGUF_METADATA
from sparsecli.recipe.loader import LoadedRecipe
from sparsecli.spec.model import ModelSpec, QuantizationSpec

engine = pytest.mark.skipif(binding.available() is not None, reason="the native engine is not there")


def spec(**changes: object) -> ModelSpec:
    fields = {
        "d_model": 32,
        "layers": 2,
        "heads": 4,
        "max_positions": 64,
        "positions": "rotary",
        "normalization": "rms",
        "feed_forward": {"kind": "dense", "d_ff": 64, "gated": True, "activation": "silu", "bias": False},
        "vocabulary": {"kind": "dense", "size": 100, "tied": True},
    }
    return ModelSpec.model_validate(fields | changes)


def model(of: ModelSpec) -> ScalingTransformerForCausalLM:
    torch.manual_seed(0)
    return ScalingTransformerForCausalLM(ScalingTransformerConfig.from_spec(of)).eval()


def token_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 100, (rows, length), generator=torch.Generator().manual_seed(1))


# -- native loops and their twins ------------------------------------------------------------------------------


@engine
@pytest.mark.parametrize(
    ("minimum", "lowest", "highest", "group", "table"),
    [
        (True, 0, 15, 32, ()),
        (False, -8, 7, 32, ()),
        (False, -32, 31, 16, ()),
        (False, -127, 127, 32, ()),
        (False, IQ4_VALUES[0], IQ4_VALUES[-1], 32, IQ4_VALUES),
    ],
)
def test_groups_are_fitted_as_by_the_twin(
    minimum: bool, lowest: int, highest: int, group: int, table: tuple[int, ...]
) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((50, 256), dtype=np.float32)
    weight[3] = 0
    weight[4] = np.abs(weight[4]) + 1  # no minimum below zero
    importance = random.random(256, dtype=np.float32) + 0.01
    arguments = weight, importance, group, lowest, highest, (1.0, 0.9, 0.8), minimum, table
    for ours, theirs in zip(fit_groups(*arguments), fit_groups_slowly(*arguments), strict=True):
        same = np.isclose(ours, theirs, rtol=2e-3, atol=2e-4)
        assert same.mean() > 0.99  # two guesses may be equally good


@engine
@pytest.mark.parametrize("table", [(), IQ4_VALUES], ids=["evenly", "a table"])
def test_columns_are_rounded_as_by_the_twin(table: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    columns, rows = 37, 1000
    factor = np.triu(0.3 * random.standard_normal((columns, columns), dtype=np.float32), 1)
    factor += 2 * np.eye(columns, dtype=np.float32)
    scales = random.random((3, rows), dtype=np.float32) / (20 if table else 1)
    scales[:, ::50] = 0
    offsets = np.zeros_like(scales) if table else -random.random((3, rows), dtype=np.float32)
    groups = np.sort(random.integers(0, 3, columns))
    first = random.standard_normal((columns, rows), dtype=np.float32)
    second = first.copy()
    ours = round_columns(first, scales, offsets, groups, factor, 0, 15, table)
    theirs = round_columns_slowly(second, scales, offsets, groups, factor, 0, 15, table)
    assert (ours[0] != theirs[0]).mean() < 1e-3  # ties of rounding
    same = (ours[0] == theirs[0]).all(axis=0)
    np.testing.assert_allclose(ours[1][:, same], theirs[1][:, same], atol=1e-5)
    np.testing.assert_allclose(first[:, same], second[:, same], atol=1e-5)


def test_the_factor_is_that_of_the_inverse() -> None:
    x = torch.randn(900, 600, generator=torch.Generator().manual_seed(0))  # wider than a triangle
    moment = second_moment(x)
    factor = inverse_factor(moment, 0.0).double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(
        factor.T @ factor @ moment, torch.eye(600, dtype=torch.float64), atol=2e-4, rtol=0
    )


# -- rounding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_rounding_to_second_order_loses_less_than_nearest(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(256, 256, generator=generator) / 16 + torch.eye(256)
    x = torch.randn(2000, 256, generator=generator) @ mixing * torch.rand(256, generator=generator)
    weight = torch.randn(40, 256, generator=generator) / 16
    inputs = InputMoment(second_moment(x))
    parts, made = round_to_type(TYPES[kind], weight, inputs)
    stored = values(TYPES[kind], panels_of(TYPES[kind], parts), 40, 256)
    np.testing.assert_array_equal(stored, made.numpy())  # what is stored is what was measured

    grid = fit_grid(TYPES[kind], weight, inputs.moment.diagonal())
    bounds = (-127, 127) if grid.table else (grid.lowest, grid.highest)
    scale, offset = (each.repeat_interleave(grid.group, 1) for each in (grid.scale, grid.offset))
    codes = ((weight - offset) / scale).clamp(-1000, 1000)
    if grid.table:
        codes = torch.tensor(grid.table)[nearest_codes(grid.table, codes.numpy())]
    nearest = codes.round().clamp(*bounds) * scale + offset

    def error(made: torch.Tensor) -> float:
        return float((x @ (made - weight).T).square().mean())

    assert error(made) < 0.8 * error(nearest)


# -- estimates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [{}, {"model.embedding": "Q8_0", "model.layers.1.feed_forward.up": "Q4_0"}])
def test_streamed_losses_are_those_of_the_whole_model(kept: dict[str, str]) -> None:
    network = model(spec(quantization=QuantizationSpec.model_validate({"gguf": kept})))
    for name, buffer in network.named_buffers():
        if name.endswith("codes"):
            buffer.copy_(torch.randint(0, 50, buffer.shape, generator=torch.Generator().manual_seed(2)))
    windows = Windows(token_ids(5, 16).flatten().numpy(), 16)
    whole = window_losses(network, windows)
    np.testing.assert_allclose(window_losses(dequantized(network), windows), whole, atol=1e-5)
    first, second = streamed_losses(network, [windows, windows], "testing")
    np.testing.assert_allclose(first, whole, atol=1e-5)
    np.testing.assert_allclose(second, whole, atol=1e-5)


def test_gradients_are_those_of_labels_that_the_model_draws() -> None:
    network, ids = model(spec()), token_ids(2, 16)
    found = output_gradients(network, [ids], torch.Generator().manual_seed(5))
    name = "model.layers.0.feed_forward.down"
    outputs: list[torch.Tensor] = []
    hook = network.get_submodule(name).register_forward_hook(lambda _, __, y: outputs.append(y))
    logits = network(ids).logits
    hook.remove()
    generator = torch.Generator().manual_seed(5)
    labels = [torch.multinomial(row.detach().softmax(-1), 1, generator=generator)[:, 0] for row in logits]
    loss = F.cross_entropy(logits.flatten(0, 1), torch.cat(labels), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, outputs[0])
    torch.testing.assert_close(found[name], gradient.flatten(0, 1).square().mean(dim=0), rtol=1e-4, atol=1e-9)
    assert set(found) == {each.name for each in linear_layers(spec()) if each.name != "model.embedding"} | {
        "head"
    }


# -- the choice ------------------------------------------------------------------------------------------------


def test_linear_layers_and_their_types() -> None:
    kept = QuantizationSpec.model_validate({"gguf": {"model.layers.0.feed_forward.up": "Q5_0"}})
    layers = {each.name: each for each in linear_layers(spec(quantization=kept))}
    assert len(layers) == 2 * 7 + 1
    assert layers["model.layers.0.feed_forward.up"].types == ["IQ4_NL", "Q4_1"]  # smaller
    assert layers["model.layers.1.feed_forward.up"].types == list(NARROW_TYPES)
    assert "head" not in layers  # tied
    assert LinearLayer("x", 4, 512, None).types == list(WIDE_TYPES)
    assert LinearLayer("x", 4, 48, None).types == []
    assert LinearLayer("x", 4, 512, None).bytes("Q4_K") == 4 * 2 * 144


def test_the_choice_is_near_the_best_of_all_combinations() -> None:
    random = np.random.default_rng(3)
    options = []
    for number in range(6):
        layer = LinearLayer(str(number), 8 * (1 + number), 256, None)
        increase = float(random.random())
        for name in layer.types:
            options.append(TypeOption(layer, name, layer.bytes(name), increase))
            increase *= float(random.random() * 0.5)
    groups = [[each for each in options if each.layer.name == str(number)] for number in range(6)]
    every = [(sum(o.bytes for o in some), sum(o.increase for o in some)) for some in product(*groups)]
    floor = min(increase for _, increase in every)
    for limit in (1.5 * floor, 5 * floor, 20 * floor, 100 * floor):
        chosen = choose_types(options, limit)
        assert chosen
        assert chosen.increase <= limit
        assert chosen.bytes <= 1.05 * min(size for size, increase in every if increase <= limit)
    least = min(size for size, _ in every)
    assert choose_types(options, floor / 2) is None
    assert least_increase(options, least - 1) is None
    for size in (least, int(1.2 * least), 3 * least):
        best = least_increase(options, size)
        assert best
        assert best.bytes <= size
        assert best.increase <= 1.3 * min(increase for other, increase in every if other <= size)
    sizes = [choice.bytes for choice in frontier(options, 5)]
    assert sizes == sorted(sizes)
    assert sizes[0] == least


# -- the command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedRecipe, Path]:
    return trained(tmp_path_factory.mktemp("convert"))


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sparsecli.convert.run.ROUNDS", 1)


@engine
def test_a_loss_budget_is_met_with_fewer_bytes(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, quick: None
) -> None:
    loaded, dense = dense_run
    recipe = search(loaded, "perplexity +10 %", "convert.methods=[rounding]")
    report = command.run(recipe, model=str(dense), output=tmp_path / "rounded")
    assert report
    assert report.method.startswith("rounding, ")
    assert report.result.loss.perplexity_increase < 0.1
    assert report.result.bytes_per_token < report.models[1].bytes_per_token  # int8
    config = json.loads((tmp_path / "rounded" / "model" / "config.json").read_text())
    assert set(config["quantization"]["gguf"]) == {
        each.name for each in linear_layers(spec_of(tmp_path / "rounded" / "model"))
    }
    sizes = [each.bytes_per_token for each in report.candidates]
    assert sizes == sorted(sizes)
    increases = [each.predicted_increase for each in report.candidates]
    assert increases == sorted(increases, reverse=True)


@engine
def test_weights_with_codes_keep_them_or_get_smaller_types(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, quick: None
) -> None:
    loaded, dense = dense_run
    first = search(loaded, "bytes 0.029 MB", "convert.methods=[rounding]")
    large = command.run(first, model=str(dense), output=tmp_path / "large")
    (tmp_path / "large" / "model" / GGUF_METADATA).write_bytes(
        b"vocabulary"
    )  # as an import from GGUF leaves it
    second = search(loaded, "bytes 0.020 MB", "convert.methods=[rounding]")
    small = command.run(second, model=str(tmp_path / "large"), output=tmp_path / "small")
    assert large
    assert small
    assert small.models[0].name == "dense, as it is"
    assert small.models[0].bytes_per_token == large.result.bytes_per_token <= 29_000
    assert small.result.bytes_per_token <= 20_000
    before, after = (spec_of(tmp_path / name / "model").quantization.gguf for name in ("large", "small"))
    kept = [name for name in before if before[name] == after[name]]
    assert kept
    assert (tmp_path / "small" / "model" / GGUF_METADATA).read_bytes() == b"vocabulary"
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("large", "small")]
    for name in kept:
        assert torch.equal(weights[0][f"{name}.codes"], weights[1][f"{name}.codes"])


def spec_of(folder: Path) -> ModelSpec:
    from sparsecli.model.files import read_description

    return read_description(folder).spec


@engine
def test_a_budget_that_no_types_meet_names_one_that_can_be_met(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, dense = dense_run
    fits = []
    original = RoundedLayers._round

    def counted(self: RoundedLayers, *arguments: object) -> dict[str, torch.Tensor]:
        fits.append(1)
        return original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(RoundedLayers, "_round", counted)
    recipe = search(loaded, "perplexity +0.0001 %", "convert.methods=[rounding]")
    with pytest.raises(Mismatch, match=r"no types meet .* can be met, and resumes from these fits"):
        command.run(recipe, model=str(dense), output=tmp_path / "rounded")
    assert len(fits) == 3  # two layers and the head
    recipe = search(loaded, "perplexity +20 %", "convert.methods=[rounding]")
    assert command.run(recipe, model=str(dense), output=tmp_path / "rounded")
    assert len(fits) == 3  # nothing was fitted again
    assert not (tmp_path / "rounded.converting").exists()


@engine
def test_a_larger_budget_accepts_the_model_that_exceeded_its_own(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the message of the failure says; it is neither searched for nor built again."""
    loaded, dense = dense_run
    built = []
    original = RoundedLayers.write
    monkeypatch.setattr(
        RoundedLayers, "write", lambda self, *arguments: (built.append(1), original(self, *arguments))[1]
    )
    monkeypatch.setattr(
        TypeSearch, "_tuning_increase", lambda *_: (0.0009, 0.00005)
    )  # tuning text flatters it
    tight = search(loaded, "perplexity +0.1 %", "convert.methods=[rounding]")
    monkeypatch.setattr("sparsecli.convert.type_search.UNDERESTIMATED", 1e-9)  # the fewest bits
    with pytest.raises(Mismatch, match="is exceeded on held-out text") as failure:
        command.run(tight, model=str(dense), output=tmp_path / "rounded")
    larger = re.search("`budget: (.*?)` accepts this model", str(failure.value))
    assert larger
    recipe = search(loaded, larger[1], "convert.methods=[rounding]")
    assert command.run(recipe, model=str(dense), output=tmp_path / "rounded")
    assert len(built) == 1


def test_rounding_stands_alone(dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, quick: None) -> None:
    loaded, dense = dense_run
    for budget, *overrides in (
        ("perplexity +5 %", "convert.methods=[rounding, precision]"),
        ("kept 1/4", "convert.methods=[rounding]"),
        ("perplexity +5 %", "convert.methods=[rounding]", "convert.quantization={head: 4}"),
    ):
        with pytest.raises(RecipeError, match="rounding stands alone"):
            command.run(search(loaded, budget, *overrides), model=str(dense), output=tmp_path / "no")
