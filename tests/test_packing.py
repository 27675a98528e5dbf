"""Packed models and their files: written and read back, and every way in which they can be damaged or not fit."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import (
    assert_close,
    expected,
    network,
    packed,
    some_tokens,
    spec_of,
    start,
    stepped,
    weights_of,
)

from sparsecli.bench.random_weights import Pools, packed_elements, packed_model
from sparsecli.console import Failure
from sparsecli.decode.native import binding
from sparsecli.decode.packed import tensor_file
from sparsecli.decode.packed.file import LAYOUT_VERSION, open_packed, save
from sparsecli.decode.packed.folder import read_weights
from sparsecli.decode.packed.pack import PackedModel, huge_pages, pack
from sparsecli.decode.packed.precision import Precision, plan
from sparsecli.decode.packed.tensor_file import TensorFile
from sparsecli.decode.reference.step import Reference
from sparsecli.model.quantization import from_bfloat16

needs_the_engine = pytest.mark.skipif(
    binding.available() is not None, reason=f"native engine: {binding.available()}"
)
INT8 = Precision.of("int8", head_rescoring=True)


def assert_same(one: PackedModel, other: PackedModel) -> None:
    assert (one.spec, one.precision) == (other.spec, other.precision)
    assert list(one.tensors) == list(other.tensors)
    for name, tensor in one.tensors.items():
        assert tensor.dtype == other.tensors[name].dtype
        np.testing.assert_array_equal(tensor, other.tensors[name], err_msg=name)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A packed file."""
    path = tmp_path / "model.spk"
    save(packed("sparse", INT8), path)
    return path


# -- precision -----------------------------------------------------------------------------------------------


def test_a_word_sets_the_type_of_every_part() -> None:
    assert set(vars(Precision.of("bfloat16")).values()) == {"bfloat16", False}
    int8 = Precision.of("int8", cache="int8")
    assert (int8.units, int8.controller, int8.multiplicative, int8.head) == ("int8",) * 4
    assert (int8.convolution, int8.embedding, int8.cache) == ("bfloat16", "bfloat16", "int8")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Precision.of("float64"), "'float64' is not one of float32, bfloat16, int8, int4"),
        (lambda: Precision.of("int8", controller="int4"), "controller: 'int4' is not one of"),
        (lambda: Precision.of("int8", convolution="int8"), "convolution: int8"),
        (lambda: Precision.of("float32", head_rescoring=True), "head_rescoring: needs an int8 or int4 head"),
    ],
)
def test_types_that_are_not_computed_with(make: Callable[[], Precision], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- packing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [Precision.of("float32"), Precision.of("bfloat16"), INT8], ids=str)
def test_packed_tensors_lie_on_cache_lines_and_add_up(precision: Precision) -> None:
    model = packed("mixture of two", precision)
    assert all(tensor.ctypes.data % 64 == 0 for tensor in model.tensors.values())
    assert model.nbytes == sum(tensor.nbytes for tensor in model.tensors.values())
    assert all(np.isfinite(tensor).all() for tensor in model.tensors.values() if tensor.dtype == np.float32)


def test_fewer_bits_take_less_memory() -> None:
    sizes = [packed("wide modules", Precision.of(kind)).nbytes for kind in ("float32", "bfloat16", "int8")]
    assert sizes[0] > 1.9 * sizes[1]
    assert sizes[1] > 1.1 * sizes[2]  # convolutions and tables stay as they are


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["head.weight", "model.layers.1.feed_forward.down", "model.norm.bias"])
def test_weights_that_are_no_numbers(name: str, poison: float) -> None:
    weights = weights_of(network("sparse"))
    damaged = weights[name].copy()
    damaged.flat[7] = poison
    with pytest.raises(Failure, match=rf"tensor {name} holds a NaN or an infinity"):
        pack(spec_of("sparse"), weights | {name: damaged}, Precision.of("bfloat16"))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_quantized_scales_that_are_not_numbers(poison: float) -> None:
    weights = weights_of(network("low rank, quantized"))
    scales = sorted(name for name in weights if name.endswith(".scale"))
    assert scales
    for name in scales:
        damaged = weights[name].copy()
        damaged.flat[3] = poison
        with pytest.raises(Failure, match=rf"tensor {name} holds a NaN or an infinity; the checkpoint is d"):
            pack(spec_of("low rank, quantized"), weights | {name: damaged}, Precision.of("bfloat16"))


def test_missing_weights() -> None:
    weights = weights_of(network("sparse"))
    for name in sorted(weights):
        rest = {other: tensor for other, tensor in weights.items() if other != name}
        if name.endswith("projection.shared.bias"):
            continue  # optional: not every model has one
        with pytest.raises(Failure, match=f"tensor {name} is missing"):
            pack(spec_of("sparse"), rest, Precision.of("float32"))


def test_weights_of_another_shape() -> None:
    weights = weights_of(network("sparse"))
    for name, tensor in weights.items():
        longer = np.concatenate([tensor, tensor[:1]])
        with pytest.raises(Failure, match=f"tensor {name} is"):
            pack(spec_of("sparse"), weights | {name: longer}, Precision.of("float32"))


def test_bfloat16_weights_are_taken_as_they_are() -> None:
    weights = weights_of(network("sparse"))
    narrow = {
        name: torch.from_numpy(tensor).bfloat16().view(torch.uint16).numpy()
        for name, tensor in weights.items()
    }
    wide = {name: torch.from_numpy(tensor).bfloat16().float().numpy() for name, tensor in weights.items()}
    for precision in (Precision.of("float32"), Precision.of("bfloat16"), INT8):
        assert_same(pack(spec_of("sparse"), narrow, precision), pack(spec_of("sparse"), wide, precision))


@pytest.mark.parametrize("name", ["sparse", "dense, gated, grouped queries", "mixture of one"])
@pytest.mark.parametrize("precision", [Precision.of("float32"), INT8], ids=["float32", "int8"])
def test_random_models_have_the_same_tensors_and_run(name: str, precision: Precision) -> None:
    spec = spec_of(name)
    made = packed_model(spec, precision, Pools.of(packed_elements(spec, precision)))
    wanted = packed(name, precision)
    for key, tensor in wanted.tensors.items():
        assert (made.tensors[key].dtype, made.tensors[key].size) == (tensor.dtype, tensor.size)
    assert np.isfinite(Reference(made).logits([1, 2, 3])).all()
    if binding.available() is None:
        assert np.isfinite(stepped(start(made), [1, 2, 3])).all()


def test_too_little_memory_for_the_weights(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    with pytest.raises(Failure, match=r"1125899.9 GB of memory are needed"):
        huge_pages(1 << 50)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10_000}))
    with pytest.raises(Failure, match="GB of memory are needed for the weights"):
        open_packed(saved)
    with pytest.raises(Failure, match="GB of memory are needed for the weights"):
        pack(spec_of("sparse"), weights_of(network("sparse")), INT8)


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sparse", "sparse, odd widths", "dense", "multiplicative head"])
def test_a_file_holds_the_model(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.spk"
    save(packed(name, Precision.of("int8")), path)
    read = open_packed(path)
    assert_same(read, packed(name, Precision.of("int8")))
    assert all(tensor.ctypes.data % 64 == 0 for tensor in read.tensors.values())
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_plain_safetensors(saved: Path) -> None:
    model = packed("sparse", INT8)
    with safe_open(saved, framework="numpy") as file:
        assert set(file.keys()) == set(model.tensors)
        assert file.metadata()["sparsecli_layout"] == str(LAYOUT_VERSION)
        units = file.get_tensor("blocks.0.units")
    np.testing.assert_array_equal(units, model.tensors["blocks.0.units"])


@needs_the_engine
@pytest.mark.parametrize(
    "precision", [Precision.of("float32"), Precision.of("int8")], ids=["float32", "int8"]
)
@pytest.mark.parametrize("name", ["sparse", "mixture of two", "mixtral", "dense"])
def test_units_may_stay_in_the_file(name: str, precision: Precision, tmp_path: Path) -> None:
    path = tmp_path / "model.spk"
    save(packed(name, precision), path)
    read = open_packed(path, from_disk=True)
    assert read.from_disk == (name != "dense")
    tokens = some_tokens(101, 20)
    engine, whole = start(read, 2), start(packed(name, precision), 2)
    np.testing.assert_array_equal(stepped(engine, tokens), stepped(whole, tokens))
    np.testing.assert_array_equal(
        engine.logits(engine.sequence(20), tokens), whole.logits(whole.sequence(20), tokens)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_safetensors_of_every_float_type_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    wanted = torch.linspace(-3, 3, 24).reshape(4, 6).to(dtype)
    save_file({"weight": wanted}, tmp_path / "model.safetensors")
    read = read_weights(tmp_path)["weight"]
    assert read.shape == (4, 6)
    np.testing.assert_array_equal(from_bfloat16(read), wanted.float().numpy())


def test_integers_are_not_weights(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3, dtype=torch.int64)}, tmp_path / "model.safetensors")
    with pytest.raises(Failure, match="weight is I64; expected float32, bfloat16 or float16"):
        read_weights(tmp_path)["weight"]


@needs_the_engine
def test_what_transformers_saves_is_packed(tmp_path: Path) -> None:
    """In several files, too."""
    for size in ("10GB", "40KB"):
        folder = tmp_path / size
        network("sparse").save_pretrained(folder, max_shard_size=size)
        model = pack(spec_of("sparse"), read_weights(folder), Precision.of("float32"))
        assert_close(stepped(start(model), some_tokens(101, 24)), expected("sparse", 24))
    assert len(list(folder.glob("*.safetensors"))) > 2


# -- damage --------------------------------------------------------------------------------------------------


def damaged(path: Path, change: Callable[[bytearray], bytearray]) -> Path:
    """A copy of a file with other bytes."""
    copy = path.with_name("damaged.spk")
    copy.write_bytes(change(bytearray(path.read_bytes())))
    return copy


def header_length(path: Path) -> int:
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def cuts(path: Path) -> Iterator[int]:
    size, header = path.stat().st_size, header_length(path)
    yield from (
        0,
        1,
        7,
        8,
        9,
        100,
        header // 2,
        header - 1,
        header,
        header + 1,
        size // 2,
        size - 64,
        size - 1,
    )


def test_a_file_cut_short_anywhere(saved: Path) -> None:
    for length in cuts(saved):
        cut = damaged(saved, lambda content, length=length: content[:length])
        for from_disk in (False, True):
            with pytest.raises(Failure, match=r"damaged.spk: cut short") as raised:
                open_packed(cut, from_disk)
            assert "\n" not in raised.value.message


def test_a_file_with_something_behind_its_end(saved: Path) -> None:
    longer = damaged(saved, lambda content: content + b"more")
    with pytest.raises(Failure, match="4 bytes too many"):
        open_packed(longer)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model.spk"
    save(packed("sparse, odd widths", Precision.of("int8")), path)
    return path


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.data())
def test_a_flipped_byte_anywhere(small_file: Path, data: st.DataObject) -> None:
    """One clear error, or nothing but the fill between header and tensors was hit, and the model is the same."""
    size, header = small_file.stat().st_size, header_length(small_file)
    place = data.draw(st.integers(0, header - 1) | st.integers(0, size - 1) | st.integers(0, 16))
    mask = data.draw(st.integers(1, 255))

    def flip(content: bytearray) -> bytearray:
        content[place] ^= mask
        return content

    copy = damaged(small_file, flip)
    try:
        read = open_packed(copy)
    except Failure as failure:
        message = failure.message
    else:
        assert_same(read, packed("sparse, odd widths", Precision.of("int8")))
        return
    assert message.startswith(f"{copy}: ")
    assert "\n" not in message


def test_a_damaged_file_of_a_quantized_model(tmp_path: Path) -> None:
    saved = tmp_path / "model.spk"
    model = packed("low rank, quantized", Precision.of("int8"))
    save(model, saved)
    assert_same(open_packed(saved), model)
    header = header_length(saved)

    def refused(change: Callable[[bytearray], bytearray]) -> None:
        with pytest.raises(Failure, match=r"damaged.spk: .*damaged") as raised:
            open_packed(damaged(saved, change))
        assert "\n" not in raised.value.message

    def flip(content: bytearray, place: int) -> bytearray:
        content[place] ^= 0x10
        return content

    description = json.loads(saved.read_bytes()[8:header])
    spans = [entry["data_offsets"] for entry in description.values() if "data_offsets" in entry]
    assert len(spans) > 10
    for begin, end in spans:  # a byte of every tensor: codes, scales, zeros
        refused(partial(flip, place=header + (begin + end) // 2))
    refused(lambda content: content.replace(b'"projection\\":4', b'"projection\\":3', 1))
    with pytest.raises(Failure, match=r"damaged.spk: cut short"):
        open_packed(damaged(saved, lambda content: content[:-100]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"rank\\":5', b'"rank\\":6'),
        (b"10000.0", b"10008.0"),
        (b"relu", b"gelu"),
        (b'"controller\\":\\"int8', b'"controller\\":\\"intx'),
        (b'"blocks.0.units"', b'"blocks.0.unitz"'),
        (b'"I8"', b'"F8"'),
        (b"data_offsets", b"data_offset5"),
        (b'"crc32"', b'"crc31"'),
    ],
)
def test_a_header_that_was_edited(small_file: Path, old: bytes, new: bytes) -> None:
    """An architecture that runs, but is another one, would write wrong text."""

    def edit(content: bytearray) -> bytearray:
        assert old in content
        return content.replace(old, new, 1)

    with pytest.raises(Failure, match=r"damaged.spk: cut short or damaged"):
        open_packed(damaged(small_file, edit))


def write_header(path: Path, header: object, tensors: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)
    return path


@pytest.mark.parametrize(
    "header",
    [
        [],
        "text",
        {"x": 3},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}},
        {"x": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4 * 10**30]}},
        {"x": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}},
        {"__metadata__": []},
        {"__metadata__": "text"},
    ],
    ids=json.dumps,
)
def test_headers_that_make_no_sense(header: object, tmp_path: Path) -> None:
    path = write_header(tmp_path / "wrong.spk", header, bytes(64))
    with pytest.raises(Failure, match=r"wrong.spk: cut short"):
        open_packed(path)


def test_a_damaged_checkpoint_of_another_program(tmp_path: Path) -> None:
    """Without checksums a file that is cut short is still noticed."""
    save_file({"weight": torch.zeros(100)}, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for length in (0, 5, 20, len(content) - 1):
        (tmp_path / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(Failure, match=r"model.safetensors: cut short"):
            read_weights(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "not a packed model; this sparsecli reads version 2"),
        ({"sparsecli_layout": "0"}, "layout version 0; this sparsecli reads version 2: pack the model again"),
        ({"sparsecli_layout": "3"}, "layout version 3; this sparsecli reads version 2: pack the model again"),
        ({"sparsecli_layout": "2"}, "its description is damaged"),
        ({"sparsecli_layout": "2", "spec": "{}", "precision": "{}"}, "its description is damaged"),
        (
            {
                "sparsecli_layout": "2",
                "spec": spec_of("sparse").model_dump_json(),
                "precision": json.dumps(vars(INT8) | {"units": "int3"}),
            },
            "its description is damaged",
        ),
        (
            {
                "sparsecli_layout": "2",
                "spec": spec_of("sparse").model_dump_json(),
                "precision": json.dumps([1]),
            },
            "its description is damaged",
        ),
    ],
)
def test_files_of_another_kind_or_version(metadata: dict[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.spk"
    tensor_file.write(path, {"x": np.zeros(16, np.float32)}, metadata)
    with pytest.raises(Failure, match=f"other.spk: {message}"):
        open_packed(path)


def test_a_file_that_another_program_wrote_with_other_types(tmp_path: Path) -> None:
    facts = {"sparsecli_layout": "2", "spec": spec_of("sparse").model_dump_json()}
    facts["precision"] = json.dumps(vars(INT8))
    tensor = {"dtype": "F16", "shape": [32], "data_offsets": [0, 64]}
    path = write_header(tmp_path / "other.spk", {"__metadata__": facts, "x": tensor}, bytes(64))
    with pytest.raises(Failure, match=r"other.spk"):
        open_packed(path)


@needs_the_engine
@pytest.mark.parametrize("change", ["missing", "of another precision"])
def test_tensors_that_are_not_those_of_the_description(change: str, tmp_path: Path) -> None:
    """Intact files of another program: the engine refuses them."""
    model = packed("sparse", INT8)
    tensors = dict(model.tensors)
    if change == "missing":
        del tensors["blocks.1.controller.first"]
    else:
        model = replace(model, precision=Precision.of("bfloat16"))
    save(replace(model, tensors=tensors), tmp_path / "model.spk")
    with pytest.raises((ValueError, Failure), match=r"controller.first|head.exact|embedding"):
        start(open_packed(tmp_path / "model.spk"))


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["missing", "a folder"])
def test_a_path_that_is_no_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "model.spk"
    make(path)
    with pytest.raises(Failure, match=r"model.spk: cannot be read"):
        open_packed(path)


# -- writing -------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "model.spk"
    save(packed("sparse", INT8), path)
    before = path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        for target in (path, tmp_path / "new.spk"):
            with pytest.raises(Failure, match=rf"{target.name}: cannot be written"):
                save(packed("sparse", INT8), target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


@pytest.mark.parametrize("place", ["nowhere/model.spk", "file/model.spk"])
def test_places_that_cannot_be_written_to(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Failure, match=r"model.spk: cannot be written"):
        save(packed("sparse", INT8), tmp_path / place)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tensor_file.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(packed("sparse", INT8), tmp_path / "model.spk")
    assert list(tmp_path.iterdir()) == []


def test_every_planned_tensor_is_packed() -> None:
    for name in ("sparse", "dense", "sparse, gated", "multiplicative head"):
        planned = plan(spec_of(name), INT8 if name == "sparse" else Precision.of("int8"))
        assert {slot.key for slot, _ in planned if not slot.optional} <= packed(name, INT8).tensors.keys()


def test_a_file_can_be_read_tensor_by_tensor(saved: Path) -> None:
    with TensorFile(saved) as file:
        read = file.read("blocks.0.units")
    np.testing.assert_array_equal(read, packed("sparse", INT8).tensors["blocks.0.units"])


@needs_the_engine
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_positions", 2**54),
        ("max_positions", 2**31),
        ("d_model", 2**40),
        ("layers", 2**17),
        ("heads", 2**17),
    ],
)
def test_sizes_that_would_wrap_in_64_bits_are_refused(field: str, value: int) -> None:
    """A crafted description: the product of such a size and another is zero in 64 bits."""
    model = packed("sparse")
    crafted = replace(model, spec=model.spec.model_copy(update={field: value}))
    with pytest.raises((Failure, ValueError)) as caught:
        start(crafted)
    assert "\n" not in str(caught.value)


@needs_the_engine
def test_a_tensor_shorter_than_its_plan_is_refused() -> None:
    model = packed("sparse")
    name = "positions" if "positions" in model.tensors else "embedding"
    crafted = replace(model, tensors={**model.tensors, name: model.tensors[name][:-64]})
    with pytest.raises(ValueError, match=f"{name}: has .* elements, expected"):
        start(crafted)
