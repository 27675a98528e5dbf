"""Layouts, and the kernels through small engines: random and odd sizes, extreme values, what must not be read."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import INSTRUCTION_SETS, assert_close, assert_twins, some_tokens, start, stepped

from sparsecli.decode.native import binding
from sparsecli.decode.packed.layouts import SPAN, Slot, arrange, unpack
from sparsecli.decode.packed.pack import pack, quantise_rows
from sparsecli.decode.packed.precision import Precision
from sparsecli.decode.packed.tensors import slots
from sparsecli.decode.reference.step import Reference
from sparsecli.model.quantization import from_bfloat16, to_bfloat16
from sparsecli.model.tensors import tensor_shapes
from sparsecli.spec.model import ModelSpec

needs_the_engine = pytest.mark.skipif(
    binding.available() is not None, reason=f"native engine: {binding.available()}"
)
few = settings(max_examples=30, derandomize=True, deadline=None, database=None)

TYPES = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}
sizes = st.integers(1, 150)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Engines made in the test use it."""
    monkeypatch.setenv("SPARSECLI_ISA", request.param)
    return request.param


# -- layouts -------------------------------------------------------------------------------------------------


@st.composite
def packed_slots(draw: st.DrawFn) -> tuple[Slot, str]:
    layout = draw(st.sampled_from(["vector", "rows", "spans", "panels", "taps", "blocks", "units"]))
    group = draw(st.integers(1, 40)) if layout == "blocks" else draw(st.integers(1, 4))
    rows = 1 if layout == "vector" else draw(sizes)
    cols = draw(sizes)
    kind = draw(st.sampled_from(list(TYPES)))
    if layout == "blocks":
        rows = group * draw(st.integers(1, 5))
    if layout == "spans":
        cols = draw(sizes | st.integers(SPAN - 2, 3 * SPAN))
        rows = min(rows, 20)
    if layout == "taps":
        cols *= group
        kind = "bfloat16" if kind == "int8" else kind
    return Slot(0, "weight", layout, rows, cols, None, (), group=group), kind


@few
@given(packed_slots())
def test_what_is_packed_can_be_unpacked(slot_and_kind: tuple[Slot, str]) -> None:
    slot, kind = slot_and_kind
    numbers = np.random.default_rng(0).integers(1, 127, (slot.rows, slot.cols)).astype(TYPES[kind])
    arranged = arrange(slot, numbers)
    assert arranged.size == slot.elements
    np.testing.assert_array_equal(unpack(slot, arranged), numbers)
    # What fills up is zero; int8 panels hold 128 more.
    empty = -128 if slot.layout == "panels" and kind == "int8" else 0
    assert (arranged != empty).sum() == numbers.size


def test_a_small_panel_by_hand() -> None:
    """Two outputs and three inputs, in pairs of inputs: outputs lie side by side."""
    slot = Slot(0, "E", "panels", 2, 3, None, ())
    arranged = arrange(slot, np.array([[1, 2, 3], [4, 5, 6]], np.uint16))
    pairs = arranged.reshape(-1, 16, 2)
    assert pairs[:2, :2].tolist() == [[[1, 2], [4, 5]], [[3, 0], [6, 0]]]


def test_a_small_controller_by_hand() -> None:
    """One block of two units and rank three: pairs of ranks, units side by side."""
    slot = Slot(0, "second", "blocks", 2, 3, None, (), group=2)
    arranged = arrange(slot, np.array([[1, 2, 3], [4, 5, 6]], np.int8))
    assert arranged.reshape(-1, 16, 2)[:, :2].tolist() == [[[1, 2], [4, 5]], [[3, 0], [6, 0]]]


def test_bfloat16_rounds_as_torch_does() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values[:4] = [1 + 2**-8, 1 + 3 * 2**-8, -0.0, 3.0e38]  # ties go to even
    rounded = torch.from_numpy(values).bfloat16()
    np.testing.assert_array_equal(to_bfloat16(values), rounded.view(torch.uint16).numpy())
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(values)), rounded.float().numpy())


def test_quantised_rows_are_near() -> None:
    rows = np.random.default_rng(0).standard_normal((20, 30)).astype(np.float32)
    rows[3] = 0
    rows[4] *= 1e-30
    rows[5] = 1e-44  # its scale has no finite inverse
    integers, scale = quantise_rows(rows)
    assert (np.abs(integers).max(axis=1)[:3] == 127).all()
    assert (np.abs(integers * scale[:, None] - rows) <= scale[:, None] * 0.501 + 1e-43).all()


# -- random architectures ------------------------------------------------------------------------------------


def random_weights(spec: ModelSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights that keep every layer's outputs near one."""
    generator = np.random.default_rng(seed)
    weights = {}
    for name, shape in tensor_shapes(spec).items():
        values = generator.standard_normal(shape)
        if name.endswith("norm.weight"):
            values = 1 + 0.1 * values
        elif len(shape) == 1:
            values *= 0.1
        elif "embedding" not in name and not name.endswith(".D"):
            values /= np.sqrt(np.prod(shape[1:]))
        weights[name] = values.astype(np.float32)
    return weights


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Small architectures of every kind, of any size that is allowed."""
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    width = 2 * draw(st.integers(1, 20))
    d_model = heads * width
    divisors = [n for n in range(1, d_model + 1) if d_model % n == 0]
    kind = draw(st.sampled_from(["dense", "sparse", "mixture"]))
    feed_forward: dict = {
        "kind": kind,
        "activation": draw(st.sampled_from(["relu", "gelu", "silu"])),
        "d_ff": draw(sizes),
    }
    if kind == "dense":
        feed_forward |= {"gated": draw(st.booleans()), "bias": draw(st.booleans())}
    elif kind == "sparse":
        block = draw(st.integers(2, 70))
        feed_forward |= {
            "block_size": block,
            "d_ff": block * draw(st.integers(1, 6)),
            "rank": draw(st.integers(1, 70)),
            "units_per_block": draw(st.integers(1, min(block - 1, 6))),
            "gated": draw(st.booleans()),
            "unit_bias": draw(st.booleans()),
        }
    else:
        experts = draw(st.integers(3, 9))
        feed_forward |= {
            "experts": experts,
            "d_ff": experts * draw(st.integers(1, 40)),
            "experts_per_token": draw(st.integers(1, 2)),
        }
    if kind != "dense":
        feed_forward["gate"] = draw(st.sampled_from(["none", "probability"]))
    projection = draw(st.sampled_from(["dense", "multiplicative", "dense_conv", "multiplicative_conv"]))
    attention: dict = {
        "projection": projection,
        "output_projection": draw(
            st.sampled_from([None, "none", "dense", "multiplicative", "multiplicative_conv"])
        ),
        "modules": draw(st.sampled_from(divisors)),
        "kernel": draw(st.integers(1, 5)),
        "bias": draw(st.booleans()),
    }
    if projection == "dense":
        attention["key_value_heads"] = draw(
            st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])
        )
    elif projection.endswith("_conv"):
        attention["value_concat"] = draw(st.sampled_from(["none", "modules", "whole"]))
    vocabulary: dict = draw(
        st.sampled_from([{"kind": "dense", "bias": True}, {"kind": "dense", "tied": True}])
        | st.builds(lambda n: {"kind": "multiplicative", "modules": n}, st.integers(1, 5))
    )
    vocabulary["size"] = draw(sizes) * vocabulary.get("modules", 1)
    return ModelSpec.model_validate(
        {
            "d_model": d_model,
            "layers": draw(st.integers(1, 2)),
            "heads": heads,
            "max_positions": 40,
            "feed_forward": feed_forward,
            "attention": attention,
            "vocabulary": vocabulary,
            "normalization": draw(st.sampled_from(["layer", "rms"])),
            "positions": draw(st.sampled_from(["learned", "sinusoidal", "rotary"])),
        }
    )


@needs_the_engine
@few
@given(specs(), st.integers(1, 3), st.sampled_from(INSTRUCTION_SETS or [""]))
def test_random_architectures_in_float32(spec: ModelSpec, threads: int, instruction_set: str) -> None:
    tokens = some_tokens(spec.vocabulary.size, 19)
    model = pack(spec, random_weights(spec), Precision.of("float32"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSECLI_ISA", instruction_set)
        engine = start(model, threads)
    wanted = Reference(model).logits(tokens)
    scale = max(1, np.abs(wanted).max())
    assert_close(stepped(engine, tokens) / scale, wanted / scale, 1e-5)
    assert_close(engine.logits(engine.sequence(19), tokens) / scale, wanted / scale, 1e-5)


@needs_the_engine
@few
@given(specs(), st.sampled_from(["bfloat16", "int8"]), st.sampled_from(["bfloat16", "int8"]), st.booleans())
def test_random_architectures_in_fewer_bits(
    spec: ModelSpec, kind: str, cache: str, small_table: bool
) -> None:
    tokens = some_tokens(spec.vocabulary.size, 19)
    precision = Precision.of(kind, cache=cache, embedding="int8" if small_table else "bfloat16")
    model = pack(spec, random_weights(spec), precision)
    engine = start(model, 2)
    wanted = Reference(model).logits(tokens)
    scale = max(1, np.abs(wanted).max())
    assert_twins(stepped(engine, tokens) / scale, wanted / scale)
    assert_twins(engine.logits(engine.sequence(19), tokens) / scale, wanted / scale)


# -- extreme values ------------------------------------------------------------------------------------------


def plain_spec(d_model: int = 64, size: int = 20, **feed_forward: object) -> ModelSpec:
    """One block without biases that matter, RMS norm and learned positions."""
    return ModelSpec.model_validate(
        {
            "d_model": d_model,
            "layers": 1,
            "heads": 2,
            "max_positions": 40,
            "feed_forward": {"kind": "dense", "d_ff": 32, "bias": False, **feed_forward},
            "attention": {"projection": "dense", "bias": False},
            "vocabulary": {"kind": "dense", "size": size},
            "normalization": "rms",
        }
    )


def with_layers(feed_forward: dict, **attention: object) -> ModelSpec:
    """The same with another feed-forward layer, and with other projections."""
    fields = plain_spec().model_dump() | {"feed_forward": feed_forward}
    return ModelSpec.model_validate(fields | ({"attention": attention} if attention else {}))


def constant_weights(spec: ModelSpec, value: float = 0.0) -> dict[str, np.ndarray]:
    return {
        name: np.full(shape, 1.0 if name.endswith("norm.weight") else value, np.float32)
        for name, shape in tensor_shapes(spec).items()
    }


@needs_the_engine
def test_integer_sums_that_all_point_one_way(instruction_set: str) -> None:
    """Equal weights and equal activations: the largest sums there can be, in a head and in a wide layer."""
    spec = plain_spec(d_model=640, d_ff=4200)
    weights = constant_weights(spec)
    weights["model.embedding.weight"][:] = 1
    weights["head.weight"][:] = 0.5
    weights["model.layers.0.feed_forward.up.weight"][:] = 0.001
    weights["model.layers.0.feed_forward.down.weight"][:300] = -0.001
    model = pack(spec, weights, Precision.of("int8", embedding="float32"))
    tokens = [1, 2, 1, 2, 1]  # enough for a tile of tokens
    wanted = Reference(model).logits(tokens)
    engine = start(model)
    assert_close(stepped(engine, tokens), wanted)
    assert_close(engine.logits(engine.sequence(5), tokens), wanted)


@needs_the_engine
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_rows_that_are_cut(precision: str, instruction_set: str) -> None:
    """Rows of dense maps and of units that are longer than what is computed at a time."""
    wide = plain_spec(d_model=4160, size=5).model_dump() | {
        "heads": 65,
        "feed_forward": {"kind": "sparse", "d_ff": 20, "block_size": 4, "rank": 6},
        "attention": {"projection": "multiplicative", "output_projection": "none"},
    }
    for spec in (plain_spec(d_ff=2 * SPAN + 30), ModelSpec.model_validate(wide)):
        model = pack(spec, random_weights(spec), Precision.of(precision))
        tokens = some_tokens(spec.vocabulary.size, 6)
        wanted = Reference(model).logits(tokens)
        engine = start(model, 2)
        assert_twins(stepped(engine, tokens), wanted)
        assert_twins(engine.logits(engine.sequence(6), tokens), wanted)


@needs_the_engine
@pytest.mark.parametrize("rank", [512, 700])  # more than 512 would leave 32 bits, and are not packed as int8
def test_integer_sums_of_a_controller_that_all_point_one_way(rank: int, instruction_set: str) -> None:
    """Another unit than the first of each block is the best."""
    spec = with_layers({"kind": "sparse", "d_ff": 32, "block_size": 16, "rank": rank})
    weights = constant_weights(spec)
    weights["model.embedding.weight"][:] = 1
    place = "model.layers.0.feed_forward."
    weights[f"{place}controller.first"][:] = 0.1
    weights[f"{place}controller.second"][:] = -0.1
    weights[f"{place}controller.second"][[3, 20]] = 0.1
    weights[f"{place}up"][[3, 20]] = 0.1
    weights[f"{place}down"][3, ::2] = 1
    weights["head.weight"][:, 0] = 1
    model = pack(spec, weights, Precision.of("int8"))
    assert ("blocks.0.controller.second.scale" in model.tensors) == (rank == 512)
    wanted = Reference(model).logits([1, 2])
    engine = start(model)
    assert_close(stepped(engine, [1, 2]), wanted)
    assert_close(engine.logits(engine.sequence(2), [1, 2]), wanted)


@needs_the_engine
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e4])
def test_tiny_and_large_numbers(size: float, precision: str, instruction_set: str) -> None:
    """Norms that shrink what follows to nothing, or nearly, or blow it up."""
    spec = with_layers(
        {"kind": "sparse", "d_ff": 60, "block_size": 10, "rank": 6},
        projection="multiplicative_conv",
        output_projection="multiplicative",
    )
    weights = random_weights(spec)
    for norm in ("attention_norm", "feed_forward_norm"):
        weights[f"model.layers.0.{norm}.weight"][:] = size
    model = pack(spec, weights, Precision.of(precision, cache=precision))
    tokens = some_tokens(spec.vocabulary.size, 12)
    wanted = Reference(model).logits(tokens)
    engine = start(model, 2)
    assert_twins(stepped(engine, tokens), wanted)
    assert_twins(engine.logits(engine.sequence(12), tokens), wanted)


@needs_the_engine
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_activations_far_from_zero(activation: str, instruction_set: str) -> None:
    spec = plain_spec(activation=activation, d_ff=50)
    weights = random_weights(spec)
    weights["model.layers.0.feed_forward.up.weight"] *= np.geomspace(0.01, 300, 50)[:, None].astype(
        np.float32
    )
    model = pack(spec, weights, Precision.of("float32"))
    tokens = some_tokens(20, 12)
    wanted = Reference(model).logits(tokens)
    assert_close(stepped(start(model), tokens), wanted, 5e-5)
    engine = start(model)
    assert_close(engine.logits(engine.sequence(12), tokens), wanted, 5e-5)


@needs_the_engine
@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
def test_attention_that_sees_one_position_alone(cache: str, instruction_set: str) -> None:
    """Scores of hundreds: their exponentials must not overflow, and those far below vanish."""
    spec = plain_spec()
    weights = random_weights(spec)
    for name in ("query", "key"):
        weights[f"model.layers.0.attention.projection.{name}.weight"] *= 30
    model = pack(spec, weights, Precision.of("float32", cache=cache))
    tokens = some_tokens(20, 37)
    rows, wanted = stepped(start(model), tokens), Reference(model).logits(tokens)
    if cache == "float32":
        assert_close(rows, wanted, 2e-3)  # a score's last bit is a large step here
    else:
        assert_twins(rows, wanted)


# -- what is not read ----------------------------------------------------------------------------------------


@needs_the_engine
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rows_of_units_that_were_not_chosen_or_are_silent_are_not_read(
    precision: str, instruction_set: str
) -> None:
    """They are made NaN: whoever reads one spoils the result."""
    spec = with_layers(
        {
            "kind": "sparse",
            "d_ff": 96,
            "block_size": 16,
            "rank": 6,
            "units_per_block": 3,
            "unit_bias": True,
        }
    )
    weights = random_weights(spec)
    place = "model.layers.0.feed_forward."
    never, silent = [5, 17, 30, 95], [0, 1, 40, 77]
    weights[f"{place}controller.bias"][never] = -1e6
    weights[f"{place}unit_bias"][silent] = -1e6
    model = pack(spec, weights, Precision.of(precision))
    tokens = some_tokens(20, 30)
    engine = start(model)
    wanted = stepped(engine, tokens), engine.logits(engine.sequence(30), tokens)
    rows = engine.model.tensors["blocks.0.units"].reshape(96, 2, -1)
    nan = np.nan if precision == "float32" else 0x7FC0
    rows[never] = nan
    rows[silent, 1] = nan
    again = stepped(engine, tokens), engine.logits(engine.sequence(30), tokens)
    for ours, theirs in zip(again, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# -- limits of the system ------------------------------------------------------------------------------------

MANY_THREADS = """
import resource
import numpy as np
from sparsecli.decode.engine import Engine
from sparsecli.decode.packed.precision import Precision
from sparsecli.decode.packed.pack import pack
from sparsecli.spec.model import DEFAULT
from sparsecli.model.tensors import tensor_shapes

weights = {name: np.ones(shape, np.float32) for name, shape in tensor_shapes(DEFAULT).items()}
model = pack(DEFAULT, weights, Precision.of("int8"))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000,) * 2)
try:
    Engine(model, 200)
except Exception as error:
    print(type(error).__name__, error)
"""


@needs_the_engine
@pytest.mark.skipif(sys.platform != "linux", reason="sets limits as Linux has them")
def test_threads_that_the_system_refuses() -> None:
    """One clear error, and no thread is left behind to end the process."""
    done = subprocess.run([sys.executable, "-c", MANY_THREADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("ValueError", "Failure"))


def test_every_tensor_has_a_place_of_its_own() -> None:
    spec = plain_spec()
    keys = [slot.key for slot in slots(spec)]
    assert len(set(keys)) == len(keys)
