"""Mixtures of experts in training: the loss that keeps all experts in use, and what is said of it."""

from __future__ import annotations

import copy
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import assert_same_run, at_step, send
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecli.console import Stopped
from sparsecli.data.packing import TokenStream
from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM, decoder
from sparsecli.model.layers.balancing import load_balancing_loss
from sparsecli.model.layers.feed_forward import MixtureFeedForward, choose
from sparsecli.model.layers.reversible import plain_stack
from sparsecli.recipe.loader import load
from sparsecli.recipe.training import TrainSpec
from sparsecli.train import run_directory
from sparsecli.train.command import run
from sparsecli.train.evaluation import evaluate
from sparsecli.train.trainer import LanguageModelTrainer, Signals, training_arguments

SETTINGS = {"hard_fraction": 1.0, "temperature": 0.0, "gate": "probability"}
MIXTURE = {"kind": "mixture", "d_ff": 32, "experts": 4, "experts_per_token": 2, **SETTINGS}
WEIGHT = 0.7


def build(load_balancing: float = WEIGHT, **fields: Any) -> ScalingTransformerForCausalLM:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "layers": 2, "heads": 2, "max_positions": 16, "positions": "rotary"}
    vocabulary = {"kind": "dense", "size": 50}
    feed_forward = {**MIXTURE, "load_balancing": load_balancing}
    config = ScalingTransformerConfig(
        **{**sizes, "vocabulary": vocabulary, "feed_forward": feed_forward, **fields}
    )
    return ScalingTransformerForCausalLM(config).train()


def mixtures(model: nn.Module) -> list[MixtureFeedForward]:
    return [layer for layer in model.modules() if isinstance(layer, MixtureFeedForward)]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: weight.grad.clone() for name, weight in module.named_parameters()}
    module.zero_grad()
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


# -- the loss ------------------------------------------------------------------------------------------------


def test_the_value_by_hand() -> None:
    """Four tokens, two experts: probabilities 3/4, 3/4, 3/4, 1/4 of the first."""
    logits = torch.tensor([[math.log(3.0), 0.0]] * 3 + [[0.0, math.log(3.0)]])
    one = load_balancing_loss(logits, choose(logits, 1))
    assert one.item() == pytest.approx(2 * (3 / 4 * 5 / 8 + 1 / 4 * 3 / 8))
    three = torch.tensor([[math.log(4.0), math.log(2.0), math.log(2.0)], [0.0, 0.0, math.log(2.0)]])
    chosen = torch.tensor([[0, 1], [2, 1]])  # shares 1/4, 1/2, 1/4; mean probabilities 3/8, 1/4, 3/8
    assert load_balancing_loss(three, chosen).item() == pytest.approx(3 * (3 / 32 + 1 / 8 + 3 / 32))


@pytest.mark.parametrize("count", [1, 2])
def test_even_use_gives_one_and_one_expert_gives_their_number(count: int) -> None:
    even = torch.eye(4).repeat(3, 1) + torch.eye(4).roll(1, 0).repeat(3, 1) / 2
    assert load_balancing_loss(even, choose(even, count)).item() == pytest.approx(1)
    always = torch.tensor([[90.0, 0.0, 0.0, 0.0]]).repeat(7, 1)
    assert load_balancing_loss(always, choose(always, 1)).item() == pytest.approx(4)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("gate", [False, True])
def test_the_layers_gradient_is_that_of_the_sum(count: int, gate: bool) -> None:
    """Against a layer without the loss, and the loss written out and added."""
    torch.manual_seed(0)
    layer = MixtureFeedForward(
        *(8, 24, 6, count),
        hard_fraction=1.0,
        temperature=0.0,
        probability_gate="probability" if gate else None,
        load_balancing=WEIGHT,
    ).train()
    plain = copy.deepcopy(layer)
    plain.load_balancing = 0.0
    x = torch.randn(2, 5, 8, requires_grad=True)
    y = layer(x)
    y.sin().sum().backward()
    of_x, x.grad = x.grad, None

    other = plain(x)
    assert torch.equal(y, other)
    p = F.linear(x.flatten(0, 1), plain.router.weight).softmax(-1)
    shares = torch.zeros(6)
    for token in p:
        for expert in token.topk(count).indices:
            shares[expert] += 1 / (10 * count)
    loss = 6 * sum(shares[expert] * p[:, expert].mean() for expert in range(6))
    assert layer.balancing is not None
    torch.testing.assert_close(layer.balancing, loss.detach())
    (other.sin().sum() + WEIGHT * loss).backward()
    torch.testing.assert_close(of_x, x.grad)
    assert_same(gradients(layer), gradients(plain))


@pytest.mark.parametrize("gate", ["none", "probability", "output_probability"])
@pytest.mark.parametrize("gated", [False, True])
def test_every_way_of_reading_experts_gives_the_same(gate: str, gated: bool) -> None:
    torch.manual_seed(0)
    layer = MixtureFeedForward(
        *(8, 24, 6, 3, "gelu", gated),
        bias=not gated,
        probability_gate=None if gate == "none" else gate,
        normalize_probabilities=gate != "none",
    ).eval()
    x = torch.randn(9, 8)
    logits = layer.router(x)
    chosen = choose(logits, 3)
    scale = layer._scale(logits, chosen)
    assert scale is None or torch.allclose(scale.sum(-1), torch.ones(9))
    masked = layer.evaluate_masked(x, chosen, scale)
    torch.testing.assert_close(layer.evaluate_by_expert(x, chosen, scale), masked)
    torch.testing.assert_close(layer(x), masked)
    torch.testing.assert_close(torch.cat([layer(row[None]) for row in x]), masked)


def sum_of_all(model: ScalingTransformerForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """Gradients of the cross-entropy and the weighted losses of all layers, added up before the backward pass."""
    losses = []

    def note(router: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        losses.append(load_balancing_loss(logits, choose(logits.detach(), 2)))

    hooks = [layer.router.register_forward_hook(note) for layer in mixtures(model)]
    loss = model(ids, labels=ids).loss
    assert len(losses) == 2
    (loss + WEIGHT * sum(losses)).backward()
    for hook in hooks:
        hook.remove()
    return gradients(model)


WAYS: dict[str, dict] = {
    "stored": {},
    "recomputed": {},
    "compiled": {},
    "reversible": {"residual": "reversible"},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_models_gradient_is_that_of_the_sum(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However activations come back in the backward pass."""
    ids = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1))
    model = build(**WAYS[way])
    if way == "recomputed":
        model.activation_checkpointing_enable()
    trained = torch.compile(model, backend="aot_eager") if way == "compiled" else model
    loss = trained(ids, labels=ids).loss
    loss.backward()
    found = gradients(model)
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "reversible_stack", plain_stack)
        plain = build(0.0, **WAYS[way])
        assert_same(found, sum_of_all(plain, ids))
        without = plain(ids, labels=ids).loss
    torch.testing.assert_close(loss, without)  # the loss that is minimised stays in the gradient alone
    for layer, other in zip(mixtures(model), mixtures(plain), strict=True):
        torch.testing.assert_close(layer.balancing, other.balancing)


def test_evaluation_neither_computes_nor_counts_it() -> None:
    windows = TokenStream(torch.randint(0, 50, (64,)).numpy()).windows(16)
    found = []
    for weight in (0.0, 50.0):
        model = build(weight)
        found.append(evaluate(model, windows, 1.0))
        assert all(layer.balancing is None for layer in mixtures(model))
    assert found[0] == found[1]


def test_evaluation_counts_experts() -> None:
    model, windows = build(), TokenStream(torch.randint(0, 50, (64,)).numpy()).windows(16)
    for layer in mixtures(model):  # every token takes the same two of four
        nn.init.zeros_(layer.router.weight)
    figures = evaluate(model, windows, 1.0)
    assert figures is not None
    assert (figures.never_chosen, figures.balance) == (0.5, pytest.approx(0.5))
    assert not any(layer.router._forward_hooks for layer in mixtures(model))


# -- runs ----------------------------------------------------------------------------------------------------


def one_step(folder: Path, batches: int) -> dict[str, Tensor]:
    """The weights after a step on the same window, so many batches of it accumulated."""
    model = build(5.0)
    stream = TokenStream(torch.arange(16).repeat(32).numpy())
    train = TrainSpec(
        max_steps=1,
        gradient_accumulation_steps=batches,
        per_device_train_batch_size=2,
        optim="adafactor",
        learning_rate=0.1,
        logging_steps=1,
    )
    trainer = LanguageModelTrainer(
        model,
        training_arguments(train, 0, folder, evaluations=False),
        None,  # type: ignore[arg-type]
        stream.windows(16),
        stream.windows(16),
        1.0,
        bf16=False,
        checkpoints=folder,
        keep=2,
        signals=Signals(),
    )
    trainer.train()
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_accumulated_batches_weigh_as_one(tmp_path: Path) -> None:
    once, twice = one_step(tmp_path / "once", 1), one_step(tmp_path / "twice", 2)
    start = dict(build().named_parameters())
    assert any(not torch.equal(once[name], start[name]) for name in once if "router" in name)
    for name, weight in once.items():
        torch.testing.assert_close(twice[name], weight, atol=1e-5, rtol=1e-4, msg=name)


def changed(recipe_file: Path, load_balancing: float, *overrides: str) -> Any:
    words = f"kind: mixture, d_ff: 32, experts: 8, gate: probability, load_balancing: {load_balancing}"
    return load(str(recipe_file), [f"model.feed_forward={{{words}}}", *overrides])


@pytest.mark.slow
def test_experts_are_used_more_evenly_with_it(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, last = {}, {}
    for weight in (0.0, 0.1):
        recipe = changed(recipe_file, weight, "train.max_steps=60", "train.eval_steps=60")
        figures[weight] = run(recipe, output=tmp_path / str(weight))
        rows = [row for row in run_directory.read_metrics(tmp_path / str(weight)) if "loss" in row]
        last[weight] = sum(row["load_balancing"] for row in rows[-10:]) / 10
    assert figures[0.0].balance + 0.05 < figures[0.1].balance <= 1
    assert 0.9 < last[0.1] < last[0.0] - 0.05
    assert "experts never chosen" in capsys.readouterr().out


def test_a_stopped_run_goes_on_bit_for_bit(recipe_file: Path, tmp_path: Path) -> None:
    recipe = changed(recipe_file, 0.1)
    run(recipe, output=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, send(signal.SIGTERM))
        with pytest.raises(Stopped):
            run(recipe, output=tmp_path / "run")
    run(load(str(tmp_path / "run" / "recipe.yaml")), output=tmp_path / "run", resume="auto")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
