"""Models with quantized weights: by value against transformers and the reference, on every instruction set."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    INSTRUCTION_SETS,
    QUANTIZED,
    assert_close,
    assert_twins,
    batched,
    expected,
    network,
    packed,
    some_tokens,
    spec_of,
    start,
    stepped,
    twin,
    weights_of,
)

from sparsecli.console import Failure
from sparsecli.decode.native import binding
from sparsecli.decode.packed.layouts import Slot
from sparsecli.decode.packed.pack import pack
from sparsecli.decode.packed.precision import Precision
from sparsecli.decode.packed.quantized_layouts import arrange_panels, arrange_residual
from sparsecli.decode.reference.step import Reference
from sparsecli.decode.reference.weights import unpack_quantized, unpack_residual
from sparsecli.model.quantization import (
    dequantize_groups,
    dequantize_residual,
    pack_nibbles,
    quantize_groups,
    quantize_residual,
)
from sparsecli.spec.model import ModelSpec

needs_the_engine = pytest.mark.skipif(
    binding.available() is not None, reason=f"native engine: {binding.available()}"
)
every_model = pytest.mark.parametrize("name", QUANTIZED)
COUNT = 24
EXACT = Precision.of("float32")
few = settings(max_examples=30, derandomize=True, deadline=None, database=None)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Engines made in the test use it."""
    monkeypatch.setenv("SPARSECLI_ISA", request.param)
    return request.param


def tokens_of(name: str, count: int = COUNT) -> list[int]:
    return some_tokens(spec_of(name).vocabulary.size, count)


# -- layouts -------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 2), st.integers(1, 70), st.integers(1, 300), st.sampled_from([3, 4]))
def test_panels_can_be_unpacked(maps: int, rows: int, cols: int, bits: int) -> None:
    slot = Slot(0, "sketch", "quantized", maps * rows, cols, None, (), group=maps, bits=bits)
    weights = np.random.default_rng(0).standard_normal((maps, rows, cols)).astype(np.float32)
    parts = [quantize_groups(matrix, bits) for matrix in weights]
    arranged = np.stack([arrange_panels(*part, bits) for part in parts], axis=1).reshape(-1)
    assert arranged.size == slot.elements
    wanted = np.concatenate([dequantize_groups(*part, cols) for part in parts])
    np.testing.assert_array_equal(unpack_quantized(slot, arranged).values()[:, :cols], wanted)


@few
@given(st.integers(2, 3), st.integers(1, 20), st.integers(1, 300))
def test_residuals_can_be_unpacked(parts: int, units: int, cols: int) -> None:
    slot = Slot(0, "residual", "residual", parts * units, cols, None, (), group=parts, bits=4)
    values = np.random.default_rng(0).standard_normal((parts, units, cols)).astype(np.float32)
    rows = [quantize_residual(matrix) for matrix in values]
    arranged = arrange_residual([pack_nibbles(codes) for codes, _ in rows], [scale for _, scale in rows])
    assert arranged.size == slot.elements
    wanted = np.stack([dequantize_residual(*row, cols) for row in rows], axis=1).reshape(-1, cols)
    np.testing.assert_array_equal(unpack_residual(slot, arranged.reshape(-1)).values()[:, :cols], wanted)


def test_a_lane_of_four_bits_by_hand() -> None:
    """Inputs 0 to 7 of the second output: pairs in either half of a word, one nibble after the other."""
    codes = np.zeros((2, 64), np.uint8)
    codes[1, :8] = [1, 2, 3, 4, 5, 6, 7, 8]
    panel = arrange_panels(codes, np.ones((2, 1), np.uint16), np.zeros((2, 1), np.uint8), 4)
    words = panel[0, :512].view(np.uint32).reshape(8, 16)
    assert hex(words[0, 1]) == "0x86427531"
    assert np.count_nonzero(words) == 1


def test_a_lane_of_three_bits_by_hand() -> None:
    """The first code's two lower bits and its highest; the lowest bit of the third below its upper ones."""
    codes = np.zeros((1, 64), np.uint8)
    codes[0, [0, 2]] = [0b101, 0b110]
    panel = arrange_panels(codes, np.ones((1, 1), np.uint16), np.zeros((1, 1), np.uint8), 3)
    words = panel[0, :384].view(np.uint32).reshape(6, 16)
    assert bin(words[0, 0]) == "0b1101"
    assert bin(words[4, 0]) == "0b100"


# -- values --------------------------------------------------------------------------------------------------


@needs_the_engine
@every_model
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_the_engine_equals_its_twin(name: str, kind: str, instruction_set: str) -> None:
    precision = Precision.of(kind)
    engine = start(packed(name, precision), 2)
    tokens, wanted = tokens_of(name), twin(name, precision, COUNT)
    assert_twins(stepped(engine, tokens), wanted)
    assert_twins(engine.logits(engine.sequence(COUNT), tokens), wanted)


@every_model
def test_the_twin_equals_transformers(name: str) -> None:
    assert_close(twin(name, EXACT, COUNT), expected(name, COUNT), 2e-3)


@needs_the_engine
@pytest.mark.parametrize("name", ["dense", "dense, gated, grouped queries", "sparse", "multiplicative head"])
def test_plain_models_in_four_bits(name: str, instruction_set: str) -> None:
    precision = Precision.of("int4")
    engine = start(packed(name, precision), 2)
    tokens, wanted = tokens_of(name), twin(name, precision, COUNT)
    assert_twins(stepped(engine, tokens), wanted)
    assert_twins(engine.logits(engine.sequence(COUNT), tokens), wanted)


def quantized_head() -> ModelSpec:
    return ModelSpec.model_validate(
        {
            "d_model": 192,
            "layers": 1,
            "heads": 2,
            "max_positions": 40,
            "feed_forward": {"kind": "dense", "d_ff": 32},
            "attention": {"projection": "dense"},
            "vocabulary": {"kind": "dense", "size": 40},
            "normalization": "rms",
            "quantization": {"head": 4},
        }
    )


@needs_the_engine
def test_a_quantized_head_has_nothing_more_exact() -> None:
    spec = quantized_head()
    weights = weights_of_zeros(spec)
    plain, rescored = (
        start(pack(spec, weights, Precision.of("int8", head_rescoring=rescoring)))
        for rescoring in (False, True)
    )
    assert "head.exact" not in rescored.model.tensors
    np.testing.assert_array_equal(stepped(rescored, [1, 2]), stepped(plain, [1, 2]))


@needs_the_engine
def test_sums_that_all_point_one_way(instruction_set: str) -> None:
    """The largest codes, zeros and activations: sums of a group that nearly fill 32 bits."""
    spec = quantized_head()
    for zero in (0, 255):
        weights = weights_of_zeros(spec)
        weights["model.embedding.weight"][:] = 1
        weights["model.norm.weight"][:] = 1
        weights["head.codes"][:20] = 0xFF
        weights["head.scale"][:] = 0.5
        weights["head.zero"][:] = zero
        model = pack(spec, weights, EXACT)
        tokens = [1, 2] * 5
        wanted = Reference(model).logits(tokens)
        np.testing.assert_allclose(wanted[0, [0, 39]], [96 * (15 - zero / 16), -96 * zero / 16], rtol=1e-4)
        engine = start(model)
        assert_close(stepped(engine, tokens), wanted)
        assert_close(engine.logits(engine.sequence(10), tokens), wanted)


def weights_of_zeros(spec: ModelSpec) -> dict[str, np.ndarray]:
    from sparsecli.model.tensors import tensor_shapes

    integers = ("codes", "zero")
    return {
        name: np.zeros(shape, np.uint8 if name.endswith(integers) else np.float32)
        for name, shape in tensor_shapes(spec).items()
    }


# -- ways of calling -----------------------------------------------------------------------------------------


@needs_the_engine
@every_model
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    """Bit by bit."""
    tokens = tokens_of(name)
    texts = [tokens[:8], tokens[8:16], tokens[16:]]
    runs = []
    for threads in (1, 2, 3):
        engine = start(packed(name, Precision.of("int8")), threads)
        prompt = engine.logits(engine.sequence(COUNT), tokens)
        runs.append((stepped(engine, tokens), prompt, batched(engine, texts)))
    for run, other in pairwise(runs):
        for ours, theirs in zip(run, other, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@needs_the_engine
@every_model
def test_texts_side_by_side_equal_each_alone(name: str) -> None:
    engine = start(packed(name), 2)
    texts = [tokens_of(name)[i : i + 12] for i in range(11)]
    alone = np.concatenate([stepped(engine, text) for text in texts])
    assert_twins(np.concatenate(list(batched(engine, texts))), alone)


@needs_the_engine
def test_units_are_counted() -> None:
    tokens = tokens_of("precision by layer, one branch")
    counts = {}
    for name in (
        "precision by layer, one branch",
        "selector by layer",
        "sparse by layer",
        "dense",
        "mixture of two",
    ):
        engine = start(packed(name), 2)
        stepped(engine, tokens[:3])
        engine.logits(engine.sequence(8), tokens[:8])
        counts[name] = engine.counts()
        assert engine.counts() == [(0, 0), (0, 0)]
    assert counts == {
        "precision by layer, one branch": [(0, 11), (11 * 100, 11)],
        "selector by layer": [(11 * 126, 11), (11 * 36, 11)],
        "sparse by layer": [(11 * 160, 11), (11 * 24, 11)],
        "dense": [(11 * 100, 11)] * 2,
        "mixture of two": counts["mixture of two"],
    }


@needs_the_engine
def test_units_above_their_threshold_are_counted() -> None:
    """Where no unit, or every unit, is predicted to be positive."""
    name = "positive"
    tokens = tokens_of(name, 5)
    for threshold, wanted in ((1e30, 0), (-1e30, 150)):
        weights = weights_of(network(name))
        weights |= {key: np.full_like(held, threshold) for key, held in weights.items() if "threshold" in key}
        model = pack(spec_of(name), weights, EXACT)
        engine = start(model, 2)
        assert_twins(stepped(engine, tokens), Reference(model).logits(tokens))
        assert engine.counts() == [(5 * wanted, 5)] * 2


# -- what does not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("base.up.codes", lambda held: held[:, :-1], "expected \\(160, 64\\)"),
        ("base.up.codes", lambda held: held.astype(np.float32), "is float32"),
        ("base.down.scale", lambda held: np.where(held > 0, np.nan, held), "NaN"),
        ("base.down.zero", lambda held: None, "is missing"),
        ("residual.down.codes", lambda held: held[:8], "expected"),
    ],
)
def test_codes_that_do_not_fit(part: str, change, message: str) -> None:
    weights = weights_of(network("precision"))
    name = f"model.layers.1.feed_forward.{part}"
    changed = change(weights.pop(name))
    if changed is not None:
        weights[name] = changed
    with pytest.raises(Failure, match=message):
        pack(spec_of("precision"), weights, EXACT)


def test_codes_of_too_many_bits() -> None:
    weights = weights_of(network("precision, three bits"))
    weights["model.layers.0.feed_forward.base.up.codes"][0, 0] = 0x80
    with pytest.raises(Failure, match="more than 3 bits"):
        pack(spec_of("precision, three bits"), weights, EXACT)
    network.cache_clear()  # the tensor was the model's own
