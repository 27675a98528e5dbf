"""Recurrent units, digit positions and reversible blocks against the original implementation; see test_golden.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_golden import (
    assert_same,
    fill,
    fill_convolution,
    fill_linear,
    fill_multiplicative,
    fill_sparse,
    load,
)
from torch import Tensor, nn

from sparsecli.model.layers.positions import DigitPositions
from sparsecli.model.layers.reversible import plain_stack, reversible_stack
from sparsecli.model.layers.sru import SRU
from sparsecli.model.transformer_layers import ReversibleLayer
from sparsecli.spec.model import ModelSpec

Take = Callable[[], Tensor]
"""The next of the weights, in the order in which the original stores them."""

BLOCK = ModelSpec.model_validate(
    {
        "d_model": 16,
        "layers": 1,
        "heads": 2,
        "max_positions": 32,
        "feed_forward": {
            "kind": "sparse",
            "d_ff": 32,
            "block_size": 8,
            "rank": 5,
            "temperature": 0.0,
            "hard_fraction": 1.0,
        },
        "attention": {"projection": "multiplicative_conv", "modules": 4},
        "vocabulary": {"kind": "dense", "size": 20},
        "residual": "reversible",
        "sru": {"width": 4},
    }
)


def fill_norm(layer: nn.Module, take: Take) -> None:
    fill(layer.weight, take())
    fill(layer.bias, take())


def fill_sparse_attention(layer: nn.Module, take: Take) -> None:
    fill_multiplicative(layer.projection.shared, take(), take(), take())
    for part in (layer.projection.query, layer.projection.key, layer.projection.value):
        fill_convolution(part, take(), take())


def fill_units(block: nn.Module, take: Take) -> None:
    """The feed-forward layer (sparse) and the recurrent branch."""
    fill_norm(block.feed_forward_norm, take)
    fill_sparse(block.feed_forward, {key: take() for key in ("C1", "C2", "cb", "W1", "W2", "b2")})
    fill_norm(block.sru.norm, take)
    fill_linear(block.sru.enter, take(), take())
    fill_linear(block.sru.cells[0].projection, take(), take())
    fill_linear(block.sru.leave, take(), take())


def golden_block(g: dict[str, Tensor], prefix: str = "w_") -> ReversibleLayer:
    block = ReversibleLayer(BLOCK, 0)
    weights = iter([value for key, value in g.items() if key.startswith(prefix)])
    take = lambda: next(weights)  # noqa: E731
    fill_norm(block.attention_norm, take)
    fill_sparse_attention(block.attention, take)
    fill_units(block, take)
    assert next(weights, None) is None
    return block


@pytest.mark.parametrize(("name", "activation"), [("sru_linear", None), ("sru_tanh", torch.tanh)])
def test_sru(name: str, activation: Callable[[Tensor], Tensor] | None) -> None:
    g = load(name)
    layer = SRU(8, activation)
    fill_linear(layer.projection, g["W"], g["b"])
    assert_same(layer(g["x"])[0], g["y"])


def test_digit_positions() -> None:
    g = load("pos_fixed_base")
    layer = DigitPositions(16).eval()
    fill(layer.weight, g["base_weights"])
    fill(layer.start, g["start_vec"].flatten())
    assert_same(g["x"] + layer(torch.arange(20).expand(2, 20)), g["y"])


@pytest.mark.parametrize("stack", [reversible_stack, plain_stack])
def test_reversible_block(stack: Callable) -> None:
    g = load("rev_decoder_block_eval")
    block = golden_block(g).eval()
    y1, y2 = stack(block.halves(), g["x1"], g["x2"])
    assert_same(y1, g["y1"])
    assert_same(y2, g["y2"])


@pytest.mark.parametrize("stack", [reversible_stack, plain_stack])
def test_reversible_block_training(stack: Callable) -> None:
    g = load("rev_decoder_block_train_hard")
    block = golden_block(g).train()
    x1, x2 = g["x1"].requires_grad_(), g["x2"].requires_grad_()
    o1, o2 = stack(block.halves(), x1, x2)
    assert_same(o1, g["o1"])
    assert_same(o2, g["o2"])
    torch.autograd.backward((o1, o2), (g["ct1"], g["ct2"]))
    assert_same(x1.grad, g["grad_x1"])
    assert_same(x2.grad, g["grad_x2"])
    expected = golden_block(g, "g_")
    for (name, weight), gradient in zip(block.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, gradient.data, atol=1e-5, rtol=1e-5, msg=name)
