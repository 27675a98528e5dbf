"""Writing text: sampling, streaming, stop strings, limits, and models that do not load."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparsecli import generate
from sparsecli.console import Failure
from sparsecli.data.tokenization import load_or_train
from sparsecli.generate import StopFilter, make_sampler
from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM
from sparsecli.model.checkpoint import find_model, load_model
from sparsecli.recipe.schema import FilesCorpus, GenerateSpec

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
    fields = {key: options.pop(key) for key in list(options) if key in GenerateSpec.model_fields}
    generate.run(None, model=str(folder), prompt=prompt, options=GenerateSpec(**fields), **options)


# -- what is written -----------------------------------------------------------------------------------------


def test_greedy_text_equals_transformers_generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, temperature=0, max_new_tokens=20, json=True)
    result = json.loads(capsys.readouterr().out)
    model, tokenizer = load_model(folder)
    ids = tokenizer("def read", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    assert result["tokens"] == [token for token in expected if token != model.config.eos_token_id]
    assert result["stats"]["new_tokens"] == len(result["tokens"])


def test_the_stream_is_the_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, seed=1, max_new_tokens=30, json=True)
    text = json.loads(capsys.readouterr().out)["text"]
    run(folder, seed=1, max_new_tokens=30, stats=True)
    captured = capsys.readouterr()
    assert captured.out == text + "\n"
    assert "ms/token" in captured.err


def test_seed_decides(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (1, 1, 2):
        run(folder, seed=seed, max_new_tokens=20)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_character_of_several_tokens_is_written_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte of the horse is a token of its own; nothing is shown until the last one is there."""
    model, tokenizer = load_model(folder)
    ids = tokenizer("🦄 kůň 🐎", add_special_tokens=False).input_ids
    wanted = iter([*ids, model.config.eos_token_id])
    pieces: list[str] = []
    monkeypatch.setattr(generate, "make_sampler", lambda options, seed: lambda ids, logits: next(wanted))
    result = generate.write(model, tokenizer, [5], GenerateSpec(), 0, pieces.append)
    assert "".join(pieces) == result.text == "🦄 kůň 🐎"
    assert "�" not in "".join(pieces)
    assert len(ids) > len(pieces)


def test_context_ends_the_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, temperature=0, max_new_tokens=500, json=True)
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


def _distribution(options: dict[str, object], used: list[int] | None = None) -> torch.Tensor:
    sampler = make_sampler(GenerateSpec(**{"temperature": 1.0, "top_p": 1.0, **options}), seed=0)
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    ids = torch.tensor([used or [3]])
    return torch.bincount(torch.tensor([sampler(ids, logits) for _ in range(4000)]), minlength=4) / 4000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.685, 0.247, 0.062, 0.007]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.75}, [0.625, 0.375, 0, 0]),
        ({"min_p": 0.25}, [0.526, 0.316, 0.158, 0]),
        ({"repetition_penalty": 2.0}, [0.525, 0.315, 0.158, 0.0026]),
    ],
)
def test_sampling_options(options: dict[str, object], expected: list[float]) -> None:
    torch.testing.assert_close(_distribution(options), torch.tensor(expected).float(), atol=0.025, rtol=0)


def test_chat_template_is_used_where_there_is_one(folder: Path) -> None:
    model, tokenizer = load_model(folder)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}:"
    assert tokenizer.decode(generate.encode_prompt(model, tokenizer, "hi")) == "<user>hi:"
    assert tokenizer.decode(generate.encode_prompt(model, tokenizer, "hi", chat=False)) == "hi"


def test_a_word_that_follows_the_prompt_keeps_its_space(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizers that mark spaces within words drop the first one of a text; the prompt is its beginning."""
    words = Tokenizer(models.WordLevel({"▁hello": 0, "▁world": 1}, unk_token="▁hello"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    model, _ = load_model(folder)
    monkeypatch.setattr(generate, "make_sampler", lambda options, seed: lambda ids, logits: 1)
    ids = generate.encode_prompt(model, tokenizer, "hello")
    assert generate.write(
        model, tokenizer, ids, GenerateSpec(max_new_tokens=2), 0, lambda text: None
    ).text == (" world world")


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "message"), [("", "empty"), ("x" * 400, "the model's context is 48")])
def test_prompts_that_do_not_fit(folder: Path, prompt: str, message: str) -> None:
    with pytest.raises(Failure, match=message):
        run(folder, prompt)


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


def shard_outside(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
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
    ],
)
def test_damaged_models_get_one_clear_line(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(Failure, match=message) as caught:
        load_model(copy)
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
    with pytest.raises(Failure, match="no such folder"):
        find_model("runs/absent")
    (tmp_path / "runs" / "started").mkdir(parents=True)
    with pytest.raises(Failure, match="holds no model"):
        find_model("runs/started")
    for name, age in (("old", 2), ("new", 1)):
        place = tmp_path / "runs" / name / "model"
        shutil.copytree(copy, place)
        os.utime(place / "config.json", (1e9 - age, 1e9 - age))
    assert find_model(None) == Path("runs/new/model")
    assert find_model("runs/old") == Path("runs/old/model")
    assert find_model("runs/old/model") == Path("runs/old/model")
    assert find_model(None, output=Path("runs/old")) == Path("runs/old/model")
