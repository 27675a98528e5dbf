"""Writing text: streaming, stop strings, limits, both backends, packed models, and what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers

from sparsecli import pack
from sparsecli.console import Failure
from sparsecli.data.copying import symbol_tokenizer
from sparsecli.data.tokenization import PAIR_TOKENS, encode, load_or_train, train_byte_pairs
from sparsecli.decode.native import binding
from sparsecli.generate import text
from sparsecli.generate.command import generate
from sparsecli.generate.decoder import DecoderOptions
from sparsecli.generate.prompt import encode_input, encode_prompt
from sparsecli.generate.text import StopFilter, generate_text
from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM
from sparsecli.model.files import MODEL_TYPES, check_weights, find_model, read_description
from sparsecli.model.loading import load_model
from sparsecli.model.tokenizer import Tokenizer, read_tokenizer
from sparsecli.recipe.data import FilesCorpus
from sparsecli.recipe.schema import GenerateSpec

needs_native = pytest.mark.skipif(binding.available() is not None, reason=str(binding.available()))
BACKENDS = [pytest.param("native", marks=needs_native), "torch"]
TEXT = "def read_file(path):\n    return open(path).read()\n\nnaïve = 'žluťoučký kůň 🐎'\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a real tokenizer."""
    place = tmp_path_factory.mktemp("run") / "model"
    data = FilesCorpus(
        source="files",
        paths=["unused"],
        tokenizer={"kind": "bpe", "vocabulary_size": 300},
        sequence_length=16,
    )
    tokenizer = load_or_train(data, [TEXT] * 3, place.parent / "cache")
    torch.manual_seed(0)
    config = ScalingTransformerConfig(
        d_model=32,
        layers=2,
        heads=4,
        max_positions=48,
        feed_forward={"kind": "sparse", "d_ff": 64, "block_size": 8, "rank": 4},
        vocabulary={"kind": "dense", "size": 300, "tied": True},
        eos_token_id=tokenizer.eos_token_id,
    )
    ScalingTransformerForCausalLM(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the model to damage."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def run(folder: Path, prompt: str = "def read", **options: object) -> None:
    sampling = {key: options.pop(key) for key in list(options) if key in GenerateSpec.model_fields}
    names = ("backend", "dtype", "cache_dtype", "threads")
    decoder = DecoderOptions(**{key: options.pop(key) for key in names if key in options})
    model = find_model(str(folder))
    generate(model, prompt=prompt, options=GenerateSpec(**sampling), decoder=decoder, **options)


# -- what is written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_text_equals_transformers_generate(
    folder: Path, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    run(folder, temperature=0, max_new_tokens=20, json=True, backend=backend, threads=1)
    result = json.loads(capsys.readouterr().out)
    model, tokenizer = load_model(folder)
    ids = tokenizer("def read", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    assert result["tokens"] == [token for token in expected if token != model.config.eos_token_id]
    assert result["stats"]["new_tokens"] == len(result["tokens"])
    assert (result["backend"], result["dtype"], result["threads"]) == (backend, "float32", 1)


def test_the_stream_is_the_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, seed=1, max_new_tokens=30, json=True)
    text = json.loads(capsys.readouterr().out)["text"]
    run(folder, seed=1, max_new_tokens=30, stats=True, threads=1)
    captured = capsys.readouterr()
    assert captured.out == text + "\n"
    assert "ms/token" in captured.err
    assert "1 thread, float32" in captured.err


def test_seed_decides(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (1, 1, 2):
        run(folder, seed=seed, max_new_tokens=20)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


class Silent:
    """A decoder with constant logits: the sampler alone decides."""

    def prefill(self, prompt: list[int], capacity: int) -> np.ndarray:
        return np.zeros(300, np.float32)

    def step(self, token: int) -> np.ndarray:
        return np.zeros(300, np.float32)


def test_a_character_of_several_tokens_is_written_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte of the horse is a token of its own; nothing is shown until the last one is there."""
    model = read_description(folder)
    tokenizer = read_tokenizer(folder, 300)
    ids = tokenizer.encode("🦄 kůň 🐎")
    wanted = iter([*ids, *model.end_tokens])
    pieces: list[str] = []
    monkeypatch.setattr(text, "make_sampler", lambda options, seed: lambda ids, logits: next(wanted))
    result = generate_text(Silent(), model, tokenizer, [5], GenerateSpec(), 0, pieces.append)
    assert "".join(pieces) == result.text == "🦄 kůň 🐎"
    assert "�" not in "".join(pieces)
    assert len(ids) > len(pieces)
    assert result.finish == "end"


@pytest.mark.parametrize("backend", BACKENDS)
def test_context_ends_the_text(folder: Path, capsys: pytest.CaptureFixture[str], backend: str) -> None:
    run(folder, temperature=0, max_new_tokens=500, json=True, backend=backend)
    result = json.loads(capsys.readouterr().out)
    assert result["finish"] in {"context", "end"}
    assert result["stats"]["prompt_tokens"] + result["stats"]["new_tokens"] <= 48


def test_stop_strings_end_the_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, temperature=0, max_new_tokens=30, json=True)
    text = json.loads(capsys.readouterr().out)["text"]
    stop = text[8:11]
    run(folder, temperature=0, max_new_tokens=30, json=True, stop=[stop])
    result = json.loads(capsys.readouterr().out)
    assert result["text"] == text[: text.index(stop)]
    assert result["finish"] == "stop"


def test_stop_strings_may_name_special_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not shown, whether the text ends at them or not."""
    tokenizer = read_tokenizer(folder, 300)
    tokenizer.backend.add_special_tokens(["<|turn|>"])
    tokenizer = Tokenizer(tokenizer.backend)
    turn = tokenizer.backend.token_to_id("<|turn|>")
    tokens = [*tokenizer.encode("ab"), turn, *tokenizer.encode("\ncd�")]

    def written(*stop: str) -> tuple[str, str]:
        wanted = iter(tokens)
        monkeypatch.setattr(text, "make_sampler", lambda options, seed: lambda ids, logits: next(wanted))
        options = GenerateSpec(stop=list(stop), max_new_tokens=len(tokens))
        result = generate_text(
            Silent(), read_description(folder), tokenizer, [5], options, 0, lambda text: None
        )
        return result.text, result.finish

    assert written() == ("ab\ncd�", "length")
    assert written("<|turn|>") == ("ab", "stop")
    assert written("b<|turn|>\nc") == ("a", "stop")
    assert written("<|turn|>d") == ("ab\ncd�", "length")
    assert written("b\n") == ("a", "stop")


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3), st.data())
def test_stop_filter_equals_a_search_in_the_whole_text(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    """However the text arrives in pieces, also where a stop string overlaps its own beginning."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stream, shown, stopped = StopFilter(stops), "", False
    for piece in pieces:
        part, stopped = stream.feed(piece)
        shown += part
        if stopped:
            break
    found = [text.index(stop) for stop in stops if stop in text]
    assert stopped == bool(found)
    if stopped:
        # A later piece may complete a stop string that starts earlier; what was met first counts.
        assert text.startswith(shown)
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
    else:
        assert shown + stream.flush() == text


def test_prompts_and_inputs_are_text(folder: Path, tmp_path: Path) -> None:
    """Of pairs, training reads the names of padding and of the end as text; so does what is to be continued."""
    paired = train_byte_pairs(300, [TEXT], PAIR_TOKENS)
    paired.save_pretrained(tmp_path)
    source = "a</s>b <pad> c"
    (trained,) = encode(paired, [source])
    assert encode_input(read_tokenizer(tmp_path, 300), source, 64) == [*trained, paired.eos_token_id]
    tokenizer = read_tokenizer(folder, 300)
    ids = encode_prompt(tokenizer, "a<|endoftext|>b", 48)
    assert not tokenizer.end & {*ids}
    assert tokenizer.backend.decode(ids) == "a<|endoftext|>b"
    symbol_tokenizer(5).save_pretrained(tmp_path / "symbols")
    with pytest.raises(Failure, match="words that the tokenizer does not know: </s> <pad> x;"):
        encode_input(read_tokenizer(tmp_path / "symbols", 7), "1 </s> 2 <pad> x", 64)


def test_chat_template_is_used_where_there_is_one(folder: Path) -> None:
    tokenizer = read_tokenizer(folder, 300)
    assert tokenizer.backend.decode(encode_prompt(tokenizer, "hi", 48)) == "hi"
    tokenizer.template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}:"
    assert tokenizer.backend.decode(encode_prompt(tokenizer, "hi", 48)) == "<user>hi:"
    assert tokenizer.backend.decode(encode_prompt(tokenizer, "hi", 48, template=False)) == "hi"


def test_a_word_that_follows_the_prompt_keeps_its_space(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizers that mark spaces within words drop the first one of a text; the prompt is its beginning."""
    words = tokenizers.Tokenizer(models.WordLevel({"▁hello": 0, "▁world": 1}, unk_token="▁hello"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = Tokenizer(words)
    monkeypatch.setattr(text, "make_sampler", lambda options, seed: lambda ids, logits: 1)
    ids = encode_prompt(tokenizer, "hello", 48)
    options = GenerateSpec(max_new_tokens=2)
    written = generate_text(Silent(), read_description(folder), tokenizer, ids, options, 0, lambda text: None)
    assert written.text == " world world"


# -- what decodes --------------------------------------------------------------------------------------------


def test_torch_decodes_where_the_native_engine_cannot(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(binding, "available", lambda: "no compiler at installation")
    run(folder, max_new_tokens=2, json=True)
    captured = capsys.readouterr()
    assert json.loads(captured.out)["backend"] == "torch"
    assert captured.err == "decoding with PyTorch: no compiler at installation\n"
    run(folder, max_new_tokens=2, backend="torch")
    assert capsys.readouterr().err == ""
    with pytest.raises(Failure, match="--backend native: no compiler at installation"):
        run(folder, backend="native")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "int8"}, "--dtype int8"), ({"cache_dtype": "bfloat16"}, "--cache-dtype bfloat16")],
)
def test_torch_has_no_other_types(folder: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(Failure, match=f"{message}: only the native backend"):
        run(folder, backend="torch", **options)


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_packed_model_writes_the_same_text(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    packed = tmp_path / "packed"
    pack.run(model=str(folder), output=packed, dtype=dtype)
    assert not (packed / "model.safetensors").exists()
    results = []
    for place, chosen in ((folder, dtype), (packed, None), (packed / "model.spk", dtype)):
        run(place, temperature=0, max_new_tokens=20, json=True, dtype=chosen, backend="native")
        results.append(json.loads(capsys.readouterr().out))
    assert [result["dtype"] for result in results] == [dtype] * 3
    assert results[0]["tokens"] == results[1]["tokens"] == results[2]["tokens"]


@needs_native
def test_a_packed_model_is_for_the_native_engine_as_it_is(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    pack.run(model=str(folder), output=packed, dtype="bfloat16")
    with pytest.raises(Failure, match="was packed as bfloat16; leave out --dtype int8"):
        run(packed, dtype="int8", backend="native")
    with pytest.raises(
        Failure, match=r"model.safetensors: no such file \(model.spk is packed for the native"
    ):
        run(packed, backend="torch")
    with pytest.raises(Failure, match="already exists; choose another --output"):
        pack.run(model=str(folder), output=packed, dtype="bfloat16")
    whole = (packed / "model.spk").read_bytes()
    (packed / "model.spk").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Failure, match=r"model\.spk") as caught:
        run(packed, backend="native")
    assert len(caught.value.message.splitlines()) == 1


@needs_native
def test_files_that_do_not_belong_together(folder: Path, copy: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    pack.run(model=str(folder), output=packed, dtype="bfloat16")
    edit_config(rotary_base=5.0)(packed)
    with pytest.raises(Failure, match=r"model\.spk and config\.json do not belong together"):
        run(packed, backend="native")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(Failure, match=r"model: tensor model\.norm\.weight holds a NaN"):
        run(copy, backend="native")
    with pytest.raises(Failure, match="logits are NaN or infinite"):
        run(copy, backend="torch")


def test_packing_goes_beside_the_model(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack.run(model=str(copy), output=None, dtype="int8", dry_run=True)
    assert (
        f"model.spk, config.json, sparsecli_model.py, tokenizer.json, tokenizer_config.json in {copy}-int8"
        in capsys.readouterr().out
    )
    assert [path.name for path in copy.parent.iterdir()] == ["model"]
    monkeypatch.chdir(copy)
    pack.run(model=".", output=None, dtype="bfloat16")
    written = copy.parent / "model-bfloat16"
    assert sorted(path.name for path in written.iterdir()) == [
        "config.json",
        "model.spk",
        "sparsecli_model.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(path.name for path in copy.parent.iterdir()) == ["model", "model-bfloat16"]


@needs_native
def test_the_native_engine_starts_without_torch(folder: Path) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['sparsecli', 'generate', '--model', {str(folder)!r}, '--prompt', 'x', '--backend', 'native']\n"
        "from sparsecli import cli\n"
        "try: cli.main()\n"
        "finally: print('loaded:', {'torch', 'transformers', 'jinja2'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.endswith("loaded: set()\n")


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "message"), [("", "empty"), ("x" * 400, "the model's context of 48")])
def test_prompts_that_do_not_fit(folder: Path, prompt: str, message: str) -> None:
    with pytest.raises(Failure, match=message):
        run(folder, prompt)


def read_without_torch(folder: Path) -> None:
    spec = read_description(folder).spec
    check_weights(folder, spec)
    read_tokenizer(folder, spec.vocabulary.size)


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def damage_header(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(b"\xff" * 64 + weights.read_bytes()[64:])


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def reshape_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def shrink_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vocabulary"]["size"] = 200
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embedding.weight"] = tensors["model.embedding.weight"][:200].clone()
    tensors.pop("head.weight", None)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(**fields: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return edit


def shard_outside(folder: Path, name: str = "../elsewhere.safetensors") -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "model.safetensors: cut short or damaged"),
        (damage_header, "model.safetensors: cut short or damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: no such file"),
        (drop_tensor, "misses tensor model.norm.weight"),
        (reshape_tensor, r"model.norm.weight is \(31,\), config.json asks for \(32,\)"),
        (shrink_vocabulary, "the tokenizer has 300 tokens, the model 200"),
        (edit_config(model_type="llama"), "model type 'llama'"),
        (edit_config(heads=5), "config.json: .*nearest: 30 and 35"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: does not load"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json: does not load"),
        (shard_outside, "lies outside"),
        (lambda folder: shard_outside(folder, "x" * 300), "lies outside"),
    ],
)
def test_damaged_models_get_one_clear_line(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(Failure, match=message) as caught:
        load_model(copy)
    assert len(caught.value.message.splitlines()) == 1
    with pytest.raises(Failure, match=message) as caught:
        read_without_torch(copy)
    assert len(caught.value.message.splitlines()) == 1


def test_code_in_a_model_folder_never_runs(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "evil.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\nclass Evil: pass\n")
    edit_config(auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})(copy)
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    with contextlib.suppress(Failure):
        load_model(copy)
    assert not (copy / "ran").exists()


def test_finding_a_model(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Failure, match="no finished run under runs/"):
        find_model(None)
    with pytest.raises(Failure, match="no such file or folder"):
        find_model("runs/absent")
    (tmp_path / "runs" / "started").mkdir(parents=True)
    with pytest.raises(Failure, match="holds no model"):
        find_model("runs/started")
    for name, age in (("old", 2), ("new", 1)):
        place = tmp_path / "runs" / name / "model"
        shutil.copytree(copy, place)
        os.utime(place / "config.json", (1e9 - age, 1e9 - age))
    assert find_model(None) == Path("runs/new/model")
    newest, older = Path("runs/new/model/config.json"), Path("runs/old/model/config.json")
    newest.write_text('{"model_type": "scaling_transformer_vision"}')
    older.write_text('{"model_type": "scaling_transformer"}')
    os.utime(older, (1, 1))
    assert find_model(None, types=MODEL_TYPES) == Path("runs/old/model")
    with pytest.raises(Failure, match=r"^no finished run under runs/ .* \(terraformer\); pass --model DIR$"):
        find_model(None, types=("terraformer",))
    assert find_model("runs/old") == Path("runs/old/model")
    assert find_model("runs/old/model") == Path("runs/old/model")
    assert find_model(None, output=Path("runs/old")) == Path("runs/old/model")
