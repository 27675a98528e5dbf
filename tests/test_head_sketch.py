"""A head with a sketch: 2-bit logits of all tokens, and those of the likeliest again from the head's own rows."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import start

from sparsecli.bench.bytes_read import bits_per_weight, bytes_per_token
from sparsecli.convert.candidates import ROUNDING, ConversionCandidate
from sparsecli.convert.linear_layers import LinearLayer, TypeChoice, choose_types, linear_layers
from sparsecli.convert.methods.rounding import InputMoment, round_to_type
from sparsecli.convert.weight_types import RoundedLayers
from sparsecli.decode.native import binding
from sparsecli.decode.packed.file import open_packed, save
from sparsecli.decode.packed.folder import pack_folder
from sparsecli.decode.packed.pack import PackedModel, pack
from sparsecli.decode.packed.precision import Precision
from sparsecli.decode.reference.step import Reference
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.gguf_types import SKETCH, TYPES, panels_of, put_together, row_values, take_apart, values
from sparsecli.model.layers.gguf import rescored
from sparsecli.spec.model import ModelSpec

needs_engine = pytest.mark.skipif(binding.available() is not None, reason="the native engine is not there")

VOCABULARY = 700
HEADS = {
    "tied": ("Q8_0", {"d_model": 96}, {"tied": True}),
    "tied, K type": ("Q6_K", {"d_model": 256}, {"tied": True}),
    "bias": ("Q5_1", {"d_model": 64}, {"tied": False, "bias": True}),
    "K type with minima": ("Q4_K", {"d_model": 256}, {"tied": False, "bias": False}),
}


def model_spec(name: str, **quantization: object) -> ModelSpec:
    _, widths, vocabulary = HEADS[name]
    fields: dict[str, object] = {
        "layers": 2,
        "heads": 4,
        "max_positions": 64,
        "positions": "rotary",
        "normalization": "rms",
        "feed_forward": {"kind": "dense", "d_ff": 64, "gated": True, "activation": "silu", "bias": False},
        "vocabulary": {"kind": "dense", "size": VOCABULARY, **vocabulary},
        "quantization": quantization,
    }
    return ModelSpec.model_validate(fields | widths)


@cache
def sketched(name: str, candidates: int = 48) -> ScalingTransformerForCausalLM:
    """A random model whose head has a sketch of its weights."""
    torch.manual_seed(0)
    plain = model_spec(name)
    dense = ScalingTransformerForCausalLM(ScalingTransformerConfig.from_spec(plain)).eval()
    kind = HEADS[name][0]
    spec = model_spec(name, gguf={plain.head_module: kind}, head_candidates=candidates)
    made = ScalingTransformerForCausalLM(ScalingTransformerConfig.from_spec(spec)).eval()
    weight = dense.get_submodule(plain.head_module).weight.detach()
    x = torch.randn(200, weight.shape[1])
    inputs = InputMoment((x.T @ x).double() / len(x))
    with torch.no_grad():
        made.load_state_dict(dense.state_dict(), strict=False)
        exact, _ = round_to_type(TYPES[kind], weight, inputs)
        made.get_submodule(plain.head_module).codes.copy_(torch.from_numpy(put_together(TYPES[kind], exact)))
        parts, _ = round_to_type(SKETCH, weight, inputs)
        made.head.sketch.copy_(torch.from_numpy(panels_of(SKETCH, parts)))
        if (bias := getattr(made.head, "bias", None)) is not None:
            bias.normal_()
    return made


def packed(name: str, candidates: int = 48) -> PackedModel:
    made = sketched(name, candidates)
    weights = {key: tensor.numpy() for key, tensor in made.state_dict().items()}
    return pack(made.config.spec, weights, Precision.of("float32"))


def tokens(count: int = 12, seed: int = 0) -> list[int]:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# -- the type --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "cols"), [(16, 64), (50, 576), (33, 96)])
def test_a_sketch_in_panels_is_what_was_rounded(rows: int, cols: int) -> None:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    parts, made = round_to_type(SKETCH, weight, InputMoment(torch.eye(cols, dtype=torch.float64)))
    panels = panels_of(SKETCH, parts)
    assert panels.shape == SKETCH.panel_shape(rows, cols)
    np.testing.assert_array_equal(values(SKETCH, panels, rows, cols), made.numpy())
    assert parts.codes.max() == 3
    assert float((made - weight).square().mean() / weight.square().mean()) < 0.16


@pytest.mark.parametrize("name", TYPES)
def test_rows_of_a_file_have_the_values_of_its_panels(name: str) -> None:
    kind = TYPES[name]
    weight = torch.randn(20, 512, generator=torch.Generator().manual_seed(0))
    parts, made = round_to_type(kind, weight, InputMoment(torch.eye(512, dtype=torch.float64)))
    raw = put_together(kind, parts)
    assert raw.shape == (20, kind.row_bytes(512))
    np.testing.assert_array_equal(row_values(kind, raw), made.numpy())


def test_the_largest_of_every_lane_are_exact() -> None:
    logits = torch.randn(3, 2, 1000, generator=torch.Generator().manual_seed(0))
    found = rescored(logits, torch.zeros_like(logits), 64)
    exact = (found == 0).flatten(0, 1)
    lane_of = torch.arange(1000) // 16 % 16
    for row, chosen in zip(logits.flatten(0, 1), exact, strict=True):
        for lane in range(16):
            ours = row[lane_of == lane]
            assert torch.equal(chosen[lane_of == lane], ours >= ours.topk(4).values[-1])


# -- the engine ------------------------------------------------------------------------------------------------


@needs_engine
@pytest.mark.parametrize("name", HEADS)
def test_the_engine_computes_what_its_twin_and_pytorch_do(name: str) -> None:
    model, ids = packed(name), tokens()
    twin = Reference(model).logits(ids)
    engine = start(model)
    found = engine.logits(engine.sequence(len(ids)), ids)
    with torch.no_grad():
        theirs = sketched(name)(torch.tensor([ids])).logits[0].numpy()
    scale = twin.std()
    # Tokens that are candidates on one side alone differ by the sketch's error; there are few of them.
    for other, least in ((twin, 0.999), (theirs, 0.99)):
        assert (np.abs(found - other) < 0.05 * scale).mean() > least
        assert (found.argmax(-1) == other.argmax(-1)).all()


@needs_engine
@pytest.mark.parametrize("name", ["tied", "bias"])
def test_the_likeliest_tokens_have_the_logits_of_the_head_itself(name: str) -> None:
    """Where all tokens are candidates, there is no trace of the sketch."""
    ids = tokens()
    every = -(-VOCABULARY // 256) * 256
    some = start(packed(name))
    all_ = start(packed(name, every))
    found = some.logits(some.sequence(len(ids)), ids)
    exact = all_.logits(all_.sequence(len(ids)), ids)
    same = found == exact
    assert (same.sum(-1) >= 48).all()
    assert not same.all()
    order = np.argsort(-exact, axis=-1)[:, :8]
    assert np.take_along_axis(same, order, -1).mean() > 0.95


@needs_engine
@pytest.mark.parametrize("name", ["tied", "K type with minima"])
def test_logits_depend_neither_on_threads_nor_on_other_tokens(name: str) -> None:
    model = packed(name)
    ids, others = tokens(20), tokens(20, seed=1)
    engine = start(model)
    sequence = engine.sequence(20)
    expected = np.stack([engine.step(sequence, token) for token in ids])
    for threads in (2, 3):
        engine = start(model, threads)
        np.testing.assert_array_equal(engine.logits(engine.sequence(20), ids), expected)
        sequences = [engine.sequence(20), engine.sequence(20)]
        for at, pair in enumerate(zip(ids, others, strict=True)):
            np.testing.assert_array_equal(engine.step_batch(sequences, pair)[0], expected[at])


@needs_engine
@pytest.mark.parametrize("name", ["tied", "bias"])
def test_a_file_and_a_folder_hold_the_same(name: str, tmp_path: Path) -> None:
    model, ids = packed(name), tokens()
    save(model, tmp_path / "model.spk")
    sketched(name).save_pretrained(tmp_path / "folder")
    folder = pack_folder(tmp_path / "folder", model.spec, model.precision)
    engine = start(model)
    expected = engine.logits(engine.sequence(len(ids)), ids)
    for other in (open_packed(tmp_path / "model.spk"), folder):
        assert other.spec == model.spec
        engine = start(other)
        np.testing.assert_array_equal(engine.logits(engine.sequence(len(ids)), ids), expected)
    loaded = ScalingTransformerForCausalLM.from_pretrained(tmp_path / "folder")
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(torch.tensor([ids])).logits, sketched(name)(torch.tensor([ids])).logits
        )


# -- what is read ----------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_sketch_and_of_the_candidates() -> None:
    spec, precision = packed("tied").spec, Precision.of("float32")
    without = spec.model_copy(
        update={"quantization": spec.quantization.model_copy(update={"head_candidates": None})}
    )
    row = TYPES["Q8_0"].row_bytes(96)
    sketch = VOCABULARY * (96 * 2.5 / 8 + 4)
    difference = bytes_per_token(without, precision, 1) - bytes_per_token(spec, precision, 1)
    assert difference == pytest.approx((VOCABULARY - 48) * row - sketch, abs=2)
    assert bits_per_weight(spec, precision) < bits_per_weight(without, precision)
    name = ConversionCandidate(spec, ROUNDING, bytes_per_token(spec, precision, context=0)).name
    bits = float(name.removeprefix("rounding, ").removesuffix(" bits a weight"))
    assert bits == pytest.approx(bits_per_weight(spec, precision), rel=0.02)


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"head_candidates": 64}, "needs a type of GGUF for the weights of the logits, model.embedding"),
        ({"gguf": {"model.embedding": "Q8_0"}, "head_candidates": 50}, "multiple"),
    ],
)
def test_a_sketch_that_cannot_be(quantization: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model_spec("tied", **quantization)


# -- conversion ------------------------------------------------------------------------------------------------


@needs_engine
@pytest.mark.parametrize("name", ["tied", "bias"])
def test_a_conversion_chooses_a_sketch_where_it_costs_least(name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    spec = model_spec(name)
    dense = ScalingTransformerForCausalLM(ScalingTransformerConfig.from_spec(spec)).eval()
    with torch.no_grad():
        dense.get_submodule(spec.head_module).weight.mul_(3)  # surer of a token than random weights are
    rounded = RoundedLayers(dense, tmp_path)
    ids = torch.randint(VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(1))
    rounded.fit(ids.split(1), lambda path, tensors: save_file(tensors, path))
    gradients = {
        "head" if layer.name == spec.head_module else layer.name: torch.full((layer.rows,), 1e-3)
        for layer in linear_layers(spec)
    }
    options = rounded.options(gradients)
    of_head = [option for option in options if option.layer.name == spec.head_module]
    [sketch] = [option for option in of_head if option.candidates]
    assert sketch.bytes < min(option.bytes for option in of_head if not option.candidates)
    assert 0 < sketch.increase < 1
    choice = choose_types(options, 1e9)
    assert choice is not None
    assert choice.head_candidates == sketch.candidates == 32
    assert choice.types[spec.head_module] == "Q8_0"
    assert "logits from a sketch" in choice.shares
    rounded.write(choice, tmp_path / "model")
    made = ScalingTransformerForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert made.config.spec.quantization.head_candidates == 32
    with torch.no_grad():
        theirs = made(ids[:1]).logits[0].numpy()
    model = pack_folder(tmp_path / "model", made.config.spec, Precision.of("float32"))
    engine = start(model)
    found = engine.logits(engine.sequence(24), ids[0].tolist())
    assert (np.abs(found - theirs) < 0.1 * theirs.std()).mean() > 0.95
    check_again(made, choice, tmp_path)


def check_again(made: ScalingTransformerForCausalLM, choice: TypeChoice, folder: Path) -> None:
    """A model with a sketch is a source itself, with or without a sketch of its own: its codes stay."""
    module = made.config.spec.head_module
    codes = made.get_submodule(module).codes.numpy()
    again = RoundedLayers(made, folder)
    again.write(TypeChoice(choice.types, choice.bytes, 0.0), folder / "without")
    plain = ScalingTransformerForCausalLM.from_pretrained(folder / "without").get_submodule(module)
    kind = TYPES["Q8_0"]
    expected = take_apart(kind, codes).codes
    assert not plain.by_rows
    np.testing.assert_array_equal(plain.weight.numpy(), row_values(kind, codes))
    assert expected.shape == (plain.rows, plain.cols)
    again.write(choice, folder / "with")
    kept = ScalingTransformerForCausalLM.from_pretrained(folder / "with").get_submodule(module)
    np.testing.assert_array_equal(kept.codes.numpy(), codes)


def test_numbers_of_candidates() -> None:
    assert LinearLayer("head", 49152, 576, "Q8_0").candidates == [512, 1024, 2048]
    assert LinearLayer("head", 9000, 576, None).candidates == [512]
    assert LinearLayer("head", 300, 64, None).candidates == [16]
    assert LinearLayer("head", 100, 64, None).candidates == []
    assert LinearLayer("model.layers.0.feed_forward.up", 49152, 576, None).candidates == []
    assert LinearLayer("head", 300, 65, None).candidates == []
