"""Where foreign models come from, and one clear line for each that cannot be taken in or given back."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from foreign_models import LLAMA, MODELS, build, fetched, prompt, save
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_runs import files_up_to
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsecli.console import Failure
from sparsecli.generate.prompt import encode_chat, encode_prompt
from sparsecli.interchange import exporting, importing
from sparsecli.interchange.model_folder import model_folder
from sparsecli.interchange.sources import ForeignModel, open_source
from sparsecli.model.files import CONFIG, INDEX, WEIGHTS, find_model, read_description, weight_files
from sparsecli.model.loading import load_model, load_network, read_config
from sparsecli.model.outputs import written_beside
from sparsecli.model.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama", **LLAMA), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def theirs(llama: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(llama, tmp_path / "theirs"))


@pytest.fixture
def ours(llama: Path, tmp_path: Path) -> Path:
    importing.run(source=str(llama), output=tmp_path / "ours")
    return tmp_path / "ours"


def change(folder: Path, **fields: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refused(source: Path | str, output: Path) -> str:
    """What `import` says; it leaves nothing behind."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(Failure) as caught:
        importing.run(source=str(source), output=output)
    assert sorted(output.parent.iterdir()) == before
    assert "\n" not in caught.value.message
    return caught.value.message


# -- what ours cannot express ----------------------------------------------------------------------------------


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mpt"}, "model_type: 'mpt' is not an architecture"),
        ({"model_type": None}, "model_type: None is not an architecture"),
        ({"hidden_act": "quick_gelu"}, "hidden_act: 'quick_gelu' is not a supported activation"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config: only weights"),
        (
            {"rope_parameters": None, "rope_scaling": LONGROPE},
            "rope_parameters.rope_type: 'longrope' is not supported (default, linear, llama3, yarn)",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "rope_parameters.rope_type: 'dynamic' is not supported",
        ),
        ({"num_key_value_heads": 3}, "attention.key_value_heads"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"hidden_size": 33}, "hidden size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 is more than 1024"),
        ({"max_position_embeddings": 10**15}, "max_positions: 1000000000000000 is more than 2147483647"),
    ],
)
def test_a_configuration_that_does_not_fit(fields: dict, message: str, theirs: Path, tmp_path: Path) -> None:
    change(theirs, **fields)
    shown = refused(theirs, tmp_path / "ours")
    assert shown.startswith(f"{theirs / CONFIG}: ")
    assert message in shown


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before: False"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim: 16"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step: 2"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers: [1]"),
        ("qwen3_moe", {"num_experts_per_tok": 6}, "experts_per_token: 6 of 6 experts"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv: 8.0"),
        ("mixtral", {"hidden_act": "quick_gelu"}, "hidden_act: 'quick_gelu'"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm: True"),
        ("falcon", {"alibi": True}, "alibi: only rotary positions"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn: 2"),
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn: False"),
        ("gptj", {"rotary_dim": 16}, "rotary_dim: 16 is not a part of a head of 8"),
        ("gptj", {"rotary_dim": 5}, "rotary"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "must be one of ['longrope']",
        ),
    ],
)
def test_features_that_a_family_does_not_share(kind: str, fields: dict, message: str, tmp_path: Path) -> None:
    folder = save(build(kind, **MODELS[kind][1]), tmp_path / "theirs")
    change(folder, **fields)
    assert message in refused(folder, tmp_path / "ours")


# -- damaged weights and tokenizers ----------------------------------------------------------------------------


def damage(folder: Path, **tensors: torch.Tensor | None) -> None:
    held = load_file(folder / WEIGHTS) | tensors
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, folder / WEIGHTS)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({UP: None}, f"misses tensor {UP}"),
        ({"lm_head.weight": None}, "misses tensor lm_head.weight"),
        ({"score.weight": torch.zeros(2, 32)}, "has unknown tensor score.weight"),
        ({UP: torch.zeros(48, 31)}, f"tensor {UP} is (48, 31), config.json asks for (48, 32)"),
        ({UP: torch.full((48, 32), torch.nan)}, f"tensor {UP} holds a NaN"),
        ({UP: torch.zeros(48, 32, dtype=torch.int8)}, f"tensor {UP} is I8, not one of"),
    ],
)
def test_weights_that_do_not_fit(tensors: dict, message: str, theirs: Path, tmp_path: Path) -> None:
    damage(theirs, **tensors)
    shown = refused(theirs, tmp_path / "ours")
    assert shown.startswith(str(theirs))
    assert message in shown


def test_a_tied_head_that_is_another_one(theirs: Path, tmp_path: Path) -> None:
    change(theirs, tie_word_embeddings=True)
    assert "tie_word_embeddings: true, but lm_head.weight" in refused(theirs, tmp_path / "ours")


def test_weights_cut_short(theirs: Path, tmp_path: Path) -> None:
    content = (theirs / WEIGHTS).read_bytes()
    (theirs / WEIGHTS).write_bytes(content[:-1000])
    assert "cut short or damaged" in refused(theirs, tmp_path / "ours")


def test_one_file_goes_before_an_old_index(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {name: torch.zeros_like(tensor) for name, tensor in load_file(theirs / WEIGHTS).items()}
    save_file(old, theirs / "model-00001-of-00001.safetensors")
    places = dict.fromkeys(old, "model-00001-of-00001.safetensors")
    (theirs / INDEX).write_text(json.dumps({"weight_map": places}))
    importing.run(source=str(theirs), output=tmp_path / "ours")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert line == f"warning: {theirs}: {WEIGHTS} is read, as transformers does; {INDEX} beside it is not"
    original = AutoModelForCausalLM.from_pretrained(theirs)
    expected = original(prompt()).logits
    torch.testing.assert_close(load_network(tmp_path / "ours")(prompt()).logits, expected)
    (theirs / WEIGHTS).unlink()
    assert [path.name for path in weight_files(theirs)] == ["model-00001-of-00001.safetensors"]


def test_pickles_are_refused(theirs: Path, tmp_path: Path) -> None:
    (theirs / WEIGHTS).unlink()
    pickled = theirs / "pytorch_model.bin"
    pickled.write_bytes(pickle.dumps({}))
    assert "pytorch_model.bin is a pickle, which is never loaded" in refused(theirs, tmp_path / "ours")
    assert "a pickle, which is never loaded" in refused(pickled, tmp_path / "ours")


def test_a_tokenizer_of_another_model(theirs: Path, tmp_path: Path) -> None:
    change(theirs, vocab_size=200)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        damage(theirs, **{name: torch.zeros(200, 32)})
    assert "the tokenizer has 270 tokens, the model 200" in refused(theirs, tmp_path / "ours")
    change(theirs, vocab_size=400)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        damage(theirs, **{name: torch.zeros(400, 32)})
    assert "the tokenizer has 270 tokens, the model 400" in refused(theirs, tmp_path / "ours")


@pytest.mark.parametrize("token", [-1, 400])
def test_a_padding_token_that_there_is_not(
    token: int, theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(theirs, pad_token_id=token, bos_token_id=token)
    (theirs / "generation_config.json").write_text(json.dumps({"pad_token_id": token}))
    importing.run(source=str(theirs), output=tmp_path / "ours")
    said = capsys.readouterr().err
    assert "transformers" not in said
    for name in ("pad_token_id", "bos_token_id"):
        assert (
            f"warning: {theirs}: {name}: {token} is not one of the model's 270 tokens; it is omitted" in said
        )
    config = read_config(tmp_path / "ours")
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (None, None, 0)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").generation_config.pad_token_id is None
    exporting.run(model=str(tmp_path / "ours"), output=tmp_path / "back")


def test_a_special_token_that_was_added_later(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(theirs)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(theirs)
    importing.run(source=str(theirs), output=tmp_path / "ours")
    assert "has '<pad>' beyond the model's 270 tokens; a text with such a token" in capsys.readouterr().err
    ours = read_tokenizer(tmp_path / "ours", 270)
    assert ours.encode("read") == tokenizer("read")["input_ids"]
    assert max(ours.encode("a <pad>")) < 270  # a prompt is text
    ours.template = "{{ messages[0].content }}"
    with pytest.raises(
        Failure, match="the text has the token '<pad>', which the model has not; leave it out"
    ):
        encode_chat(ours, "a <pad>")
    load_model(tmp_path / "ours")
    tokenizer.add_tokens(["plain"])
    tokenizer.save_pretrained(theirs)
    assert "the tokenizer has 272 tokens, the model 270" in refused(theirs, tmp_path / "again")


def test_a_byte_order_mark(theirs: Path, tmp_path: Path) -> None:
    for name in (CONFIG, "tokenizer_config.json"):
        path = theirs / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    importing.run(source=str(theirs), output=tmp_path / "ours")
    load_model(tmp_path / "ours")


def test_an_end_token_that_there_is_not(theirs: Path, tmp_path: Path) -> None:
    (theirs / "generation_config.json").write_text('{"eos_token_id": [0, 999]}')
    assert "eos_token_id: 999 is not one of the 270 tokens" in refused(theirs, tmp_path / "ours")


@pytest.mark.parametrize("value", ['{"a": [0]}', '"x"', "1.5", "true", "[[0]]"])
@pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id"])
def test_a_special_token_that_is_no_number(theirs: Path, tmp_path: Path, name: str, value: str) -> None:
    (theirs / "generation_config.json").write_text(f'{{"{name}": {value}}}')
    assert f"{theirs}: {name}: expected the number of a token, got" in refused(theirs, tmp_path / "ours")


def test_no_tokenizer(theirs: Path, tmp_path: Path) -> None:
    for path in theirs.glob("tokenizer*"):
        path.unlink()
    assert refused(theirs, tmp_path / "ours").startswith(f"{theirs}: no tokenizer can be loaded")


def test_a_full_disk(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sparsecli.interchange.safetensors_files.save_file", full)
    assert "No space left on device" in refused(theirs, tmp_path / "ours")


# -- places ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cache of the hub that holds one model, and no network."""
    return fetched(llama, "someone/tiny", tmp_path / "hub", monkeypatch)


def test_a_name_on_the_hub(hub: str, llama: Path, tmp_path: Path) -> None:
    source = open_source("someone/tiny")
    assert isinstance(source, ForeignModel)
    assert source.revision == hub
    importing.run(source="someone/tiny", output=tmp_path / "ours", revision="main")
    importing.run(source=str(llama), output=tmp_path / "same")
    assert torch.equal(
        load_network(tmp_path / "ours")(prompt()).logits, load_network(tmp_path / "same")(prompt()).logits
    )


def test_a_model_of_ours_on_the_hub(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched(ours, "someone/ours", tmp_path / "hub", monkeypatch)
    with model_folder("someone/ours") as folder:
        assert torch.equal(load_network(folder)(prompt()).logits, load_network(ours)(prompt()).logits)
        read_tokenizer(folder, read_description(folder).spec.vocabulary.size)
    assert "is a model of ours already" in refused("someone/ours", tmp_path / "again")


@pytest.mark.parametrize("name", ["someone/other", "gpt2", "someone/../other/x", "no-such-folder/a/b"])
def test_names_that_lead_nowhere(name: str, hub: str, tmp_path: Path) -> None:
    shown = refused(name, tmp_path / "ours")
    on_hub = "; the hub cannot be reached: offline mode is on (HF_HUB_OFFLINE)"
    assert shown == f"{name}: no such file or folder{on_hub if name in ('someone/other', 'gpt2') else ''}"


def test_a_folder_of_that_owner_is_not_taken_for_the_model(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    assert open_source("someone/tiny").revision == hub
    assert "someone/other: no such file or folder; the hub cannot" in refused(
        "someone/other", tmp_path / "ours"
    )


def test_a_revision_that_there_is_not(hub: str, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="someone/tiny"):
        importing.run(source="someone/tiny", output=tmp_path / "ours", revision="other")


def test_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0 but no more")
    assert "not a whole GGUF file" in refused(tmp_path / "model.gguf", tmp_path / "ours")
    with pytest.raises(Failure, match="sparsecli import makes a model folder of it"):
        find_model(str(tmp_path / "model.gguf"))


def test_a_model_of_ours_and_an_output_that_is_taken(ours: Path, llama: Path, tmp_path: Path) -> None:
    assert "is a model of ours already" in refused(ours, tmp_path / "again")
    assert "already exists; choose another --output" in refused(llama, ours)
    opened = open_source(str(llama))
    (tmp_path / "taken").mkdir()
    with pytest.raises(Failure, match="not an import of"):
        importing.model_folder(opened, tmp_path / "taken")


def test_a_dry_run_writes_nothing(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    importing.run(source=str(llama), output=tmp_path / "ours", dry_run=True)
    assert not list(tmp_path.iterdir())
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_generate_names_the_way_in(llama: Path) -> None:
    with pytest.raises(Failure, match=f"model type 'llama' is not one of ours .*; sparsecli import {llama}"):
        read_description(llama)


def test_prompts_begin_as_the_original_tokenizer_begins_them(theirs: Path, tmp_path: Path) -> None:
    path = theirs / "tokenizer.json"
    fields = json.loads(path.read_text())
    first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    path.write_text(json.dumps(fields))
    importing.run(source=str(theirs), output=tmp_path / "ours")
    assert read_description(tmp_path / "ours").imported
    tokenizer = read_tokenizer(tmp_path / "ours", 270)
    plain = tokenizer.encode("text")
    assert encode_prompt(tokenizer, "text", 99, template=False, special=True) == [0, *plain]
    assert encode_prompt(tokenizer, "text", 99, template=False) == plain


# -- the way back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"origin": None}, "was not imported"),
        (
            {"feed_forward": {"kind": "sparse", "d_ff": 48, "block_size": 8, "rank": 4}},
            "are sparse, not dense any more",
        ),
        (
            {"feed_forward": {"kind": "mixture", "d_ff": 48, "experts": 3, "activation": "silu"}},
            "feed_forward is not as it was imported",
        ),
        ({"rotary_base": 5.0}, "rotary_base is not as it was imported"),
        ({"origin": {"config": {"model_type": "mpt"}}}, "origin.config: model_type: 'mpt'"),
    ],
)
def test_what_cannot_go_back(fields: dict, message: str, ours: Path, tmp_path: Path) -> None:
    change(ours, **fields)
    with pytest.raises(Failure, match=message) as caught:
        exporting.run(model=str(ours), output=tmp_path / "back")
    assert "\n" not in caught.value.message
    assert not (tmp_path / "back").exists()


def test_export_overwrites_nothing(ours: Path) -> None:
    with pytest.raises(Failure, match="already exists; choose another --output"):
        exporting.run(model=str(ours), output=ours)


@pytest.mark.parametrize("size", [100, 3_000, 20_000])
def test_a_full_disk_is_one_line_that_names_the_output(size: int, llama: Path, ours: Path) -> None:
    """Whichever file does not fit: the configuration, the tokenizer, the weights."""
    output = ours.with_name("full")
    reason = rf"^{output}: cannot be written: (File too large|not all data could be written \(disk full\?\))$"
    with files_up_to(size), pytest.raises(Failure, match=reason):
        importing.run(source=str(llama), output=output)
    with files_up_to(size), pytest.raises(Failure, match=reason):
        exporting.run(model=str(ours), output=output)
    assert [path.name for path in ours.parent.iterdir()] == ["ours"]


def test_an_output_in_a_file(ours: Path) -> None:
    place = ours / CONFIG
    with pytest.raises(
        Failure, match=rf"^{place / 'x'}: cannot be written: {place} is a file, not a folder$"
    ):
        exporting.run(model=str(ours), output=place / "x")
    with (
        pytest.raises(Failure, match=rf"^{place / 'x'}: cannot be written: "),
        written_beside(place / "x"),
    ):
        pass
