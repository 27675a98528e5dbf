"""Many prompts of a file, conversations, and log-probabilities."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsecli.console import Failure
from sparsecli.data.tokenization import load_or_train
from sparsecli.decode.native import binding
from sparsecli.generate.batch import generate_batch
from sparsecli.generate.command import generate
from sparsecli.generate.conversation import converse
from sparsecli.generate.decoder import DecoderOptions
from sparsecli.generate.native_decoder import NativeDecoder
from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM
from sparsecli.model.loading import load_model
from sparsecli.recipe.data import FilesCorpus
from sparsecli.recipe.schema import GenerateSpec

needs_native = pytest.mark.skipif(binding.available() is not None, reason=str(binding.available()))
BACKENDS = [pytest.param("native", marks=needs_native), "torch"]
WORDS = "def read_file(path):\n    return open(path).read()\n\nnaïve = 'žluťoučký kůň 🐎'\n"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
CONTEXT = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a chat template."""
    place = tmp_path_factory.mktemp("many") / "model"
    data = FilesCorpus(
        source="files", paths=["-"], tokenizer={"kind": "bpe", "vocabulary_size": 300}, sequence_length=16
    )
    tokenizer = load_or_train(data, [WORDS] * 3, place.parent / "cache")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = ScalingTransformerConfig(
        d_model=32, layers=2, heads=4, max_positions=CONTEXT,
        feed_forward={"kind": "sparse", "d_ff": 64, "block_size": 8, "rank": 4},
        vocabulary={"kind": "dense", "size": 300, "tied": True}, eos_token_id=7,
    )  # fmt: skip
    ScalingTransformerForCausalLM(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def single(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """`generate` for one prompt."""

    def answer(prompt: str, seed: int, template: bool = False, **sampling: Any) -> dict[str, Any]:
        decoder = DecoderOptions("native", threads=1)
        options = GenerateSpec(**sampling)
        generate(
            folder, prompt=prompt, options=options, decoder=decoder, seed=seed, template=template, json=True,
            top_logprobs=2,
        )  # fmt: skip
        return dict(json.loads(capsys.readouterr().out))

    return answer


def many(folder: Path, source: str, backend: str = "native", **sampling: Any) -> None:
    generate_batch(
        folder, source, options=GenerateSpec(**sampling), decoder=DecoderOptions(backend, threads=1), seed=3,
        template=False, size=3, top_logprobs=2,
    )  # fmt: skip


# -- files of prompts ----------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_prompts_of_a_file_are_continued_as_each_alone(
    folder: Path,
    tmp_path: Path,
    single: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    backend: str,
) -> None:
    prompts = [WORDS[start : start + 5 + 3 * start] for start in range(7)]
    lines = [json.dumps(prompts[0]), *(json.dumps({"prompt": p, "id": i}) for i, p in enumerate(prompts[1:]))]
    (tmp_path / "p.jsonl").write_text("\n\n".join(lines))
    sampling = {"max_new_tokens": 70, "temperature": 1.2, "stop": ["e"]}
    many(folder, str(tmp_path / "p.jsonl"), backend, **sampling)
    captured = capsys.readouterr()
    answers = [json.loads(line) for line in captured.out.splitlines()]
    assert [answer["prompt"] for answer in answers] == prompts
    assert [answer.get("id") for answer in answers] == [None, *range(6)]
    assert "7 prompts, " in captured.err
    assert len({answer["finish"] for answer in answers}) > 1
    for index, answer in enumerate(answers):
        alone = single(prompts[index], seed=3 + index, **sampling)
        assert {key: answer[key] for key in ("text", "tokens", "finish", "seed")} == {
            key: alone[key] for key in ("text", "tokens", "finish", "seed")
        }
        found = [[entry["logprob"] for entry in each["logprobs"]] for each in (answer, alone)]
        np.testing.assert_allclose(found[0], found[1], atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ('"fine"\nfine\n', r":2: expected a JSON string, or an object with a text as `prompt`"),
        ('"fine"\n\n{"text": "x"}', r":3: expected a JSON string"),
        ('{"prompt": ""}', ":1: the prompt is empty"),
        (json.dumps("x" * 500), r":1: the prompt has \d+ tokens, and the model's context of 96"),
    ],
)
def test_bad_lines_are_named(folder: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(Failure, match=message):
        many(folder, str(tmp_path / "p.jsonl"))


def test_bad_lines_of_stdin_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'"fine"\nfine\n')))
    with pytest.raises(Failure, match=r"^stdin:2: expected a JSON string"):
        many(folder, "-")


# -- log-probabilities ---------------------------------------------------------------------------------------


@needs_native
def test_logprobs_are_the_model_s(folder: Path, single: Callable[..., dict[str, Any]]) -> None:
    answer = single("def read", seed=1, temperature=0, max_new_tokens=6)
    model, tokenizer = load_model(folder)
    ids = [*tokenizer("def read").input_ids, *answer["tokens"]]
    with torch.inference_mode():
        rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)[-len(answer["tokens"]) - 1 : -1]
    for entry, token, row in zip(answer["logprobs"], answer["tokens"], rows, strict=True):
        assert entry["token"] == token == entry["top"][0]["token"]
        assert entry["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(2)
        assert [each["logprob"] for each in entry["top"]] == pytest.approx(best.values.tolist(), abs=1e-4)


# -- conversations -------------------------------------------------------------------------------------------


def talk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: str, backend: str = "native", **options: Any
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    given = {"system": None, "first": None, "seed": 5, "stats": False} | options
    sampling = GenerateSpec(temperature=1.0, max_new_tokens=8)
    converse(folder, options=sampling, decoder=DecoderOptions(backend, threads=1), **given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_conversation_goes_on_with_what_was_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    """Each answer is that to the whole chat, read anew."""
    talk(folder, monkeypatch, "read\n\npath\n/reset\nread\n/exit\nnever\n", backend, system="Be brief.")
    answers = capsys.readouterr().out
    chat, expected = "<system>Be brief.\n", ""
    for seed, message in ((5, "read"), (6, "path"), (7, None)):
        if message is None:
            chat, message = "<system>Be brief.\n", "read"
        chat += f"<user>{message}\n"
        generate(
            folder, prompt=chat + "<assistant>", options=GenerateSpec(temperature=1.0, max_new_tokens=8), seed=seed,
            decoder=DecoderOptions(backend, threads=1), template=False,
        )  # fmt: skip
        text = capsys.readouterr().out
        expected += text
        chat += f"<assistant>{text.removesuffix(chr(10))}\n"
    assert answers == expected


@needs_native
def test_only_new_tokens_of_a_conversation_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = []
    prefill = NativeDecoder.prefill

    def see(self: NativeDecoder, prompt: list[int], capacity: int) -> np.ndarray:
        prompts.append(prompt)
        return prefill(self, prompt, capacity)

    monkeypatch.setattr(NativeDecoder, "prefill", see)
    talk(folder, monkeypatch, "read\npath\n")
    assert len(prompts) == 1


def test_old_messages_are_left_out_of_a_full_context(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(folder, monkeypatch, "return path\n" * 6 + "x" * 300 + "\nreturn\n", "torch", stats=True)
    captured = capsys.readouterr()
    assert "the context is full: the oldest messages are left out" in captured.err
    assert "error: the message is too long for the context of 96 tokens" in captured.err
    assert captured.err.count("tokens/s") == 7


def test_an_interrupted_answer_does_not_end_the_conversation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsecli.generate import conversation

    whole, calls = conversation.generate_text, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            arguments[-1]("half")
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(conversation, "generate_text", interrupted)
    talk(folder, monkeypatch, "read\npath\n", "torch")
    assert capsys.readouterr().out.startswith("half\n")
    tokenizer = load_model(folder)[1]
    assert "<assistant>half" in tokenizer.decode(calls[1][3])


def test_models_without_a_template_hold_no_conversation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(Failure, match="the tokenizer has no chat template; --prompt continues a text"):
        talk(copy, monkeypatch, "x\n")
