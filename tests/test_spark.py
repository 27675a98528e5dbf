"""The Spark FFN: against a plain formula, in training, in the engine, and in what is counted of it."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from small_models import (
    assert_twins,
    network,
    packed,
    some_tokens,
    spec_of,
    start,
    stepped,
    twin,
    weights_of,
)
from torch import Tensor

from sparsecli.bench.bytes_read import bytes_per_token
from sparsecli.decode.native import binding
from sparsecli.decode.packed.file import open_packed, save
from sparsecli.decode.packed.pack import pack
from sparsecli.decode.packed.precision import Precision
from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM
from sparsecli.model.layers.spark import SparkFeedForward, statistical_top_k
from sparsecli.model.sizes import count_parameters
from sparsecli.model.tensors import tensor_shapes
from sparsecli.spec.model import ModelSpec

needs_engine = pytest.mark.skipif(binding.available() is not None, reason="no native engine")


def plain(x: np.ndarray, layer: SparkFeedForward) -> np.ndarray:
    """The layer's output for one token (d,), unit by unit, with the exact GELU."""
    k1, k2, v = (weight.detach().double().numpy() for weight in (layer.predictor, layer.up, layer.down))
    units, width = k1.shape
    scores = [float(k1[unit] @ x[:width]) for unit in range(units)]
    mean = sum(scores) / units
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / (units - 1))
    threshold = mean + deviation * NormalDist().inv_cdf(1 - layer.active_units / units)
    y = np.zeros(len(x))
    for unit, score in enumerate(scores):
        if score > threshold:
            above = score - threshold
            gelu = above * (1 + math.erf(above / math.sqrt(2))) / 2
            y += gelu * float(k2[unit] @ x[width:]) * v[unit]
    return y


def small_layer() -> tuple[SparkFeedForward, Tensor]:
    torch.manual_seed(0)
    return SparkFeedForward(d_model=12, d_ff=40, active_units=6, predictor_width=5), torch.randn(7, 12)


# -- the layer -----------------------------------------------------------------------------------------------


def test_the_layer_is_the_formula() -> None:
    layer, x = small_layer()
    wanted = torch.from_numpy(np.stack([plain(row.double().numpy(), layer) for row in x])).float()
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(layer.train()(x), wanted)
    layer.eval()
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(torch.cat([layer(row[None]) for row in x]), wanted)  # chosen rows alone


def test_about_k_normal_scores_are_kept() -> None:
    torch.manual_seed(0)
    scores = 3 * torch.randn(50, 4000) - 1
    kept = (statistical_top_k(scores, 320) > 0).sum(dim=-1).double()
    assert abs(kept.mean() - 320) < 5
    largest = scores.topk(250).indices  # far enough from the threshold
    assert (statistical_top_k(scores, 320).gather(-1, largest) > 0).all()


def test_every_weight_learns_through_the_threshold() -> None:
    """The gradient is that of the formula, its mean and deviation included."""
    layer, x = small_layer()
    layer.double().train()(x.double()).square().sum().backward()
    gradients = [weight.grad for weight in layer.parameters()]
    for weight, gradient in zip(layer.parameters(), gradients, strict=True):
        assert gradient is not None
        at = divmod(int(gradient.abs().argmax()), gradient.shape[1])
        step = 1e-6
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                weight[at] += sign * step
                values.append(layer(x.double()).square().sum().item())
                weight[at] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(gradient[at].item(), rel=1e-4)
    below = (layer.gate(x.double()) > 0).sum(dim=0) == 0
    assert below.any()  # of units that no token keeps, the predictor learns still: by mean and deviation
    assert gradients[0][below].abs().min() > 0
    assert not gradients[1][below].any()


def test_equal_scores_keep_nothing_and_have_a_gradient() -> None:
    layer, _ = small_layer()
    x = torch.zeros(2, 12, requires_grad=True)
    y = layer.train()(x)
    y.sum().backward()
    assert not y.any()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in layer.parameters())


# -- what is counted -----------------------------------------------------------------------------------------


def test_sizes_and_bytes() -> None:
    spec = spec_of("spark")  # 160 units of which 24, 24 of 48 inputs
    dense = ModelSpec(**{**dict(spec), "feed_forward": {"kind": "dense", "d_ff": 160, "bias": False}})
    ours, theirs = count_parameters(spec), count_parameters(dense)
    assert ours.total == theirs.total
    assert theirs.active - ours.active == 2 * (24 + 48) * (160 - 24)
    assert spec.kept_fraction == 0.15
    assert tensor_shapes(spec)["model.layers.1.feed_forward.predictor"] == (160, 24)
    sizes = [bytes_per_token(each, Precision.of("float32"), context=0) for each in (spec, dense)]
    assert sizes[1] - sizes[0] == 4 * (theirs.active - ours.active)
    assert bytes_per_token(spec, Precision.of("float32"), 0, shares=[1.0, 1.0]) == sizes[1]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"active_units": 160}, "160 of 160 units leaves nothing to skip"),
        ({"predictor_width": 48}, "48 of d_model 48 leaves no input for the units"),
        ({"units_per_block": 2}, "Extra inputs are not permitted"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict, line: str) -> None:
    fields = spec_of("spark").model_dump()
    fields["feed_forward"] |= change
    with pytest.raises(ValidationError, match=line):
        ModelSpec.model_validate(fields)


# -- the engine ----------------------------------------------------------------------------------------------


@needs_engine
@pytest.mark.parametrize("name", ["spark", "spark, odd widths"])
def test_results_do_not_depend_on_threads_or_on_neighbours(name: str) -> None:
    model, tokens = packed(name), some_tokens(101, 20)
    wanted = stepped(start(model), tokens)
    for threads in (2, 3):
        engine = start(model, threads)
        np.testing.assert_array_equal(stepped(engine, tokens), wanted)
        prompt = engine.logits(engine.sequence(20), tokens)
        np.testing.assert_allclose(prompt, wanted, atol=1e-5)


@needs_engine
def test_the_engine_counts_what_the_threshold_keeps() -> None:
    engine, tokens = start(packed("spark")), some_tokens(101, 40)
    stepped(engine, tokens)
    counts = engine.counts()
    model = network("spark")
    seen = []
    handles = [
        layer.feed_forward.register_forward_pre_hook(
            lambda layer, inputs: seen.append(int((layer.gate(inputs[0][0]) > 0).sum()))
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    assert [tokens for _, tokens in counts] == [40, 40]
    for (found, _), wanted in zip(counts, seen, strict=True):
        assert abs(found - wanted) <= 2  # of some hundreds: sums differ in their last bit
        assert 0.05 < found / 40 / 160 < 0.3  # 0.15 of normally distributed scores


@needs_engine
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_packed_files_and_units_on_disk(precision: str, tmp_path: Path) -> None:
    path, tokens = tmp_path / "model.spk", some_tokens(101, 12)
    save(packed("spark", Precision.of(precision)), path)
    wanted = twin("spark", Precision.of(precision), 12)
    for from_disk in (False, True):
        assert_twins(stepped(start(open_packed(path, from_disk)), tokens), wanted)


@needs_engine
def test_generate_of_transformers_writes_what_the_engine_writes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = ScalingTransformerConfig.from_spec(spec_of("spark"))
    ScalingTransformerForCausalLM(config).save_pretrained(tmp_path)
    model = ScalingTransformerForCausalLM.from_pretrained(tmp_path).eval()
    assert model.config.spec == spec_of("spark")
    prompt = some_tokens(101, 5)
    text = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 5),
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )[0].tolist()
    engine = start(pack(model.config.spec, weights_of(model), Precision.of("float32")))
    sequence = engine.sequence(30)
    logits = engine.prefill(sequence, prompt)
    for token in text[5:]:
        assert int(np.argmax(logits)) == token
        logits = engine.step(sequence, token)
