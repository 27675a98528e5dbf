"""Models as GGUF files: the same tensors, metadata and tokenizer again, and the same text in llama.cpp."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_models import EXPERTS, GEMMA2, LLAMA, LLAMA3, MODELS, STABLELM, TEMPLATE, build, prompt, save
from safetensors.torch import save_file
from small_runs import files_up_to
from test_convert_peers import model_of, needs_engine, needs_llama
from test_interchange import PIECES, by_the_engine, needs_gguf, write_gguf
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsecli import cli
from sparsecli.console import Failure
from sparsecli.convert.linear_layers import TypeChoice
from sparsecli.convert.weight_types import RoundedLayers
from sparsecli.data.tokenization import train_byte_pairs
from sparsecli.interchange import exporting, importing
from sparsecli.interchange.byte_pair_tokenizer import SPLITTINGS, build_byte_pair_tokenizer, name_of_splitting
from sparsecli.interchange.gguf_reader import GgufReader
from sparsecli.model.files import CONFIG, read_description
from sparsecli.model.gguf_types import TYPES
from sparsecli.model.loading import load_model, load_network
from sparsecli.model.tokenizer import GGUF_METADATA

pytestmark = needs_gguf

GEMMA3 = {
    "num_hidden_layers": 7,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "tie_word_embeddings": True,
}
EXPORTED: dict[str, tuple[str, dict]] = {
    **{
        name: MODELS[name]
        for name in (
            "llama",
            "llama, tied, biases, one head of keys",
            "llama, linear positions",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "olmo2",
            "gpt2",
        )
    },
    **{
        name: MODELS[name]
        for name in (
            "llama, yarn",
            "mixtral",
            "qwen3_moe, normalized",
            "phi3",
            "granite",
            "stablelm",
            "falcon",
            "falcon, new",
            "falcon, new, one norm",
        )
    },
    "phi3, longrope": (  # llama.cpp takes the long factors where its context is longer than the original one
        "phi3",
        {
            **MODELS["phi3, longrope"][1],
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 256,
        },
    ),
    "olmoe": ("olmoe", {**EXPERTS, "intermediate_size": 20, "num_key_value_heads": 4}),
    "stablelm, parallel": ("stablelm", {**STABLELM, "use_parallel_residual": True, "use_qkv_bias": True}),
    "smollm3": ("smollm3", {**LLAMA, "num_hidden_layers": 5}),
    "gemma2": (
        "gemma2",
        {**GEMMA2, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0, "tie_word_embeddings": True},
    ),
    "llama, llama3 positions": (
        "llama",
        {**LLAMA, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192}},
    ),
    "gemma3": ("gemma3_text", {**LLAMA, **GEMMA3}),
}


def learn_by_heart(model: PreTrainedModel, text: torch.Tensor) -> None:
    """Train until every token of the `text` (T,) is certain."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(70):  # the loss is then 0.015
        optimizer.zero_grad()
        model(text[None], labels=text[None]).loss.backward()
        optimizer.step()


def exported(model: Path, output: Path) -> GgufReader:
    exporting.run(model=str(model), output=output, format="gguf")
    return GgufReader(output)


def check_same_tensors(found: GgufReader, expected: GgufReader) -> None:
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert (found.tensors[name].kind, found.tensors[name].shape) == (tensor.kind, tensor.shape)
        np.testing.assert_array_equal(found.tensors[name].raw, tensor.raw)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_what_was_imported_comes_out_byte_for_byte(kind: str, tmp_path: Path) -> None:
    """With another type in every tensor, where they are not fused."""
    name, fields = MODELS[kind]
    wide = {"n_embd": 256, "n_inner": 256, "n_layer": 3}
    wide = wide if kind == "gpt2" else {"hidden_size": 256, "intermediate_size": 256}
    original = build(name, **{**fields, **wide})
    source = tmp_path / "source.gguf"
    write_gguf(original, save(original, tmp_path / "theirs"), source, quantized=list(TYPES))
    importing.run(source=str(source), output=tmp_path / "ours")
    kinds = read_description(tmp_path / "ours").spec.quantization.gguf.values()
    assert set(kinds) == set(TYPES)
    found, expected = exported(tmp_path / "ours", tmp_path / "again.gguf"), GgufReader(source)
    expected.tensors.pop("position_embd.weight", None)  # which is dequantized
    found.tensors.pop("position_embd.weight", None)
    check_same_tensors(found, expected)
    for key, value in expected.metadata.items():
        assert found.metadata[key] == value, key
    assert {key: found.kinds[key] for key in expected.kinds if key.startswith("tokenizer.")} == {
        key: kind for key, kind in expected.kinds.items() if key.startswith("tokenizer.")
    }


@needs_llama
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in EXPORTED]
    + [(name, dtype) for name in ("llama", "gpt2", "gemma3", "mixtral") for dtype in ("bfloat16", "float16")],
)
@torch.no_grad()
def test_llama_cpp_computes_the_same(name: str, dtype: str, tmp_path: Path) -> None:
    from sparsecli.bench.peers import llama_cpp

    kind, fields = EXPORTED[name]
    original = build(kind, **fields).to(getattr(torch, dtype))
    importing.run(source=str(save(original, tmp_path / "theirs")), output=tmp_path / "ours")
    written = exported(tmp_path / "ours", tmp_path / "model.gguf")
    assert {tensor.kind for tensor in written.tensors.values() if len(tensor.shape) == 1} == {0}
    matrices = {
        tensor.kind
        for name, tensor in written.tensors.items()
        if len(tensor.shape) > 1 and "ffn_gate_inp" not in name  # routers are float32
    }
    assert matrices == {{"float32": 0, "bfloat16": 30, "float16": 1}[dtype]}
    widened = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    expected = widened(prompt()).logits[0].numpy()
    loaded = llama_cpp.LlamaModel(tmp_path / "model.gguf", read_description(tmp_path / "ours").spec, 1)
    found = llama_cpp.LlamaSequence(loaded, 40).logits(prompt()[0].tolist())
    # Its cache is float16, and it rounds activations to the type of the weights.
    assert np.abs(found - expected).max() < (0.12 if dtype == "bfloat16" else 0.03) * expected.std()

    importing.run(source=str(tmp_path / "model.gguf"), output=tmp_path / "imported")
    again = load_network(tmp_path / "imported")(prompt()).logits[0].numpy()
    np.testing.assert_allclose(again, expected, atol=1e-4, rtol=1e-4)
    check_same_tensors(exported(tmp_path / "imported", tmp_path / "again.gguf"), written)


@needs_llama
@needs_engine
def test_llama_cpp_and_the_engine_write_the_same_text(tmp_path: Path) -> None:
    """A model that knows a text by heart is sure of every token: no rounding of a cache chooses another one."""
    from sparsecli.bench.peers import llama_cpp

    text = torch.randint(40, (80,), generator=torch.Generator().manual_seed(0))
    model = model_of(max_positions=128)
    learn_by_heart(model, text)
    model.save_pretrained(tmp_path / "ours")
    train_byte_pairs(300, ["a text"] * 2).save_pretrained(tmp_path / "ours")
    exporting.run(model=str(tmp_path / "ours"), output=tmp_path / "model.gguf", format="gguf")
    start = text[:16].tolist()
    ours = by_the_engine(tmp_path / "ours", start, 64)
    assert ours == text.tolist()
    loaded = llama_cpp.LlamaModel(tmp_path / "model.gguf", model.config.spec, 1)
    sequence = llama_cpp.LlamaSequence(loaded, len(text))
    theirs = [*start, sequence.add(start)]
    while len(theirs) < len(text):
        theirs.append(sequence.add(theirs[-1:]))
    assert theirs == ours


@needs_llama
def test_llama_cpp_reads_texts_as_the_tokenizer(tmp_path: Path) -> None:
    import llama_cpp

    original = build("llama", **LLAMA)
    theirs = save(original, tmp_path / "theirs")
    tokenizer = train_byte_pairs(260, ["a text about reading and writing text"] * 4)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(theirs)
    importing.run(source=str(theirs), output=tmp_path / "ours")
    written = exported(tmp_path / "ours", tmp_path / "model.gguf")
    loaded = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    text = "reading a text, ünd mehr: 123 <call> it's\n\n  fine"
    assert loaded.tokenize(text.encode(), special=True) == tokenizer(text).input_ids
    assert (loaded.token_bos(), loaded.token_eos()) == (0, 0)
    assert written.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    assert written.metadata["tokenizer.ggml.token_type"].count(4) == 1
    assert len(written.metadata["tokenizer.ggml.tokens"]) == original.config.vocab_size


def test_a_sentencepiece_tokenizer_stays(tmp_path: Path) -> None:
    original = build("llama", **LLAMA)
    source = tmp_path / "model.gguf"
    write_gguf(original, save(original, tmp_path / "theirs"), source, pieces=PIECES)
    importing.run(source=str(source), output=tmp_path / "ours")
    again = exported(tmp_path / "ours", tmp_path / "again.gguf")
    assert again.metadata["tokenizer.ggml.scores"] == PIECES.scores
    (tmp_path / "ours" / GGUF_METADATA).unlink()
    with pytest.raises(Failure, match=r"ours: the tokenizer is not byte-level BPE"):
        exporting.run(model=str(tmp_path / "ours"), output=tmp_path / "none.gguf", format="gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.gguf", "model.gguf", "ours", "theirs"]


@pytest.mark.parametrize("tied", [True, False])
def test_of_a_head_with_a_sketch_its_own_weights_are_written(
    tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = build("llama", **LLAMA | {"intermediate_size": 64, "tie_word_embeddings": tied})
    source = tmp_path / "model.gguf"
    write_gguf(original, save(original, tmp_path / "theirs"), source, quantized="Q8_0")
    importing.run(source=str(source), output=tmp_path / "ours")
    model, _ = load_model(tmp_path / "ours")
    rounded = RoundedLayers(model, tmp_path)
    rounded.layers = rounded.layers[-1:]
    rounded.fit([prompt()], lambda path, tensors: save_file(tensors, path))
    kept = TypeChoice(dict(model.config.spec.quantization.gguf), 0, 0.0, head_candidates=16)
    rounded.write(kept, tmp_path / "sketched")
    for file in (tmp_path / "ours").iterdir():
        if not (tmp_path / "sketched" / file.name).exists():
            shutil.copyfile(file, tmp_path / "sketched" / file.name)
    assert read_description(tmp_path / "sketched").spec.quantization.head_candidates == 16
    again = exported(tmp_path / "sketched", tmp_path / "again.gguf")
    check_same_tensors(again, GgufReader(source))
    assert "the file has the exact logits" in capsys.readouterr().err


def test_ways_to_cut_texts_are_told_apart() -> None:
    for name, splitting in SPLITTINGS.items():
        found = name_of_splitting(build_byte_pair_tokenizer([], [], [], splitting))
        assert SPLITTINGS.get(found or "") == splitting, name
    assert name_of_splitting(train_byte_pairs(270, ["some text"], split_names=True).backend_tokenizer) is None


def test_a_model_that_was_trained_here(tmp_path: Path) -> None:
    model = model_of()
    model.save_pretrained(tmp_path / "ours")
    train_byte_pairs(270, ["a text"] * 2).save_pretrained(tmp_path / "ours")
    assert exported(tmp_path / "ours", tmp_path / "model.gguf").metadata["general.architecture"] == "llama"
    train_byte_pairs(257, ["a text"]).save_pretrained(tmp_path / "ours")
    with pytest.raises(Failure, match="ours: the tokenizer has no merges, without which llama"):
        exporting.run(model=str(tmp_path / "ours"), output=tmp_path / "bytes.gguf", format="gguf")
    fields = json.loads((tmp_path / "ours" / CONFIG).read_text())
    fields["feed_forward"] |= {"activation": "relu"}
    (tmp_path / "ours" / CONFIG).write_text(json.dumps(fields))
    with pytest.raises(Failure, match=r"no architecture of GGUF files .* \(llama has another feed_forward\)"):
        exporting.run(model=str(tmp_path / "ours"), output=tmp_path / "relu.gguf", format="gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mistral, sliding", r"\(mistral has another attention\)"),
        ("opt", r"was imported from opt, for which no GGUF file can be written"),
    ],
)
def test_what_gguf_files_do_not_express(name: str, message: str, tmp_path: Path) -> None:
    kind, fields = MODELS[name]
    importing.run(source=str(save(build(kind, **fields), tmp_path / "theirs")), output=tmp_path / "ours")
    with pytest.raises(Failure, match=message):
        exporting.run(model=str(tmp_path / "ours"), output=tmp_path / "model.gguf", format="gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    "room", [0.0, 0.01, 0.5, 1.0], ids=["nothing", "metadata", "tensors", "all but a byte"]
)
def test_a_full_disk_leaves_no_file_behind(
    room: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model_of().save_pretrained(tmp_path / "ours")
    train_byte_pairs(270, ["a text"] * 2).save_pretrained(tmp_path / "ours")
    whole, output = tmp_path / "whole.gguf", tmp_path / "model.gguf"
    exporting.run(model=str(tmp_path / "ours"), output=whole, format="gguf")
    capsys.readouterr()
    words = ["sparsecli", "export", tmp_path / "ours", "--format", "gguf", "--output", output]
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    with files_up_to(max(0, int(room * whole.stat().st_size) - 1)), pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    error = capsys.readouterr().err
    reasons = r"(File too large|not all data could be written \(disk full\?\))"
    assert re.fullmatch(rf"error: {re.escape(str(output))}: cannot be written: {reasons}\n", error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "whole.gguf"]
    exporting.run(model=str(tmp_path / "ours"), output=output, format="gguf")
    assert output.read_bytes() == whole.read_bytes()


def test_queries_and_keys_of_several_types_in_one_tensor(tmp_path: Path) -> None:
    original = build("gpt2", **MODELS["gpt2"][1], n_inner=64)
    source = tmp_path / "model.gguf"
    write_gguf(original, save(original, tmp_path / "theirs"), source, quantized="Q8_0")
    importing.run(source=str(source), output=tmp_path / "ours")
    fields = json.loads((tmp_path / "ours" / CONFIG).read_text())
    del fields["quantization"]["gguf"]["model.layers.0.attention.projection.key"]
    (tmp_path / "ours" / CONFIG).write_text(json.dumps(fields))
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "ours" / "model.safetensors")
    del weights["model.layers.0.attention.projection.key.codes"]
    weights["model.layers.0.attention.projection.key.weight"] = torch.zeros(32, 32)
    save_file(weights, tmp_path / "ours" / "model.safetensors")
    with pytest.raises(Failure, match=r"gpt2 holds queries, keys and values in one tensor blk\.0\.attn_qkv"):
        exporting.run(model=str(tmp_path / "ours"), output=tmp_path / "again.gguf", format="gguf")
