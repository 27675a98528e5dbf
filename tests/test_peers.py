"""Other programs in the bench: which rows they bring, and, where they are installed, that each decodes."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from sparsecli.bench import peers, variants
from sparsecli.bench.peers import PEERS, PeerModel, llama_shape
from sparsecli.bench.peers.decode_step import FixedStep, GrowingStep
from sparsecli.bench.peers.llama_shape import llama_shaped
from sparsecli.bench.random_weights import empty_model
from sparsecli.bench.variants import Variant
from sparsecli.console import Failure
from sparsecli.model import DecodeCache
from sparsecli.model.sizes import count_parameters
from sparsecli.recipe.loader import load
from sparsecli.recipe.schema import BenchSpec
from sparsecli.spec.model import ModelSpec

DENSE = {"kind": "dense", "d_ff": 64}
SPARSE = {"kind": "sparse", "d_ff": 64, "block_size": 8, "rank": 4}
CONVOLVED = {"projection": "multiplicative_conv", "output_projection": "multiplicative_conv"}
MODEL = {
    "d_model": 64,
    "layers": 2,
    "heads": 4,
    "max_positions": 64,
    "feed_forward": DENSE,
    "vocabulary": {"kind": "dense", "size": 50},
}
LOSS = {"vocabulary": {"kind": "multiplicative", "size": 50, "modules": 2}}
PROMPT = [3, 14, 15, 9, 2]


def variant(name: str = "dense", group: str = "dense", **blocks: object) -> Variant:
    spec = ModelSpec.model_validate({**MODEL, **blocks})
    return Variant(name, group, spec, count_parameters(spec))


VARIANTS = [
    variant(),
    variant("ff", "sparse", feed_forward=SPARSE),
    variant("both", "sparse", feed_forward=SPARSE, attention=CONVOLVED),
    variant("loss", "sparse", feed_forward=SPARSE, **LOSS),
]
KINDS = {
    "dense": {},
    "sparse": {"feed_forward": SPARSE, "attention": CONVOLVED},
    "joined": {"attention": {"projection": "dense_conv", "value_concat": "whole"}},
    "rotary": {
        "positions": "rotary",
        "normalization": "rms",
        "attention": {"key_value_heads": 2, "bias": False},
        "feed_forward": {**DENSE, "gated": True, "activation": "silu", "bias": False},
    },
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every peer seems to be there, and to take every model."""

    class Willing:
        def refusal(self, spec: ModelSpec, dtype: str) -> str | None:
            return None

    monkeypatch.setattr(peers.Peer, "missing", lambda self: None)
    monkeypatch.setattr(peers.Peer, "load_module", lambda self: Willing())


def weights_of(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights, large enough that tokens differ."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.empty(parameter.shape).normal_(0, 0.3, generator=generator).to(dtype)
        for name, parameter in empty_model(spec).named_parameters()
    }


def greedy(spec: ModelSpec, weights: dict[str, torch.Tensor], start: int, count: int) -> list[int]:
    """Tokens that the model itself goes on with after the prompt and `start`."""
    model = empty_model(spec)
    model.load_state_dict(weights, strict=False, assign=True)
    model.eval()
    cache, tokens, found = DecodeCache(spec.layers, 64), [*PROMPT, start], []
    with torch.inference_mode():
        for _ in range(count):
            logits = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits
            tokens = [int(logits[0, -1].argmax())]
            found += tokens
    return found


# -- choosing rows -------------------------------------------------------------------------------------------


def test_the_recipe_knows_the_same_peers() -> None:
    schema = BenchSpec.model_json_schema()["properties"]["peers"]
    assert schema["items"]["enum"] == list(PEERS)
    assert schema["default"] == []


def test_variants_for_peers_have_to_exist() -> None:
    variant = {"name": "dense", "group": "dense"}
    assert BenchSpec.model_validate({"variants": [variant], "peer_variants": ["dense"]}).peer_variants
    with pytest.raises(ValidationError, match="'sparse' is not one of dense"):
        BenchSpec.model_validate({"variants": [variant], "peer_variants": ["sparse"]})


@pytest.mark.parametrize("name", [name for name in PEERS if PEERS[name].extra])
def test_a_peer_that_is_not_installed_is_one_line_that_names_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda package: None)
    assert peers.choose([name, name], VARIANTS, ["float32", "int8"]) == []
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("is not measured") == 1
    assert (
        f"{name} is not measured: it is not installed; pip install 'sparsecli[{PEERS[name].extra}]'" in told
    )


def test_without_a_compiler_torch_compile_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert peers.choose(["torch.compile"], VARIANTS, ["float32"]) == []
    assert "needs a C++ compiler" in " ".join(capsys.readouterr().err.split())


def test_every_extra_is_declared() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    for peer in PEERS.values():
        assert peer.extra is None or f"{peer.extra} = [" in text


@pytest.mark.usefixtures("installed")
def test_each_peer_brings_its_rows_beside_ours() -> None:
    rows = peers.choose(list(PEERS), VARIANTS, ["float32", "bfloat16", "int8", "int4"])
    brought = {name: [(r.variant.name, r.dtype) for r in rows if r.peer.name == name] for name in PEERS}
    own = "dense, Llama-shaped"
    assert brought["llama.cpp"] == [(own, "float32"), (own, "bfloat16"), (own, "q8_0"), (own, "q4_0")]
    assert brought["ctranslate2"] == [(own, "float32"), (own, "bfloat16"), (own, "int8")]
    same = [("dense", "float32"), ("both", "float32"), ("dense", "bfloat16"), ("both", "bfloat16")]
    assert brought["openvino"] == brought["torch.compile"] == same
    assert {r.our_dtype for r in rows if r.dtype in ("q8_0", "q4_0")} == {"int8"}


@pytest.mark.usefixtures("installed")
def test_named_variants_are_run_in_place_of_the_default_ones() -> None:
    rows = peers.choose(["openvino"], VARIANTS, ["float32"], ["ff", "loss"])
    assert [row.variant.name for row in rows] == ["ff", "loss"]
    assert [row.variant.name for row in peers.choose(["openvino"], VARIANTS[3:], ["float32"])] == ["loss"]


@pytest.mark.usefixtures("installed")
def test_models_built_in_part_have_no_peers(capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.choose(["openvino"], [replace(VARIANTS[0], measured_layers=1)], ["float32"]) == []
    assert "peers run whole models" in " ".join(capsys.readouterr().err.split())


def test_what_a_peer_refuses_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Unwilling:
        def refusal(self, spec: ModelSpec, dtype: str) -> str | None:
            return "no such kernel" if dtype == "float32" else None

    monkeypatch.setattr(peers.Peer, "missing", lambda self: None)
    monkeypatch.setattr(peers.Peer, "load_module", lambda self: Unwilling())
    rows = peers.choose(["openvino"], VARIANTS, ["float32", "bfloat16"])
    assert {row.dtype for row in rows} == {"bfloat16"}
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("openvino in float32 is not measured: no such kernel") == 1


@pytest.mark.usefixtures("installed")
def test_there_is_nothing_like_two_streams_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    spec = VARIANTS[0].spec.model_copy(update={"residual": "reversible"})
    assert peers.choose(["openvino"], [replace(VARIANTS[0], spec=spec)], ["float32"]) == []
    assert "peers run decoders of one stream" in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("installed")
def test_bytes_of_a_peer_are_those_of_its_own_types() -> None:
    rows = {row.dtype: row for row in peers.choose(["llama.cpp"], VARIANTS, ["float32", "int8"])}
    sizes = rows["float32"].variant.sizes
    cached = 2 * 10 * sizes.cached_per_position  # llama.cpp's cache is float16 whatever the weights are
    assert rows["float32"].bytes_per_token(10) == 4 * sizes.active + cached
    assert rows["q8_0"].bytes_per_token(10) == sizes.active * 34 // 32 + cached
    assert rows["q4_0"].bytes_per_token(0) == sizes.active * 18 // 32
    assert rows["q8_0"].bytes_per_token(0, prefill=17) == round(sizes.active / 16)
    [dense, sparse] = peers.choose(["openvino"], VARIANTS, ["bfloat16"])
    assert sparse.bytes_per_token(10) == VARIANTS[2].sizes.bytes_per_token("bfloat16", 10)
    assert dense.needed_bytes(0) == 2 * VARIANTS[0].sizes.total


# -- models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bench-800m", "bench-17b"])
def test_the_llama_shaped_model_is_as_large_as_ours(name: str) -> None:
    recipe = load(name).recipe
    ours = variants.from_recipe(recipe.model, recipe.bench)[0]
    spec = llama_shaped(ours.spec, ours.sizes.total)
    assert count_parameters(spec).total == pytest.approx(ours.sizes.total, rel=0.01)
    for field in ("d_model", "layers", "heads"):
        assert getattr(spec, field) == getattr(ours.spec, field)
    assert spec.vocabulary.size == ours.spec.vocabulary.size
    assert spec.feed_forward.d_ff % llama_shape.D_FF_STEP == 0


def test_matrices_and_norms_are_all_of_the_llama_shaped_model() -> None:
    spec = llama_shaped(VARIANTS[0].spec, VARIANTS[0].sizes.total)
    elements = sum(rows * width for rows, width in llama_shape.matrices(spec).values())
    assert elements + (2 * spec.layers + 1) * spec.d_model == count_parameters(spec).total


def test_repeated_values_start_at_different_places() -> None:
    tile = np.arange(10)
    found = dict(llama_shape.repeated(tile, {"a": 10, "b": 25, "c": 10}))
    assert found["b"].tolist() == [(1 + index) % 10 for index in range(25)]
    assert found["a"].tolist() != found["c"].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["fixed", "growing"])
def test_a_step_with_explicit_caches_decodes_as_the_model_does(kind: str, layout: str) -> None:
    spec = ModelSpec.model_validate({**MODEL, **KINDS[kind]})
    weights = weights_of(spec)
    step = FixedStep(spec, weights) if layout == "fixed" else GrowingStep(spec, weights)
    caches = step.new_caches(32 if layout == "fixed" else 0)
    following, found = PROMPT[0], []
    with torch.inference_mode():
        for position in range(len(PROMPT) + 12):
            token = [*PROMPT, 7][position] if position <= len(PROMPT) else following
            result, *caches = step(torch.tensor([[token]]), torch.tensor([position]), *caches)
            following = int(result)
            found.append(following)
    assert found[len(PROMPT) :] == greedy(spec, weights, 7, 12)


# -- the programs themselves ---------------------------------------------------------------------------------


def row(name: str, dtype: str, beside: Variant) -> PeerModel:
    """The row of a peer in this type; the test is skipped where the peer is not there or refuses."""
    lack = PEERS[name].missing()
    if lack:
        pytest.skip(lack)
    ours = {"q8_0": "int8", "q4_0": "int8"}.get(dtype, dtype)
    rows = [r for r in peers.choose([name], [beside], [ours], [beside.name]) if r.dtype == dtype]
    if not rows:
        pytest.skip(f"{name} has no {dtype} here")
    return rows[0]


@pytest.fixture
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go; empty again after the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in ("llama.cpp", "ctranslate2") for dtype in sorted(PEERS[name].cache_bytes)],
)
def test_a_peer_with_its_own_model_decodes(name: str, dtype: str, temporary_files: Path) -> None:
    chosen = row(name, dtype, VARIANTS[0])
    decoder = chosen.load({}, 40, 1)
    assert list(temporary_files.iterdir()) == []
    decoder.prefill(PROMPT)
    assert decodes_the_same_after_rewinding(decoder)
    assert "threads" in decoder.settings
    if chosen.peer.reads_prompts:
        decoder.rewind()
        token, _ = decoder.step(7)
        reader = decoder.reader(len(PROMPT))
        reader.prefill(PROMPT)
        reader.prefill(PROMPT)  # anew
        assert reader.step(7) == (token, None)
        assert "threads" in reader.settings


@pytest.mark.parametrize(
    ("name", "kind"),
    [("openvino", "dense"), ("openvino", "sparse")],
)
def test_a_peer_decodes_as_our_model_does(name: str, kind: str) -> None:
    beside = variant(**KINDS[kind])
    weights = weights_of(beside.spec)
    decoder = row(name, "float32", beside).load(weights, 40, 1)
    assert_decodes(decoder, greedy(beside.spec, weights, 7, 8))


@pytest.mark.slow
def test_compiled_models_decode_as_ours_and_do_not_undo_one_another() -> None:
    """One test of torch.compile, because compiling takes half a minute."""
    beside = variant(**KINDS["sparse"])
    weights = weights_of(beside.spec)
    chosen = row("torch.compile", "float32", beside)
    torch._dynamo.utils.counters.clear()
    decoders = [chosen.load(weights, 40, 1) for _ in range(2)]
    expected = greedy(beside.spec, weights, 7, 8)
    for decoder in decoders * 2:
        assert_decodes(decoder, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def assert_decodes(decoder: peers.PeerDecoder, expected: list[int]) -> None:
    """These tokens follow the prompt and 7, once more after rewinding."""
    decoder.prefill(PROMPT)
    for _ in range(2):
        decoder.rewind()
        found = [7]
        for _ in expected:
            found.append(decoder.step(found[-1])[0])
        assert found[1:] == expected


def decodes_the_same_after_rewinding(decoder: peers.PeerDecoder) -> bool:
    runs = []
    for _ in range(2):
        decoder.rewind()
        token, found = 7, []
        for _ in range(6):
            token, blocks = decoder.step(token)
            assert blocks is None
            found.append(token)
        runs.append(found)
    return runs[0] == runs[1] and len(set(runs[0])) > 1


@pytest.mark.parametrize("name", ["llama.cpp", "ctranslate2"])
def test_a_full_disk_is_told_before_anything_is_written(
    name: str, temporary_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = row(name, "float32", VARIANTS[0])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(Failure, match="set TMPDIR"):
        chosen.load({}, 40, 1)
    assert list(temporary_files.iterdir()) == []


def test_the_gguf_file_says_what_the_model_is(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    from sparsecli.bench.peers.llama_file import write_random

    spec = llama_shaped(VARIANTS[0].spec, VARIANTS[0].sizes.total)
    write_random(tmp_path / "model.gguf", spec, "q4_0")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["tokenizer.ggml.model"] == "none"
    assert fields["llama.vocab_size"] == 50
    assert fields["llama.feed_forward_length"] == spec.feed_forward.d_ff
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert sum(tensor.n_elements for tensor in tensors.values()) == count_parameters(spec).total
    assert tensors["blk.1.attn_q.weight"].tensor_type == gguf.GGMLQuantizationType.Q4_0
    weights = gguf.quants.dequantize(tensors["output.weight"].data, gguf.GGMLQuantizationType.Q4_0)
    assert weights.shape == (50, 64)
    assert 0.01 < weights.std() < 0.03


def test_openvino_reports_nothing_to_its_makers() -> None:
    pytest.importorskip("openvino")
    PEERS["openvino"].load_module()
    from openvino.tools.ovc import telemetry_utils

    assert telemetry_utils.tm.__name__.endswith("telemetry_stub")
