"""Every layer against the outputs (and gradients) of the original implementation, at 1e-5 in float32.

The files hold inputs, weights and outputs computed by google/trax (Apache-2.0); see golden/README.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM
from sparsecli.model.layers.attention import Attention, dense_projection
from sparsecli.model.layers.feed_forward import MixtureFeedForward, SparseFeedForward
from sparsecli.model.layers.multiplicative import (
    ConvolutionProjection,
    ModuleConvolution,
    MultiplicativeConvolution,
    MultiplicativeDense,
)
from sparsecli.model.layers.normalization import normalization
from sparsecli.model.layers.positions import LearnedPositions, SinusoidalPositions

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy without broadcasting, so that a wrong layout cannot slip through."""
    assert parameter.shape == value.shape
    with torch.no_grad():
        parameter.copy_(value)


def kernel(trax: Tensor) -> Tensor:
    """(F_h, F_w, M_in, M_out) -> ours (M_out, F_h, F_w, M_in)."""
    return trax.permute(3, 0, 1, 2)


def fill_multiplicative(layer: nn.Module, d: Tensor, e: Tensor, bias: Tensor) -> None:
    fill(layer.D, d)
    fill(layer.E, e.T)
    fill(layer.bias, bias)


def fill_convolution(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    fill(layer.weight, kernel(weight))
    fill(layer.bias, bias)


def fill_linear(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    fill(layer.weight, weight.T)
    if bias is not None:
        fill(layer.bias, bias)


def fill_sparse(layer: nn.Module, g: dict[str, Tensor]) -> None:
    fill(layer.controller.first, g["C1"].T)
    fill(layer.controller.second, g["C2"].flatten(1).T)
    fill(layer.controller.bias, g["cb"].flatten())
    fill(layer.up, g["W1"].flatten(1).T)  # (d, block, unit) -> (block unit, d)
    fill(layer.down, g["W2"].transpose(0, 1).flatten(0, 1))  # (unit, block, d) -> (block unit, d)
    fill(layer.bias, g["b2"])


@pytest.mark.parametrize(("name", "kind"), [("layernorm", "layer"), ("layernorm_nocenter", "rms")])
def test_normalization(name: str, kind: str) -> None:
    g = load(name)
    layer = normalization(kind, 16, 1e-6)
    fill(layer.weight, g["scale"])
    if kind == "layer":
        fill(layer.bias, g["bias"])
    assert_same(layer(g["x"]), g["y"])


@pytest.mark.parametrize("name", ["mult_dense_bias", "mult_dense_nobias", "sparse_loss_mult"])
@pytest.mark.parametrize("repeat", [1, 5])
def test_multiplicative(name: str, repeat: int) -> None:
    """`repeat` makes enough tokens for the path that writes the whole matrix out."""
    g = load(name)
    expected = g["logits"] if "logits" in g else g["y"]
    layer = MultiplicativeDense(16, expected.shape[-1], modules=4)
    fill_multiplicative(layer, g["D"], g["E"], g.get("b", torch.zeros(expected.shape[-1])))
    assert_same(layer(g["x"].repeat(repeat, 1, 1)), expected.repeat(repeat, 1, 1))


def test_multiplicative_modular() -> None:
    g = load("mult_modular_dense")
    layer = MultiplicativeDense(16, 16, modules=4, modular=True)
    fill_multiplicative(layer, g["D"], g["E"], g["b"])
    fill(layer.modular, g["Kmod"])
    assert_same(layer(g["x"]), g["y"])


@pytest.mark.parametrize(
    "name", ["locally_conv_len3_mod3", "locally_conv_len3_mod1", "locally_conv_len1_mod3"]
)
def test_convolution(name: str) -> None:
    g = load(name)
    length, modules = g["K"].shape[:2]
    layer = ModuleConvolution(4, 4, length, modules)
    fill_convolution(layer, g["K"], g["b"])
    rows = nn.functional.pad(g["x"].unflatten(-1, (4, 4)), (0, 0, 0, 0, length - 1, 0))
    assert_same(layer(rows).flatten(-2), g["y"])


def multconv_attention(g: dict[str, Tensor], value_concat: str = "none", output: str = "none") -> Attention:
    projection = ConvolutionProjection(
        MultiplicativeDense(16, 16, 4), 16, modules=4, kernel=3, value_concat=value_concat
    )
    convolution = MultiplicativeConvolution(16, 4, 3) if output == "multiplicative_conv" else None
    layer = Attention(projection, convolution, heads=2)
    fill_multiplicative(layer.projection.shared, g["D"], g["E"], g["b"])
    fill_convolution(layer.projection.query, g["K_q"], g["b_q"])
    fill_convolution(layer.projection.key, g["K_k"], g["b_k"])
    fill_convolution(layer.projection.value, g["K_v"], g["b_v"])
    if output != "none":
        fill_multiplicative(layer.output.shared, g["out_D"], g["out_E"], g["out_b"])
        fill_convolution(layer.output.convolution, g["out_K"], g["out_kb"])
    return layer


@pytest.mark.parametrize(
    ("name", "value_concat", "output"),
    [
        ("multconv_attn_default", "none", "none"),
        ("multconv_attn_vconcat_fixed", "modules", "none"),
        ("multconv_attn_vconcat_original", "whole", "none"),
        ("multconv_attn_out_multconv", "none", "multiplicative_conv"),
    ],
)
def test_sparse_qkv_attention(name: str, value_concat: str, output: str) -> None:
    g = load(name)
    assert_same(multconv_attention(g, value_concat, output)(g["x"]), g["y"])


def test_sparse_qkv_stages() -> None:
    g = load("multconv_attn_default")
    layer = multconv_attention(g)
    m = layer.projection.conv_input(g["x"])
    assert_same(m, g["mult_out"])
    for made, name in zip(layer.projection(nn.functional.pad(m, (0, 0, 2, 0))), ("q", "k", "v"), strict=True):
        assert_same(made, g[name])


def test_dense_attention() -> None:
    g = load("dense_causal_attn")
    heads = int(g["n_heads"])
    projection = dense_projection(16, heads=heads, key_value_heads=heads, head_width=16 // heads)
    layer = Attention(projection, nn.Linear(16, 16), heads=heads)
    for part, name in (("query", "q"), ("key", "k"), ("value", "v")):
        fill_linear(getattr(layer.projection, part), g[f"W{name}"], g[f"b{name}"])
    fill_linear(layer.output, g["Wo"], g["bo"])
    assert_same(layer(g["x"]), g["y"])


def sparse_layer(g: dict[str, Tensor], **kwargs: object) -> SparseFeedForward:
    layer = SparseFeedForward(16, 48, block_size=8, rank=6, temperature=0.0, **kwargs)
    fill_sparse(layer, g)
    return layer


@pytest.fixture(params=["chosen rows", "masked product"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compute Sparse FF: with the native library, where there is one, and without."""
    if request.param == "masked product":
        monkeypatch.setenv("SPARSECLI_KERNELS", "reference")


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("mode", ["eval", "predict"])
@pytest.mark.parametrize("suffix", ["", "_multctrl"])
def test_sparse_feed_forward(mode: str, suffix: str) -> None:
    g = load(f"sparse_ff_{mode}{suffix}")
    layer = sparse_layer(g, probability_gate=suffix != "").eval()
    assert_same(layer(g["x"]), g["y"])
    one_by_one = torch.stack([layer(token) for token in g["x"].flatten(0, 1)])  # the gathered path
    assert_same(one_by_one.view_as(g["y"]), g["y"])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    ("name", "hard_fraction", "gate"),
    [
        ("sparse_ff_train_hard", 1.0, False),
        ("sparse_ff_train_soft", 0.0, False),
        ("sparse_ff_train_multctrl_hard", 1.0, True),
    ],
)
def test_sparse_feed_forward_training(name: str, hard_fraction: float, gate: bool) -> None:
    g = load(name)
    layer = sparse_layer(g, hard_fraction=hard_fraction, probability_gate=gate).train()
    x = g["x"].requires_grad_()
    y = layer(x)
    assert_same(y, g["y"])
    y.backward(g["ct"])
    assert_same(x.grad, g["grad_x"])
    expected = SparseFeedForward(16, 48, block_size=8, rank=6)
    fill_sparse(expected, {key: g[f"grad_{key}"] for key in ("C1", "C2", "cb", "W1", "W2", "b2")})
    for (label, parameter), gradient in zip(layer.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient.data, atol=1e-5, rtol=1e-5, msg=label)


@pytest.mark.parametrize(("name", "gate"), [("block_sparse_ff_eval", False), ("switch_sparse_ff_eval", True)])
def test_mixture(name: str, gate: bool) -> None:
    g = load(name)
    layer = MixtureFeedForward(16, 48, experts=6, probability_gate="probability" if gate else None).eval()
    fill_linear(layer.router, g["R"], None)
    fill(layer.up, g["W1"].T)
    fill(layer.down, g["W2"])
    fill(layer.bias, g["b2"])
    assert_same(layer(g["x"]), g["y"])
    one_by_one = torch.stack([layer(token) for token in g["x"].flatten(0, 1)])
    assert_same(one_by_one.view_as(g["y"]), g["y"])


def test_learned_positions_start_as_the_originals_table() -> None:
    g = load("pos_sincos_table")
    layer = LearnedPositions(32, 16)
    assert_same(layer.weight.detach(), g["table"])
    assert_same(g["x"] + layer(torch.arange(g["x"].shape[1])), g["y"])


def test_sinusoidal_positions() -> None:
    g = load("pos_sincos_concat")
    assert_same(g["x"] + SinusoidalPositions(16)(torch.arange(g["x"].shape[1])), g["y"])


SPARSE = {"kind": "sparse", "d_ff": 32, "block_size": 8, "rank": 5}
LANGUAGE_MODELS = {
    "lm_dense": {
        "feed_forward": {"kind": "dense", "d_ff": 32},
        "attention": {"projection": "dense"},
        "vocabulary": {"kind": "dense", "size": 20, "bias": True},
    },
    "lm_sparse": {
        "feed_forward": SPARSE,
        "attention": {"projection": "multiplicative_conv", "modules": 4},
        "vocabulary": {"kind": "multiplicative", "size": 20, "modules": 4},
    },
}


def golden_language_model(name: str, g: dict[str, Tensor]) -> ScalingTransformerForCausalLM:
    """The model of the file, its weights taken in the order in which the original stores its layers."""
    config = ScalingTransformerConfig(
        d_model=16, layers=2, heads=2, max_positions=32, positions="learned", **LANGUAGE_MODELS[name]
    )
    model = ScalingTransformerForCausalLM(config).eval()
    weights = iter([value for key, value in g.items() if key.startswith("w_")])
    take = lambda: next(weights)  # noqa: E731
    fill(model.model.embedding.weight, take())
    fill(model.model.position_embedding.weight, take())
    for block in model.model.layers:
        fill(block.attention_norm.weight, take())
        fill(block.attention_norm.bias, take())
        projection = block.attention.projection
        if name == "lm_dense":
            for part in (projection.query, projection.key, projection.value, block.attention.output):
                fill_linear(part, take(), take())
        else:
            fill_multiplicative(projection.shared, take(), take(), take())
            for part in (projection.query, projection.key, projection.value):
                fill_convolution(part, take(), take())
        fill(block.feed_forward_norm.weight, take())
        fill(block.feed_forward_norm.bias, take())
        if name == "lm_dense":
            fill_linear(block.feed_forward.up, take(), take())
            fill_linear(block.feed_forward.down, take(), take())
        else:
            fill_sparse(block.feed_forward, {key: take() for key in ("C1", "C2", "cb", "W1", "W2", "b2")})
    fill(model.model.norm.weight, take())
    fill(model.model.norm.bias, take())
    if name == "lm_dense":
        fill_linear(model.head, take(), take())
    else:
        fill_multiplicative(model.head, take(), take(), take())
    assert next(weights, None) is None
    return model


@pytest.mark.parametrize("name", list(LANGUAGE_MODELS))
def test_language_model(name: str) -> None:
    """The original shifts its input right by one (start token 0) and predicts tokens[t] at t; ours does not shift."""
    g = load(name)
    model = golden_language_model(name, g)
    tokens = nn.functional.pad(g["tokens"].long(), (1, 0))[:, :-1]
    assert_same(model(tokens).logits, g["logits"])


@pytest.mark.parametrize("name", list(LANGUAGE_MODELS))
def test_language_model_decodes_step_by_step(name: str) -> None:
    g = load(name)
    model = golden_language_model(name, g)
    tokens = nn.functional.pad(g["tokens"].long(), (1, 0))[:, :-1]
    past, steps = None, []
    for position in range(tokens.shape[1]):
        output = model(tokens[:, position : position + 1], past_key_values=past, use_cache=True)
        past = output.past_key_values
        steps.append(output.logits)
    assert_same(torch.cat(steps, dim=1), g["logits"])
