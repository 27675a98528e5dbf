"""The converter's parts: budgets, rounding, methods, refit, and what calibration text goes through."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_models import network, some_tokens
from torch import Tensor

from sparsecli.console import Mismatch
from sparsecli.convert.candidates import search_space, with_quantization
from sparsecli.convert.evaluate import timed_lengths
from sparsecli.convert.methods import METHODS
from sparsecli.convert.methods.base import FitOptions, copy_units
from sparsecli.convert.methods.calibration import ResidualStreams, record_inputs
from sparsecli.convert.methods.controller import captured_share, fit_controller, initialize_controller
from sparsecli.convert.methods.fitting import fit_model, initialize_from_dense
from sparsecli.convert.methods.refit import reduced_rank_regression, refit_layer
from sparsecli.convert.methods.rounding import round_second_order, second_moment
from sparsecli.convert.search import loss_budget, rank_candidates, with_prediction
from sparsecli.evaluate.losses import HeldOutLoss
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.layers.feed_forward import ChosenUnits, DenseFeedForward, SparseFeedForward
from sparsecli.model.layers.quantized import PrecisionFeedForward, QuantizedMatrix, SelectorFeedForward
from sparsecli.recipe.budget import Budget, parse_budget
from sparsecli.spec.feed_forward import DenseFeedForwardSpec
from sparsecli.spec.model import DEFAULT, ModelSpec, QuantizationSpec
from sparsecli.train.controllers import unit_scores
from sparsecli.train.distillation import Teacher

WIDTH, UNITS = 24, 64
OPTIONS = FitOptions(50, torch.Generator().manual_seed(0))


def inputs(tokens: int = 4096) -> Tensor:
    """Inputs that spread less and less along WIDTH directions, as real ones do."""
    torch.manual_seed(1)
    axes = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    return (torch.randn(tokens, WIDTH) * 3 * 0.95 ** torch.arange(WIDTH)) @ axes


def dense_layer(activation: str = "relu", gated: bool = False) -> DenseFeedForward:
    torch.manual_seed(0)
    layer = DenseFeedForward(WIDTH, UNITS, activation, gated, bias=not gated)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def converted(name: str, dense: DenseFeedForward, k: int, x: Tensor) -> torch.nn.Module:
    """The layer that a method makes of `dense`, fitted on x."""
    gated = dense.gate is not None
    spec = DenseFeedForwardSpec(
        kind="dense", d_ff=UNITS, activation=dense.activation, gated=gated, bias=not gated
    )
    method = METHODS[name]
    fields = method.spec(spec, WIDTH, k, rank=12).model_dump(exclude={"kind", "gate"})
    kind = {"precision": PrecisionFeedForward, "controller": SparseFeedForward}.get(name, SelectorFeedForward)
    layer = kind(WIDTH, **fields).eval()
    with torch.no_grad():
        method.fit(dense, layer, x, OPTIONS)
    return layer


def error(layer: torch.nn.Module, dense: DenseFeedForward, x: Tensor) -> float:
    """Squared error relative to what the dense layer gives."""
    with torch.no_grad():
        wanted = dense(x)
        return ((layer(x) - wanted).square().sum() / wanted.square().sum()).item()


# -- budgets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "value", "written"),
    [
        ("loss +2 %", "loss", 0.02, "loss +2 %"),
        ("Perplexity 0.5%", "perplexity", 0.005, "perplexity +0.5 %"),
        ("kept 1/4", "kept", 0.25, "kept 25 %"),
        ("kept 12.5 %", "kept", 0.125, "kept 12.5 %"),
        ("bytes 100 MB", "bytes", 1e8, "bytes 100 MB"),
        ("bytes 12.34567 GB", "bytes", 12.34567e9, "bytes 12345.67 MB"),
        ("loss +123.4 %", "loss", 1.234, "loss +123.4 %"),
    ],
)
def test_budget(text: str, kind: str, value: float, written: str) -> None:
    budget = parse_budget(text)
    assert (budget.kind, budget.value) == (kind, pytest.approx(value))
    assert str(budget) == written
    assert parse_budget(written) == budget


@pytest.mark.parametrize(
    "text", ["", "loss", "loss 2", "loss -2 %", "kept 5/4", "kept 1/0", "bytes 100", "speed 2x"]
)
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(ValueError, match=r"budget|share"):
        parse_budget(text)


def test_budgets_in_nats() -> None:
    assert parse_budget("loss +2 %").nats(3.0) == pytest.approx(0.06)
    assert parse_budget("perplexity +5 %").nats(3.0) == pytest.approx(math.log(1.05))
    assert parse_budget("kept 1/4").nats(3.0) is None
    assert loss_budget(Budget("perplexity", 0.01), math.log(1.0231), 3.0) == "perplexity +2.4 %"
    assert loss_budget(Budget("loss", 0.01), 0.3001, 3.0) == "loss +10.1 %"
    far = parse_budget(loss_budget(Budget("perplexity", 0.01), 50.0, 3.0))  # at once, and not step by step
    assert far.nats(3.0) == pytest.approx(50)


def test_paired_losses() -> None:
    dense = np.array([1.0, 5.0, 3.0])
    loss = HeldOutLoss.paired(dense + np.array([0.1, 0.1, 0.1]), dense)
    assert loss.increase == pytest.approx(0.1)
    assert loss.standard_error == pytest.approx(0, abs=1e-9)  # the windows differ, their differences do not
    assert loss.perplexity_increase == pytest.approx(math.expm1(0.1))
    assert loss.relative_increase == pytest.approx(0.1 / 3)
    assert (
        HeldOutLoss.paired(dense[:1], dense[:1]).standard_error is None
    )  # and not NaN, which JSON cannot hold


@pytest.mark.parametrize("positions", [2, 3, 8, 10, 11, 73, 74, 4096])
def test_speed_is_measured_in_contexts_of_any_length(positions: int) -> None:
    context, warmup, steps = timed_lengths(positions)
    assert context + warmup + steps <= positions
    assert context >= 1 <= steps
    assert warmup >= 0
    assert positions < 74 or (context, warmup, steps) == (64, 2, 8)


# -- rounding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4])
def test_second_order_rounding_keeps_products_better(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2048, 20) @ torch.randn(20, 150) + 0.1 * torch.randn(2048, 150)  # correlated columns
    weight = torch.randn(40, 150)
    nearest, second_order = QuantizedMatrix(40, 150, bits), QuantizedMatrix(40, 150, bits)
    nearest.copy_(weight)
    round_second_order(second_order, weight, second_moment(x))
    wanted = x @ weight.T

    def lost(matrix: QuantizedMatrix) -> float:
        return ((matrix(x) - wanted).square().mean() / wanted.square().mean()).item()

    assert lost(second_order) < 0.3 * lost(nearest)
    assert int((second_order.codes & 15).max()) < 2**bits


def test_rounding_of_inputs_that_are_all_zero() -> None:
    matrix = QuantizedMatrix(8, 70, 4)
    weight = torch.randn(8, 70)
    round_second_order(matrix, weight, torch.zeros(70, 70, dtype=torch.float64))
    assert (matrix.weight - weight).abs().max() < 0.3


# -- methods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "gated"), [("relu", False), ("gelu_tanh", False), ("silu", True)])
@pytest.mark.parametrize(("name", "most"), [("precision", 5e-4), ("selector", 1e-10)])
def test_every_unit_chosen_is_the_dense_layer(name: str, most: float, activation: str, gated: bool) -> None:
    """Selected units are exact; those of `precision` have 8 bits."""
    dense, x = dense_layer(activation, gated), inputs()
    assert error(converted(name, dense, 16, x), dense, inputs(100)) < most


@pytest.mark.parametrize(("activation", "gated"), [("relu", False), ("silu", True)])
def test_more_units_lose_less(activation: str, gated: bool) -> None:
    dense, x = dense_layer(activation, gated), inputs()
    for name, choices in (
        ("precision", (0, 1, 4, 16)),
        ("selector", (2, 6, 12, 16)),
        ("controller", (2, 6, 12)),
    ):
        errors = [error(converted(name, dense, k, x), dense, x) for k in choices]
        assert errors == sorted(errors, reverse=True), name


def test_a_low_bit_sketch_chooses_better_than_a_low_rank_controller() -> None:
    dense, x = dense_layer("silu", gated=True), inputs()
    assert error(converted("selector", dense, 8, x), dense, x) < error(
        converted("controller", dense, 8, x), dense, x
    )


def test_exact_skips_zeros_and_loses_almost_nothing() -> None:
    dense, x = dense_layer(), inputs()
    with torch.no_grad():
        dense.up.bias -= 2.0  # most units are silent
    layer = converted("exact", dense, 16, x)
    assert isinstance(layer, SelectorFeedForward)
    other = inputs(500)
    active = (dense.up(other) > 0).float().mean().item()
    chosen = layer.mask(other).mean().item()
    assert active < chosen < active + 0.1 < 0.6
    assert error(layer, dense, other) < 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_that_gives_nothing(name: str) -> None:
    """As pruned and grown models have them."""
    dense, x = dense_layer(), inputs(500)
    for parameter in dense.parameters():
        torch.nn.init.zeros_(parameter)
    layer = converted(name, dense, 16 if name == "exact" else 4, x)
    for key, value in layer.state_dict().items():
        assert value.isfinite().all(), key
    assert not layer(x).any()


@pytest.mark.parametrize(("rank", "least"), [(4, 0.72), (20, 0.98)])
def test_fitting_a_controller_finds_the_units_that_matter(rank: int, least: float) -> None:
    dense = dense_layer()
    sparse = SparseFeedForward(WIDTH, UNITS, 16, rank, 4, "relu", unit_bias=True).eval()
    copy_units(dense, sparse)
    x = inputs()
    scores = unit_scores(sparse, x)
    by_chance = captured_share(sparse, x, scores)
    initialize_controller(sparse, x)
    started = captured_share(sparse, x, scores)
    fitted = fit_controller(sparse, x, steps=200, generator=torch.Generator().manual_seed(0))
    assert by_chance < 0.6 < started
    assert fitted == captured_share(sparse, x, scores) >= max(started, least)
    assert rank > 4 or fitted > started


# -- refit ---------------------------------------------------------------------------------------------------


def test_low_rank_finds_a_map_of_that_rank() -> None:
    torch.manual_seed(0)
    x, first, second = torch.randn(500, 12), torch.randn(3, 12), torch.randn(7, 3)
    found_first, found_second = reduced_rank_regression(x, x @ first.T @ second.T, torch.ones(500), 3)
    assert found_first.shape == (3, 12)
    torch.testing.assert_close(found_second @ found_first, second @ first, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["selector", "controller"])
def test_refit_makes_up_for_units_left_out(name: str) -> None:
    dense, x = dense_layer("silu", gated=True), inputs()
    layer = converted(name, dense, 4, x)
    before = error(layer, dense, inputs(6000)[4096:])
    assert refit_layer(layer, x, dense(x), torch.ones(len(x)))
    assert error(layer, dense, inputs(6000)[4096:]) < 0.97 * before


@pytest.mark.parametrize("name", ["selector", "controller"])
def test_inputs_that_are_all_zero_leave_everything_finite(name: str) -> None:
    dense = dense_layer("silu", gated=True)
    x = torch.zeros(512, WIDTH)
    layer = converted(name, dense, 4, x)
    assert isinstance(layer, ChosenUnits)
    refit_layer(layer, x, dense(x), torch.ones(len(x)))
    assert all(torch.isfinite(value.float()).all() for value in layer.state_dict().values())


def test_refit_changes_nothing_where_nothing_is_to_gain() -> None:
    dense, x = dense_layer("silu", gated=True), inputs(256)
    layer = converted("selector", dense, 16, x)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert not refit_layer(layer, x, dense(x), torch.ones(len(x)))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


# -- whole models --------------------------------------------------------------------------------------------


def dense_model(**changes: object) -> ScalingTransformerForCausalLM:
    fields = DEFAULT.model_dump() | {
        "d_model": 32,
        "layers": 2,
        "heads": 4,
        "feed_forward": {"kind": "dense", "d_ff": 64, "activation": "silu", "gated": True, "bias": False},
        "attention": {"projection": "dense", "key_value_heads": 2, "bias": False},
        "vocabulary": {"kind": "dense", "size": 300, "tied": True},
        "normalization": "rms",
    }
    torch.manual_seed(0)
    spec = ModelSpec.model_validate(fields | changes)
    return ScalingTransformerForCausalLM(ScalingTransformerConfig.from_spec(spec)).eval()


@pytest.mark.parametrize("parallel", [False, True])
def test_streams_are_those_of_the_model(parallel: bool) -> None:
    model = dense_model(parallel=parallel)
    ids = torch.randint(0, 300, (2, 16))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model.model(ids, output_hidden_states=True).hidden_states
        streams = ResidualStreams(model, list(ids.split(1)))
        torch.testing.assert_close(torch.cat(streams.x), wanted[0])
        with record_inputs(model.model.layers[0].feed_forward) as seen:
            streams.x = streams.through(model.model.layers[0])
    torch.testing.assert_close(torch.cat(streams.x), wanted[1], atol=0.02, rtol=0.02)
    assert torch.cat(seen).shape == (32, 32)


@pytest.mark.parametrize("parallel", [False, True])
@torch.no_grad()
def test_a_quantized_model_stays_close(parallel: bool) -> None:
    model = dense_model(parallel=parallel)
    spec = with_quantization(model.config.spec, QuantizationSpec(projection=4, head=4))
    assert isinstance(spec.feed_forward, DenseFeedForwardSpec)
    layer = METHODS["precision"].spec(spec.feed_forward, 32, 2, 8)
    small = initialize_from_dense(model, spec.model_copy(update={"feed_forward": layer}))
    ids = torch.randint(0, 300, (16, 32))
    fit_model(model, small, list(ids.split(4)), OPTIONS, refit=False)
    wanted, found = model(ids).logits, small(ids).logits
    assert not small.config.spec.tied
    assert ((found - wanted).square().mean() / wanted.var()).item() < 0.05


@torch.no_grad()
def test_all_but_what_is_fitted_is_kept() -> None:
    model = dense_model()
    spec = model.config.spec
    assert isinstance(spec.feed_forward, DenseFeedForwardSpec)
    layer = METHODS["selector"].spec(spec.feed_forward, 32, 4, 8)
    sparse = initialize_from_dense(model, spec.model_copy(update={"feed_forward": layer})).state_dict()
    kept = {name: value for name, value in model.state_dict().items() if ".feed_forward." not in name}
    assert len(kept) == 16
    for name, value in kept.items():
        assert torch.equal(sparse[name], value), name


# -- plans ---------------------------------------------------------------------------------------------------


def test_a_plan_keeps_its_budget_with_the_fewest_bytes() -> None:
    spec = dense_model().config.spec
    found = search_space(spec, ["precision", "selector"], 8, "int8", None, distils=True)
    assert len({each.name for each in found}) == len(found)
    layers = {("precision", k): 0.1 / (k + 1) for k in (0, 1, 2, 4, 8)}
    layers |= {("selector", k): 1.0 / k for k in (12, 8, 6, 4, 2)}
    known = [
        with_prediction(each, layers, 0.02 if each.spec.quantization.projection else 0, head=0.01)
        for each in found
    ]
    chosen = rank_candidates(known, Budget("loss", 0.02), dense_loss=3.0)
    assert chosen
    assert all(each.expected_increase <= 0.06 for each in chosen)
    assert [each.bytes_per_token for each in chosen] == sorted(each.bytes_per_token for each in chosen)
    rest = [each for each in known if each not in chosen]
    assert any(each.bytes_per_token < chosen[0].bytes_per_token for each in rest)

    small = rank_candidates(known, Budget("kept", 0.25), dense_loss=3.0)
    assert max(each.spec.kept_fraction for each in small) == 0.25
    assert small[0].expected_increase == min(each.expected_increase for each in small)

    for narrow in (Budget("perplexity", 0.001), Budget("bytes", 1.0), Budget("kept", 0.0)):
        least = [each for each in known if narrow.kind != "kept" or each.method == "selector"]
        with pytest.raises(Mismatch, match="no candidate meets") as raised:
            rank_candidates(least, narrow, dense_loss=3.0)
        nearest = parse_budget(raised.value.message.split("`")[1].removeprefix("budget: "))
        assert rank_candidates(least, nearest, dense_loss=3.0)


@pytest.mark.parametrize("name", ["gemma 2", "gemma 3", "smollm 3", "granite"])
@torch.no_grad()
def test_streams_go_through_layers_that_differ(name: str) -> None:
    """Each with its own window and its own positions."""
    model = network(name)
    ids = torch.tensor([some_tokens(model.config.vocab_size, 60)])
    streams = ResidualStreams(model, [ids])
    for layer in model.model.layers:
        streams.x = streams.through(layer)
    expected = model.model(ids, use_cache=False).last_hidden_state
    assert torch.equal(model.model.norm(streams.x[0]), expected)
    teacher, _ = Teacher(model, bf16=False)(ids)
    assert torch.equal(teacher, model(ids).logits)
