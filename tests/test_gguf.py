"""GGUF's own weight types: their values, their panels, and models that keep them through import, packing and engine."""

from __future__ import annotations

import struct
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_models import MODELS
from safetensors.torch import load_file
from test_interchange import LLAMA, build, needs_gguf, prompt, save, write_gguf
from transformers import AutoModelForCausalLM

from sparsecli import pack
from sparsecli.console import Failure
from sparsecli.decode.engine import Engine
from sparsecli.decode.native import binding
from sparsecli.decode.native import gguf as native_gguf
from sparsecli.decode.packed.folder import pack_folder
from sparsecli.decode.packed.pack import pack as pack_weights
from sparsecli.decode.packed.precision import Precision
from sparsecli.decode.reference.step import Reference
from sparsecli.generate.decoder import DecoderOptions
from sparsecli.generate.native_decoder import NativeDecoder
from sparsecli.interchange import importing
from sparsecli.interchange.gguf_reader import GgufReader
from sparsecli.interchange.sources import open_source
from sparsecli.interchange.stored_weights import stored_weights
from sparsecli.model.files import read_description
from sparsecli.model.gguf_types import TYPES, GgufType, arrange, restore, values
from sparsecli.model.loading import load_model

every_type = pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
needs_engine = pytest.mark.skipif(binding.available() is not None, reason="no native engine")


def random_rows(kind: GgufType, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Random codes with finite float16 scales: (rows, bytes of a row)."""
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (rows, cols // kind.block, kind.block_bytes), dtype=np.uint8)
    halves = generator.normal(0, 0.01, (*raw.shape[:2], 2)).astype(np.float16).view(np.uint8)
    place = raw[..., kind.halves]
    place[:] = halves[..., : place.shape[-1]]
    return raw.reshape(rows, -1)


@needs_gguf
@every_type
@pytest.mark.parametrize(("rows", "cols"), [(16, 256), (33, 1024), (7, 96)])
def test_values_are_those_of_the_package(kind: GgufType, rows: int, cols: int) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    if cols % kind.block:
        pytest.skip("rows of this type are whole blocks")
    theirs = GGMLQuantizationType[kind.name]
    assert (theirs.value, GGML_QUANT_SIZES[theirs]) == (kind.number, (kind.block, kind.block_bytes))
    raw = random_rows(kind, rows, cols)
    panels = arrange(kind, raw, cols)
    assert panels.shape == kind.panel_shape(rows, cols)
    np.testing.assert_array_equal(values(kind, panels, rows, cols), dequantize(raw, theirs))
    np.testing.assert_array_equal(restore(kind, panels, rows, cols), raw)
    if cols % kind.columns == 0 and rows % 16 == 0:
        assert panels.nbytes <= 1.03 * raw.nbytes


@needs_engine
@every_type
def test_the_library_arranges_as_its_twin(kind: GgufType) -> None:
    for rows, cols in ((40, 512), (33, 1024), (1, 256)):
        raw = random_rows(kind, rows, cols, seed=rows)
        np.testing.assert_array_equal(native_gguf.arrange(kind, raw, cols), arrange(kind, raw, cols))


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference, over that of what is expected."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


@needs_gguf
@pytest.mark.parametrize(
    ("name", "tied"), [*((name, False) for name in TYPES), ("Q4_0", True), ("Q3_K", True), ("IQ4_XS", True)]
)
def test_a_model_keeps_the_codes_of_its_file(name: str, tied: bool, tmp_path: Path) -> None:
    """Imported as it is, it computes in PyTorch what its dequantized weights do, and nearly so in the engine."""
    sizes = (
        {"hidden_size": 256, "intermediate_size": 256} if TYPES[name].nested else {"intermediate_size": 64}
    )
    original = build("llama", **LLAMA | sizes | {"tie_word_embeddings": tied})
    write_gguf(original, save(original, tmp_path / "theirs"), tmp_path / "model.gguf", quantized=name)
    for dtype in ("auto", "float32"):
        importing.run(source=str(tmp_path / "model.gguf"), output=tmp_path / dtype, dtype=dtype)
    description = read_description(tmp_path / "auto")
    kinds = description.spec.quantization.gguf
    assert set(kinds.values()) == {name}
    assert len(kinds) == 7 * description.spec.layers + (1 if tied else 2)
    assert not read_description(tmp_path / "float32").spec.quantization.gguf
    kept, _ = load_model(tmp_path / "auto")
    plain, _ = load_model(tmp_path / "float32")
    with torch.no_grad():
        expected = plain(prompt()).logits
        torch.testing.assert_close(kept(prompt()).logits, expected, atol=1e-6, rtol=1e-6)
    ids = prompt()[0].tolist()
    packed = pack_folder(tmp_path / "auto", description.spec, Precision.of("float32"))
    twin = Reference(packed).logits(ids)
    # Activations are rounded to bytes, and random layers amplify that, wide ones more.
    assert distance(twin, expected[0].numpy()) < (0.2 if TYPES[name].nested else 0.06)
    if binding.available() is None:
        engine = Engine(packed, 2)
        found = engine.logits(engine.sequence(len(ids)), ids)
        assert distance(found, twin) < 0.02  # a byte more or less where one is nearly between two
        sequence = engine.sequence(len(ids))
        np.testing.assert_array_equal([engine.step(sequence, token) for token in ids], found)


@needs_gguf
@pytest.mark.parametrize("quantized", ["", "Q4_1"])
def test_weights_without_a_folder(quantized: str, tmp_path: Path) -> None:
    """What the engine packs of a file itself is what it packs of the imported folder."""
    original = build("llama", **LLAMA | {"intermediate_size": 64})
    file = tmp_path / "model.gguf"
    write_gguf(original, save(original, tmp_path / "theirs"), file, quantized=quantized or ())
    opened = open_source(str(file))
    weights = importing.GgufWeights(opened)
    importing.write_model(opened, tmp_path / "ours")
    assert weights.spec == read_description(tmp_path / "ours").spec
    direct = pack_weights(weights.spec, weights, Precision.of("float32"))
    folder = pack_folder(tmp_path / "ours", weights.spec, Precision.of("float32"))
    assert direct.tensors.keys() == folder.tensors.keys()
    for name, tensor in direct.tensors.items():
        np.testing.assert_array_equal(tensor, folder.tensors[name])


@needs_gguf
def test_a_source_says_how_it_is_stored(tmp_path: Path) -> None:
    original = build("llama", **LLAMA | {"intermediate_size": 64})
    theirs = save(original.to(torch.bfloat16), tmp_path / "theirs")
    assert stored_weights(open_source(str(theirs))) == "bfloat16"
    write_gguf(original.float(), theirs, tmp_path / "model.gguf", quantized="Q4_1")
    assert stored_weights(open_source(str(tmp_path / "model.gguf"))) == "GGUF file: q4_1"
    importing.run(source=str(theirs), output=tmp_path / "ours")
    said = stored_weights(open_source(str(tmp_path / "ours")))
    assert said == f"bfloat16, imported from {theirs}"


@needs_gguf
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_float16_stays_float16(name: str, tmp_path: Path) -> None:
    """In the folder and in the engine, whose logits are those of the same weights in float32."""
    kind, fields = MODELS[name]
    original = build(kind, **fields, **({"n_inner": 64} if kind == "gpt2" else {}))
    for parameter in original.parameters():
        parameter.copy_(parameter.half())
    write_gguf(original, save(original, tmp_path / "theirs"), tmp_path / "model.gguf", quantized="F16")
    importing.run(source=str(tmp_path / "model.gguf"), output=tmp_path / "ours")
    description = read_description(tmp_path / "ours")
    assert description.dtype == "float16"
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.ndim == 2} == {torch.float16}
    assert {tensor.dtype for tensor in stored.values() if tensor.ndim == 1} == {torch.float32}
    expected = original(prompt()).logits[0].numpy()
    ids = prompt()[0].tolist()
    halves = pack_folder(tmp_path / "ours", description.spec, Precision.of("float16", cache="float32"))
    assert (
        halves.nbytes < 0.7 * pack_folder(tmp_path / "ours", description.spec, Precision.of("float32")).nbytes
    )
    np.testing.assert_allclose(Reference(halves).logits(ids), expected, atol=1e-4, rtol=1e-4)
    if binding.available() is None:
        engine = Engine(halves, 2)
        np.testing.assert_allclose(
            engine.logits(engine.sequence(len(ids)), ids), expected, atol=1e-4, rtol=1e-4
        )
        with closing(NativeDecoder(tmp_path / "ours", description, DecoderOptions())) as decoder:
            assert (decoder.dtype, decoder.cache_dtype) == ("float16", "bfloat16")
            assert distance(decoder.prefill(ids, len(ids)), expected[-1]) < 0.02


def header(tensors: int = 0, values: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


LIES = {
    "tensors": header(tensors=1 << 60),
    "values": header(values=1 << 60),
    "a key": header(values=1) + struct.pack("<Q", 1 << 62),
    "a list": header(values=1) + text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 61),
    "texts": header(values=1) + text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 61),
    "a text in a list": header(values=1) + text(b"a") + struct.pack("<IIQQ", 9, 8, 1, 1 << 62),
    "a shape": header(tensors=1) + entry(b"a", (1 << 32, 1 << 32)) + bytes(64),
    "axes": header(tensors=1) + text(b"a") + struct.pack("<I", 1 << 31),
    "an offset": header(tensors=1) + entry(b"a", (32,), offset=1 << 63) + bytes(64),
    "an empty axis": header(tensors=1) + entry(b"a", (0, 4)) + bytes(64),
    "a broken block": header(tensors=1) + entry(b"a", (33,), kind=2) + bytes(64),
    "two names": header(tensors=2) + entry(b"a", (1,)) + entry(b"a", (1,)) + bytes(64),
    "a text that is none": header(values=1) + text(b"\xff"),
    "an unknown type": header(values=1) + text(b"a") + struct.pack("<I", 77),
    "nothing": b"",
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
def test_a_file_that_lies_about_sizes(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(Failure, match=r"model\.gguf: "):
        GgufReader(path)
    assert time.monotonic() - started < 5  # it would take hours if it believed the file


def test_versions(tmp_path: Path) -> None:
    (tmp_path / "old.gguf").write_bytes(header(version=1))
    with pytest.raises(Failure, match="version 1; versions 2 and 3 in little-endian"):
        GgufReader(tmp_path / "old.gguf")


@needs_gguf
def test_a_bfloat16_network_around_codes(tmp_path: Path) -> None:
    """Norms and biases in bfloat16, activations too; the codes give any type."""
    original = build("qwen2", **LLAMA | {"intermediate_size": 64})
    write_gguf(original, save(original, tmp_path / "theirs"), tmp_path / "model.gguf", quantized="Q8_0")
    importing.run(source=str(tmp_path / "model.gguf"), output=tmp_path / "ours")
    exact, _ = load_model(tmp_path / "ours")
    coarse = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    ids = torch.tensor([[1, 5, 9, 2]])
    logits = coarse(ids).logits
    assert logits.dtype == torch.bfloat16
    expected = exact(ids).logits
    assert (logits.float() - expected).norm() < 0.03 * expected.norm()


@needs_gguf
@torch.no_grad()
def test_a_quantized_table_of_positions_is_dequantized(tmp_path: Path) -> None:
    kind, fields = MODELS["gpt2"]
    original = build(kind, **fields, n_inner=64)
    write_gguf(original, save(original, tmp_path / "theirs"), tmp_path / "model.gguf", quantized="Q8_0")
    importing.run(source=str(tmp_path / "model.gguf"), output=tmp_path / "ours")
    model, _ = load_model(tmp_path / "ours")
    assert "model.position_embedding" not in read_description(tmp_path / "ours").spec.quantization.gguf
    expected = original(prompt()).logits
    assert (model(prompt()).logits - expected).norm() < 0.04 * expected.norm()


@needs_gguf
@needs_engine
def test_another_type_does_not_change_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = build("llama", **LLAMA | {"intermediate_size": 64})
    write_gguf(original, save(original, tmp_path / "theirs"), tmp_path / "model.gguf", quantized="Q4_1")
    importing.run(source=str(tmp_path / "model.gguf"), output=tmp_path / "ours")
    description = read_description(tmp_path / "ours")
    with closing(NativeDecoder(tmp_path / "ours", description, DecoderOptions(dtype="int8"))) as decoder:
        assert (decoder.dtype, decoder.cache_dtype) == ("Q4_1", "bfloat16")
    assert "--dtype int8: the weights keep the codes of their GGUF file (Q4_1)" in capsys.readouterr().err
    with pytest.raises(Failure, match="keep the codes of their GGUF file"):
        pack.run(model=str(tmp_path / "ours"), output=tmp_path / "packed", dtype="int8")
    assert not (tmp_path / "packed").exists()
