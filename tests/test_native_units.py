"""Sparse FF from chosen rows in the native library: values and gradients of the masked product, its twin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small_models import INSTRUCTION_SETS
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sparsecli import console
from sparsecli.bench.studies import training_step
from sparsecli.decode.native import binding
from sparsecli.model.layers import exploring, native_units
from sparsecli.model.layers.choices import ChoiceRecord
from sparsecli.model.layers.feed_forward import SparseFeedForward, choose
from sparsecli.model.layers.reversible import Half, plain_stack, reversible_stack
from sparsecli.train.distillation import choosing_as_decoding

pytestmark = pytest.mark.skipif(
    binding.available() is not None, reason=f"native engine: {binding.available()}"
)

SHAPES = {  # d, d_ff, N, r, k, tokens; gated, unit bias, probability gate
    "small": (16, 96, 8, 5, 2, 40, False, False, False),
    "odd": (37, 105, 15, 3, 3, 33, True, True, False),
    "two slices": (130, 576, 64, 16, 1, 300, False, True, True),
    "pieces of tokens and of units": (33, 1320, 40, 17, 4, 1100, True, False, True),
    "one column, one block": (1, 6, 6, 1, 1, 7, False, True, False),
    "no token": (8, 16, 8, 2, 1, 0, True, True, True),
}


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SPARSECLI_ISA", request.param)
    assert binding.isa() == request.param
    return request.param


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Messages that were said once, in this test."""
    lines: list[str] = []
    console.say_once.cache_clear()
    monkeypatch.setattr(console, "say", lines.append)
    yield lines
    console.say_once.cache_clear()


def build(name: str, activation: str = "relu") -> tuple[SparseFeedForward, Tensor, Tensor]:
    """A layer with weights of every size, inputs and gradients of outputs."""
    torch.manual_seed(0)
    d, d_ff, size, rank, k, tokens, gated, unit_bias, gate = SHAPES[name]
    layer = SparseFeedForward(d, d_ff, size, rank, k, activation, gated, unit_bias, 1.0, 0.5, gate)
    with torch.no_grad():
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, std=0.5)
    x, dy = torch.randn(2, tokens, d)
    return layer, x, dy


def results(layer: SparseFeedForward, x: Tensor, dy: Tensor, run: object) -> dict[str, Tensor]:
    """The output of `run`, and all gradients."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.backward(dy.to(y.dtype))
    gradients = {
        name: weight.grad.clone() for name, weight in layer.named_parameters() if weight.grad is not None
    }
    return {"y": y.detach(), "x": x.grad, **gradients}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal but for rounding, as a share of the largest number."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        largest = value.abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(actual[name], value, atol=tolerance * largest, rtol=0, msg=name)


def both(layer: SparseFeedForward, x: Tensor, dy: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results of a training call from chosen rows, and of the masked product with the same choices."""
    choices = ChoiceRecord()
    with choices.recording():
        assert native_units.usable(layer, x)
        rows = results(layer, x, dy, layer)
    with choices.replaying():
        return rows, results(layer, x, dy, layer.masked_product)


@pytest.mark.parametrize("name", SHAPES)
def test_training_equals_the_masked_product(name: str, instruction_set: str) -> None:
    rows, masked = both(*build(name))
    assert_same(rows, masked)
    if name not in ("no token", "one column, one block"):
        assert min(value.abs().max() for value in rows.values()) > 0


@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize("name", ["odd", "two slices", "no token"])
def test_exploring_equals_the_product_with_the_mask_behind(
    name: str, fraction: float, instruction_set: str
) -> None:
    layer, x, dy = build(name)
    layer.explored_fraction = fraction
    choices, found = ChoiceRecord(), []
    for run, context in ((layer, choices.recording()), (layer.masked_product, choices.replaying())):
        torch.manual_seed(3)  # both draw the same tokens
        layer.temperature = 0.0
        with context:
            found.append(results(layer, x, dy, run))
    assert_same(*found)


def test_explored_tokens_stand_for_all() -> None:
    """The mean over what can be drawn is the gradient with every token explored; other weights do not notice."""
    layer, x, dy = build("odd")
    layer.temperature = 0.0
    plain = results(layer, x, dy, layer)
    layer.explored_fraction = 1.0
    every = results(layer, x, dy, layer)
    layer.explored_fraction = 1 / 3
    drawn: dict[int, dict[str, Tensor]] = {}
    for seed in range(40):
        torch.manual_seed(seed)
        first = exploring.draw(layer.explored_fraction, len(x))[0].start
        torch.manual_seed(seed)
        drawn.setdefault(first, results(layer, x, dy, layer))
    assert sorted(drawn) == [0, 1, 2]
    assert_same({name: sum(run[name] for run in drawn.values()) / 3 for name in every}, every)
    for name, gradient in plain.items():
        assert torch.equal(every[name], gradient) == (not name.startswith("controller") and name != "x"), name


def test_every_second_column_and_frozen_weights() -> None:
    """Inputs need not be contiguous, and what needs no gradient gets none."""
    layer, x, dy = build("odd")
    layer.gate.requires_grad_(False)
    layer.controller.second.requires_grad_(False)
    wide = torch.stack((x, x), dim=-1)
    rows, masked = both(layer, wide[..., 0], dy)
    assert "gate" not in rows
    assert_same(rows, masked)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("name", ["odd", "two slices"])
def test_evaluation_equals_the_masked_product(
    activation: str, name: str, instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, dy = build(name, activation)
    layer.eval()
    assert native_units.usable(layer, x)
    rows = results(layer, x, dy, layer)
    monkeypatch.setenv("SPARSECLI_KERNELS", "reference")
    assert not native_units.usable(layer, x)
    assert_same(rows, results(layer, x, dy, layer))


def test_bfloat16_weights(instruction_set: str) -> None:
    """Sums are those of float32; only what comes out is rounded."""
    layer, x, dy = build("two slices")
    layer, x = layer.bfloat16(), x.bfloat16()
    choices = ChoiceRecord()
    with choices.recording():
        rows = results(layer, x, dy.bfloat16(), layer)
    layer.float()
    with choices.replaying():
        wide = results(layer, x.float(), dy.bfloat16().float(), layer)
    assert_same(rows, {key: value.bfloat16() for key, value in wide.items()}, 0.01)


def test_autocast_computes_in_float32() -> None:
    layer, x, dy = build("odd")
    torch.manual_seed(1)
    plain = results(layer, x, dy, layer)
    torch.manual_seed(1)
    cast = results(layer, x, dy, torch.autocast("cpu", torch.bfloat16)(layer))
    assert_same(cast, plain, 0)


@pytest.mark.parametrize("name", ["two slices", "pieces of tokens and of units"])
def test_threads_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, dy = build(name)
    found = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        torch.manual_seed(1)
        found.append(results(layer, x, dy, layer))
    for other in found[1:]:
        assert_same(other, found[0], 0)


def gumbel(seed: int, token: int, units: np.ndarray) -> np.ndarray:
    """The noise of a token's units, as native/training.cpp and native/ops/training.inl define it."""
    with np.errstate(over="ignore"):
        x = np.uint64(seed + token) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        low, high = np.uint32(x & np.uint64(0xFFFFFFFF)), np.uint32(x >> np.uint64(32))
        mixed = units.astype(np.uint32) + low
        mixed = (mixed ^ mixed >> np.uint32(16)) * np.uint32(0x7FEB352D)
        mixed = (mixed ^ mixed >> np.uint32(15) ^ high) * np.uint32(0x846CA68B)
        mixed ^= mixed >> np.uint32(16)
    uniform = np.clip((mixed >> np.uint32(8)).astype(float) / 2**24, 1e-6, 1 - 1e-6)
    return -np.log(-np.log(uniform))


def test_noise_is_a_function_of_seed_token_and_unit(instruction_set: str) -> None:
    torch.manual_seed(0)
    tokens, size, blocks = 70, 24, 5
    hidden, second, bias = torch.randn(tokens, 7), torch.randn(size * blocks, 7), torch.randn(size * blocks)
    logits = hidden @ second.T + bias
    noise = np.stack([gumbel(5 << 40, token, np.arange(size * blocks)) for token in range(tokens)])
    noisy = (logits + 0.5 * torch.from_numpy(noise).float()).unflatten(-1, (blocks, size))
    chosen = native_units.choose_units(hidden, second, bias, size, 3, 0.5, 5 << 40)
    assert chosen.dtype == torch.int32
    torch.testing.assert_close(chosen.long(), choose(noisy, 3))
    without = native_units.choose_units(hidden, second, bias, size, 3)
    torch.testing.assert_close(without.long(), choose(logits.unflatten(-1, (blocks, size)), 3))


def test_noisy_choices_follow_the_probabilities() -> None:
    """At temperature 1 the noisy argmax draws each unit with its softmax probability, in one call and over calls."""
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5])
    hidden, second = torch.zeros(20000, 1), torch.zeros(4, 1)
    for chosen in (
        native_units.choose_units(hidden, second, logits, 4, 1, 1.0, 3),
        torch.cat(
            [native_units.choose_units(hidden[:1], second, logits, 4, 1, 1.0, seed) for seed in range(20000)]
        ),
    ):
        shares = torch.bincount(chosen.flatten(), minlength=4) / 20000
        torch.testing.assert_close(shares, logits.softmax(-1), atol=0.015, rtol=0)


def test_equal_scores_and_nan_choose_the_first_unit() -> None:
    hidden, second, bias = torch.zeros(3, 2), torch.zeros(40, 2), torch.zeros(40)
    assert native_units.choose_units(hidden, second, bias, 20, 2).tolist() == [[[0, 1]] * 2] * 3
    bias[20:] = torch.nan
    assert native_units.choose_units(hidden, second, bias, 20, 1).tolist() == [[[0], [0]]] * 3


@torch.no_grad()
def test_unchosen_rows_are_not_read() -> None:
    layer, x, _ = build("two slices")
    layer.eval()
    used = torch.zeros(layer.up.shape[0], dtype=torch.bool)
    used[layer.mask(x[:5]).flatten(1).any(dim=0)] = True
    expected = layer(x[:5])
    layer.up[~used] = layer.down[~used] = torch.nan
    torch.testing.assert_close(native_units.chosen_rows(layer, x[:5]), expected)


def test_seeds_draw_again_and_anew() -> None:
    layer, x, _ = build("two slices")
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


def test_checkpoints_repeat_draws() -> None:
    layer, x, dy = build("two slices")
    torch.manual_seed(1)
    plain = results(layer, x, dy, layer)
    torch.manual_seed(1)
    assert_same(results(layer, x, dy, lambda x: checkpoint(layer, x, use_reentrant=False)), plain, 0)


def test_layers_that_are_distilled_choose_without_noise() -> None:
    """Whatever the recipe says about training them."""
    layer, x, dy = build("two slices")
    layer.hard_fraction = 0.3
    assert not native_units.usable(layer, x)
    with choosing_as_decoding(layer):
        rows, masked = both(layer, x, dy)
        assert torch.equal(results(layer, x, dy, layer)["y"], rows["y"])
    assert_same(rows, masked)


def test_reversible_stacks_are_plain_ones() -> None:
    torch.manual_seed(0)
    layers = [SparseFeedForward(24, 64, 8, 4, hard_fraction=1.0, temperature=0.5) for _ in range(3)]
    halves = [Half(layer, list(layer.parameters())) for layer in layers]
    found = []
    for stack in (reversible_stack, plain_stack):
        torch.manual_seed(1)
        x = torch.randn(2, 30, 24, requires_grad=True)
        a, b = stack(halves, x, 2 * x)
        (a.sin().sum() + (b**2).sum()).backward()
        weights = {f"{i}.{name}": w for i, layer in enumerate(layers) for name, w in layer.named_parameters()}
        found.append(
            {"a": a.detach(), "b": b.detach(), "x": x.grad, **{n: w.grad for n, w in weights.items()}}
        )
        for weight in weights.values():
            weight.grad = None
    assert_same(*found)


def test_gradients_that_are_kept_are_not_written_over() -> None:
    """Memory of a gradient is used again, but only when nothing refers to it any more."""
    layer, x, dy = build("small")
    layer.temperature = 0.0
    once = results(layer, x, dy, layer)
    layer.zero_grad()
    layer(x).backward(dy)
    kept = layer.up.grad
    part = layer.down.grad[1:]
    addresses = {kept.data_ptr(), layer.down.grad.data_ptr()}
    layer.zero_grad()
    layer(x).backward(2 * dy)
    assert not addresses & {layer.up.grad.data_ptr(), layer.down.grad.data_ptr()}
    assert torch.equal(kept, once["up"])
    assert torch.equal(part, once["down"][1:])
    address = layer.up.grad.data_ptr()
    layer.zero_grad()
    layer(x).backward(dy)
    assert layer.up.grad.data_ptr() == address
    layer(x).backward(dy)  # accumulates
    torch.testing.assert_close(layer.up.grad, 2 * once["up"])


def train_together(rank: int, folder: str) -> None:
    """One of two processes: gradients of its half of the tokens, averaged over both, are written by the first."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    layer, x, dy = build("two slices")
    layer.temperature = 0.0
    together = DistributedDataParallel(layer)
    for _ in range(2):  # the second time in memory that is used again
        layer.zero_grad()
        together(x[rank::2]).backward(dy[rank::2])
    if rank == 0:
        torch.save({name: weight.grad for name, weight in layer.named_parameters()}, f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_the_masked_product(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_together, (str(tmp_path),), nprocs=2)
    layer, x, dy = build("two slices")
    layer.temperature = 0.0
    expected = results(layer, x, dy / 2, layer.masked_product)
    found = torch.load(tmp_path / "gradients.pt")
    assert_same(found, {name: expected[name] for name in found})


def test_the_study_measures_the_layer(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"d-model": 16, "d-ff": 64, "block-size": 16, "rank": 4, "tokens": 24, "rounds": 1}
    training_step.main([*(f"--{name}={size}" for name, size in sizes.items()), "--masked"])
    table = capsys.readouterr().out
    assert [line.strip().split("  ")[0] for line in table.splitlines()[-6:] if "x" in line] == [
        "dense, float32", "dense, bfloat16", "Sparse FF, chosen rows", "Sparse FF, masked product, bfloat16"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hard_fraction": 0.3}, "hard_fraction is 0.3"),
        ({"activation": "silu"}, "with silu instead of relu"),
        ({"units_per_block": 3}, "3 of 8 units are chosen"),
    ],
)
def test_the_reason_for_the_masked_product_is_said_once(
    change: dict[str, object], reason: str, said: list[str]
) -> None:
    layer, x, _ = build("small")
    vars(layer).update(change)
    for _ in range(2):
        torch.testing.assert_close(layer(x).isfinite().all(), torch.tensor(True))
    assert len(said) == 1
    assert reason in said[0]
    layer.eval()(x)
    assert len(said) == 1


def test_without_the_library_training_uses_the_masked_product(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, dy = build("small")
    monkeypatch.setattr(binding, "available", lambda: "the native engine was not built")
    results(layer, x, dy, layer)
    assert said == ["Sparse FF computes every unit in training: the native engine was not built"]


def test_other_types_use_the_masked_product() -> None:
    layer, x, _ = build("small")
    assert layer.double()(x.double()).dtype == torch.float64
