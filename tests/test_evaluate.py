"""The `evaluate` command: its losses by hand and in both backends, differences of two models, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from foreign_models import MODELS, build, save
from tokenizers import models, pre_tokenizers
from torch.nn import functional as F

from sparsecli import pack
from sparsecli.console import Failure
from sparsecli.data.tokenization import train_byte_pairs
from sparsecli.decode.native import binding
from sparsecli.evaluate import command
from sparsecli.evaluate.result import Scored, paired_by_text, paired_by_window
from sparsecli.evaluate.text import TokenizedText, tokenize
from sparsecli.generate.decoder import DecoderOptions
from sparsecli.interchange import kept_imports
from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM
from sparsecli.model.loading import load_model
from sparsecli.model.tokenizer import Tokenizer, read_tokenizer
from sparsecli.recipe.loader import load

needs_native = pytest.mark.skipif(binding.available() is not None, reason=str(binding.available()))
BACKENDS = [pytest.param("native", marks=needs_native), "torch"]
TEXT = "def read_file(path):\n    return open(path).read()\n\nnaïve = 'žluťoučký kůň 🐎'\n" * 6
SIZES = {"d_model": 32, "layers": 2, "heads": 4, "max_positions": 48}


def save_model(folder: Path, vocabulary: int, seed: int = 0, size: int = 300, **fields: Any) -> Path:
    """A tiny random model with a tokenizer of `vocabulary` tokens."""
    tokenizer = train_byte_pairs(vocabulary, [TEXT])
    torch.manual_seed(seed)
    config = ScalingTransformerConfig(
        **SIZES | fields,
        feed_forward={"kind": "sparse", "d_ff": 64, "block_size": 8, "rank": 4},
        vocabulary={"kind": "dense", "size": size, "tied": True},
        eos_token_id=tokenizer.eos_token_id,
    )
    model = ScalingTransformerForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from a uniform distribution
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def foreign(name: str, folder: Path) -> Path:
    """A small Hugging Face folder."""
    kind, fields = MODELS[name]
    return save(build(kind, **fields), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), 300)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def run(
    model: Path | str | None, text: Path | None, loaded: Any = None, **options: Any
) -> command.Evaluation:
    names = ("backend", "dtype", "cache_dtype", "threads", "keep")
    decoder = DecoderOptions(**{key: options.pop(key) for key in names if key in options})
    defaults: dict[str, Any] = {
        **{"text_field": "text", "window": None, "tokens": None, "against": None, "against_dtype": None},
        "json": False,
    }
    given = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    model, text = (value if value is None else str(value) for value in (model, text))
    return command.run(loaded, model=model, text=text, decoder=decoder, **defaults | given)


# -- losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_is_the_cross_entropy(folder: Path, text: Path, backend: str) -> None:
    """By hand: windows of 20 tokens, the mean over all tokens but the first of each."""
    found = run(folder, text, window=20, backend=backend, threads=1).loss
    model, tokenizer = load_model(folder)
    ids = torch.tensor([*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id])
    windows = ids[: len(ids) // 20 * 20].view(-1, 20)
    with torch.no_grad():
        chances = model(windows).logits[:, :-1].double().softmax(-1)
    nats = -chances.gather(-1, windows[:, 1:, None]).log().mean().item()
    assert found.nats_per_token == pytest.approx(nats, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats), rel=1e-5)
    assert (found.windows, found.tokens) == (len(windows), 19 * len(windows))
    assert (found.backend, found.dtype, found.threads) == (backend, "float32", 1)
    size = len(tokenizer.decode(windows.flatten()).removesuffix("<|endoftext|>").encode())
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) * windows.numel() / size, rel=0.01)


@needs_native
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_imported_models_read_the_same_in_both_backends(tmp_path: Path, text: Path, kind: str) -> None:
    """A Hugging Face folder as it is; it is imported for the time."""
    foreign(kind, tmp_path / "theirs")
    losses = [run(tmp_path / "theirs", text, backend=backend).loss for backend in ("native", "torch")]
    assert losses[0].nats_per_token == pytest.approx(losses[1].nats_per_token, abs=1e-5)
    assert losses[0].bits_per_byte == pytest.approx(losses[1].bits_per_byte, abs=1e-5)


def test_a_foreign_model_is_imported_once(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    theirs, cache = foreign("llama", tmp_path / "theirs"), tmp_path / "cache" / "sparsecli"
    once = run(theirs, text, backend="torch").loss
    assert not cache.exists()  # it took no time
    monkeypatch.setattr(kept_imports, "KEEP_AFTER", -1.0)
    assert run(theirs, text, backend="torch", keep=False).loss == once
    assert not cache.exists()
    assert run(theirs, text, backend="torch").loss == once
    [kept] = cache.iterdir()
    assert kept.name in capsys.readouterr().err.replace("\n", "")
    written = (kept / "config.json").stat().st_mtime_ns
    assert run(theirs, text, backend="torch").loss == once
    assert (kept / "config.json").stat().st_mtime_ns == written  # not imported again
    (kept / "model.safetensors").write_bytes(b"")
    assert run(theirs, text, backend="torch").loss == once
    assert (kept / "model.safetensors").stat().st_size
    shutil.rmtree(theirs)
    foreign("qwen2", theirs)  # another one at the same place
    assert run(theirs, text, backend="torch").loss != once
    [other] = cache.iterdir()
    assert other != kept


@needs_native
def test_the_length_of_a_window_decides_on_rotary_frequencies(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign("phi3, longrope", tmp_path / "theirs")
    monkeypatch.setattr("sparsecli.evaluate.losses.LOGITS_AT_ONCE", 300 * 7)
    losses = [run(tmp_path / "theirs", text, backend=backend).loss for backend in ("native", "torch")]
    assert losses[0].nats_per_token == pytest.approx(losses[1].nats_per_token, abs=1e-5)


@needs_native
def test_long_windows_are_read_in_pieces(folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(folder, text).loss
    monkeypatch.setattr("sparsecli.evaluate.losses.LOGITS_AT_ONCE", 300 * 7)
    assert run(folder, text).loss == whole
    assert whole.windows * 47 == whole.tokens  # as long as the context


def test_a_run_has_the_loss_that_training_reported(
    finished: tuple[Path, Any], recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same held-out text, in windows of the same length."""
    output, result = finished
    for loaded in (None, load(str(recipe_file), [f"output={output}"])):
        model = output if loaded is None else None
        found = run(model, None, loaded, window=16, backend="torch").loss
        assert found.nats_per_token == pytest.approx(result.held_out_loss, rel=1e-6)
        assert found.bits_per_byte == pytest.approx(result.bits_per_byte, rel=0.01)


def test_windows_of_an_imported_model_begin_as_its_texts(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign("llama", tmp_path / "theirs")
    monkeypatch.setattr(Tokenizer, "beginning", [7])
    found = run(tmp_path / "theirs", text, window=9, backend="torch").loss
    assert found.tokens == 8 * found.windows
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(str(tmp_path / "theirs" / "tokenizer.json")))
    stream = tokenize(tokenizer, [TEXT])
    assert found.windows == len(stream.tokens) // 8
    windows = torch.from_numpy(stream.tokens[: found.windows * 8].reshape(-1, 8))
    windows = torch.cat((torch.full((len(windows), 1), 7), windows), dim=1)
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        logits = theirs(windows).logits[:, :-1]
    expected = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), windows[:, 1:].reshape(-1))
    assert found.nats_per_token == pytest.approx(expected.item(), abs=1e-5)


# -- text ----------------------------------------------------------------------------------------------------


def test_rows_and_limits(folder: Path, tmp_path: Path) -> None:
    """Each row is a document, which the end-of-text token follows."""
    rows = [{"body": TEXT}, {"body": "import os\n" * 9}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    whole = run(folder, path, text_field="body", backend="torch").loss
    tokenizer = read_tokenizer(folder, 300)
    ids = [token for row in rows for token in [*tokenizer.encode(row["body"]), *tokenizer.end]]
    assert whole.windows == len(ids) // 48
    assert run(folder, path, text_field="body", tokens=100, backend="torch").loss.windows == 2
    with pytest.raises(Failure, match=r"no column 'text'; it has body \(set --text-field\)"):
        run(folder, path)


@pytest.mark.parametrize("documents", [["a", "bč🐎", "\n\nx  "], [TEXT, "🐎" * 3]])
def test_ends_of_tokens_are_bytes_of_the_text(documents: list[str]) -> None:
    tokenizer = Tokenizer(train_byte_pairs(300, [TEXT]).backend_tokenizer, {"eos_token": "<|endoftext|>"})
    stream = tokenize(tokenizer, documents)
    assert len(stream.tokens) == len(stream.ends)
    assert (np.diff(stream.ends) >= 0).all()
    whole = "".join(documents).encode()
    assert stream.ends[-1] == len(whole)
    for at in range(1, len(stream.tokens)):
        if stream.ends[at] > stream.ends[at - 1]:  # a character ends behind the tokens before
            text = tokenizer.backend.decode(stream.tokens[:at].tolist(), skip_special_tokens=True)
            assert text.encode() == whole[: stream.ends[at - 1]]
    half = tokenize(tokenizer, documents, bytes=int(stream.ends[2]))
    assert half.ends[-1] == stream.ends[2]
    assert len(tokenize(tokenizer, documents, tokens=2).tokens) == 2


# -- differences ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_models_of_one_tokenizer_are_paired_by_window(
    folder: Path, text: Path, tmp_path: Path, backend: str
) -> None:
    other = save_model(tmp_path / "other", 300, seed=1, size=310)
    found = run(folder, text, against=other, backend=backend, window=24)
    assert found.against
    assert found.difference
    assert found.difference.unit == "nats/token"
    difference = found.loss.nats_per_token - found.against.nats_per_token
    assert found.difference.value == pytest.approx(difference, abs=1e-9)
    assert found.difference.windows == found.loss.windows > 3
    assert found.difference.standard_error


@needs_native
def test_a_model_against_itself_in_another_type(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    pack.run(model=str(folder), output=packed, dtype="bfloat16")
    found = run(folder, text, against=folder, against_dtype="int8", json=True)
    shown = json.loads(capsys.readouterr().out)
    assert found.against
    assert (shown["dtype"], shown["against"]["dtype"]) == ("float32", "int8")
    assert 0 < abs(shown["difference"]["value"]) < 1
    assert shown["difference"]["perplexity_increase"] == pytest.approx(
        math.expm1(shown["difference"]["value"])
    )
    other = run(packed, text, against=packed / "model.spk", cache_dtype="int8", threads=1)
    assert other.against
    assert other.difference
    assert (other.loss.dtype, other.against.dtype, other.against.cache_dtype) == (
        "bfloat16",
        "bfloat16",
        "int8",
    )
    assert (other.difference.value, other.difference.standard_error) == (0, 0)
    assert "difference: +0.0000 ± 0.0000 nats/token, +0.00%" in capsys.readouterr().out


def test_models_of_different_tokenizers_are_compared_by_bytes(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_model(tmp_path / "other", 280, seed=1)
    found = run(folder, text, against=other, backend="torch", window=32)
    assert found.against
    assert found.difference
    assert found.difference.unit == "bits/byte"
    assert found.difference.bytes
    assert 0.7 * len(TEXT.encode()) < found.difference.bytes <= len(TEXT.encode())
    rough = found.loss.bits_per_byte - found.against.bits_per_byte
    assert found.difference.value == pytest.approx(rough, abs=0.15 * found.loss.bits_per_byte)
    captured = capsys.readouterr()
    assert "read the text as different tokens" in captured.err
    assert "bits/byte, over" in captured.out


def scored(losses: list[list[float]], ends: list[int], stride: int) -> Scored:
    return Scored(np.array(losses), TokenizedText(np.arange(len(ends)), np.array(ends)), stride)


def test_differences_by_bytes_by_hand() -> None:
    """Ten bytes. The first tokens of the windows of the first model are not predicted: bytes 0 to 2 and 5 to 6."""
    one = scored([[1.0, 2.0], [3.0, 4.0]], [2, 4, 5, 6, 8, 10], 3)
    two = scored([[9.0, 0.5, 1.0, 2.5, 0.25]], [2, 4, 6, 8, 10], 5)  # one token before the text
    assert two.bits_per_byte == pytest.approx(13.25 / 5 / math.log(2) / 2)
    found = paired_by_text(one, two)
    # common cuts: 0, 2, 4, 6, 8, 10; both predict 2..4, 6..8 and 8..10
    bits = np.array([1.0 - 0.5, 3.0 + 4.0 - 2.5 - 0.25]) / math.log(2)
    assert (found.bytes, found.windows) == (6, 2)
    assert found.value == pytest.approx(bits.sum() / 6)
    rest = bits - found.value * np.array([2, 4])
    assert found.standard_error == pytest.approx(math.sqrt((rest**2).sum() / 2) / 3)
    assert paired_by_text(one, one).value == 0
    with pytest.raises(Failure, match="no piece of the text in common"):
        paired_by_text(one, scored([[1.0]], [3, 10], 2))


def test_differences_by_window_by_hand() -> None:
    one, two = (
        scored([[1.0, 2.0], [3.0, 5.0]], [1, 2, 3, 4], 2),
        scored([[1.0, 1.0], [1.0, 2.0]], [1, 2, 3, 4], 2),
    )
    found = paired_by_window(one, two)
    assert (found.value, found.windows) == (1.5, 2)
    assert found.standard_error == pytest.approx(np.std([0.5, 2.5], ddof=1) / math.sqrt(2))
    assert paired_by_window(scored([[1.0]], [1], 1), scored([[1.0]], [1], 1)).standard_error is None


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        ({"window": 49}, "--window: 49 is longer than the context of 48 tokens", 2),
        ({"tokens": 40}, "40 tokens do not fill one window of 48; give more text or lower --window", 1),
        ({"text": None}, "--text: missing; give --text FILE", 2),
        ({"text": "nowhere.txt"}, "--text: no file matches nowhere.txt", 1),
        ({"model": "nowhere/at/all"}, "nowhere/at/all: no such file or folder", 1),
        ({"dtype": "int8", "backend": "torch"}, "--dtype int8: only the native backend", 1),
    ],
)
def test_one_line_says_what_is_wrong(
    folder: Path, text: Path, options: dict[str, Any], message: str, code: int
) -> None:
    with pytest.raises(Failure, match=message) as caught:
        run(**{"model": folder, "text": text, **options})
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)


def test_models_with_an_encoder_are_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    fields = json.loads((copy / "config.json").read_text())
    encoder = {"layers": 1, "max_positions": 8}
    fields |= {"model_type": "scaling_transformer_encoder_decoder", "encoder": encoder}
    (copy / "config.json").write_text(json.dumps(fields))
    with pytest.raises(Failure, match="has an encoder; evaluate reads running text"):
        run(copy, text)


def test_damaged_weights_are_noticed() -> None:
    with pytest.raises(Failure, match="the loss is nan nats/token"):
        scored([[math.nan, 1.0]], [1, 2, 3], 3)


def test_words_of_one_token(tmp_path: Path) -> None:
    """A tokenizer that leaves spaces to no token."""
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    stream = tokenize(Tokenizer(words), ["a  b ", "a"])
    assert stream.ends.tolist() == [1, 5, 6]
