"""The tokenizer that `generate` reads gives the ids of transformers, with chat templates too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sparsecli.console import Failure
from sparsecli.data.tokenization import train_byte_pairs
from sparsecli.generate import chat
from sparsecli.generate.chat import render
from sparsecli.generate.prompt import encode_chat
from sparsecli.model.tokenizer import Tokenizer, read_tokenizer

TEXT = "def read_file(path):\n    return open(path).read()\n\nnaïve = 'žluťoučký kůň 🐎'\n"
PROMPTS = ["def read", " a  b\n\n", "kůň 🐎 <|endoftext|> x", "a<|user|>b <mark> <mark>c", ""]
CHATML = (
    "{%- for message in messages %}\n"
    "  {{- '<|' + message.role + '|>' + message['content'] | trim + eos_token }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "json, loop controls, a namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if ns.n > 5 %}"
        "{% break %}{% endif %}{{ m | tojson }}{{ dict(a=1, é='ž') | tojson(indent=1) }}{% endfor %}{{ ns.n }}"
        "{{ tools is none }}{{ documents }}{{ pad_token }}{{ sep_token is defined }}"
    ),
    "training marks": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}x",
    "the year": "{{ strftime_now('%Y') }}",
}


def saved(folder: Path, template: object = None, **settings: object) -> PreTrainedTokenizerBase:
    """A tokenizer with added tokens in `folder`, and as transformers loads it."""
    made = train_byte_pairs(300, [TEXT] * 3)
    made.add_tokens([AddedToken("<mark>", lstrip=True), AddedToken("<|user|>", special=True)])
    made.add_special_tokens({"unk_token": "<unk>"})
    made.chat_template = template
    made.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("settings", [{}, {"sep_token": "<sep>"}])
def test_token_ids(tmp_path: Path, settings: dict[str, object]) -> None:
    expected = saved(tmp_path, **settings)
    tokenizer = read_tokenizer(tmp_path, 1000)
    assert len(tokenizer) == len(expected)
    for prompt in [*PROMPTS, "x<sep>y"]:
        ids = expected(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.encode(prompt) == ids


def test_a_limit_that_was_saved_cuts_no_prompt(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "tokenizer.json"
    limits = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation": limits}))
    assert len(read_tokenizer(tmp_path, 1000).encode(TEXT)) > 4


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_chats(tmp_path: Path, template: str) -> None:
    expected = saved(tmp_path, template)
    for prompt in ("hello <|user|>", " {{ x }} <b> 'é' "):
        chat = [{"role": "user", "content": prompt}]
        ids = expected.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert encode_chat(read_tokenizer(tmp_path, 1000), prompt) == ids


def test_of_several_templates_the_default_counts(tmp_path: Path) -> None:
    saved(tmp_path, {"default": CHATML, "tool_use": "other"})
    assert read_tokenizer(tmp_path, 1000).template == CHATML
    saved(tmp_path / "old", chat_template=[{"name": "default", "template": CHATML}])
    assert read_tokenizer(tmp_path / "old", 1000).template == CHATML
    saved(tmp_path / "oldest", chat_template=CHATML)
    assert read_tokenizer(tmp_path / "oldest", 1000).template == CHATML
    saved(tmp_path / "none")
    assert read_tokenizer(tmp_path / "none", 1000).template is None


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ raise_exception('only one turn') }}",
        "{{ messages[3].role }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ dict.__globals__['json'] }}",
        "{{ namespace(__html__=1) }}",
        "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].getcwd() }}",
        "{% include '/etc/passwd' %}",
        "{{ range(999999999) }}",
    ],
)
def test_templates_that_do_not_work_or_reach_out(template: str) -> None:
    with pytest.raises(Failure, match=r"the chat template fails: .*; --no-template leaves it out") as caught:
        render(template, [{"role": "user", "content": "x"}], {})
    assert len(caught.value.message.splitlines()) == 1


LONG = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWING = "{% set ns = namespace(x='xx') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LONG, "it takes longer than 1 s"),
        (GROWING, "it needs more than 1024 MiB of memory"),
        ("{{ 'x' * 10 ** 12 }}", "it needs more than 1024 MiB of memory"),
        ("{{ 'x' * 5000000 }}", "its text has 5000000 characters, more than 4194304"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "its recursion is too deep"),
        ("{{ '\ud800' }}\ud800", None),
    ],
)
def test_templates_without_end(template: str, message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 1.0 if template is LONG else 30.0)
    if message is None:
        assert render(template, [], {}) == "\ud800\ud800"
        return
    with pytest.raises(Failure, match=f"the chat template fails: {message}; --no-template leaves it out"):
        render(template, [{"role": "user", "content": "x"}], {})


def test_a_prompt_that_is_no_text(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(Failure, match="the text is not UTF-8 text"):
        read_tokenizer(tmp_path, 1000).encode("a\udcff")


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    saved(tmp_path, CHATML)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff{{ x }}")
    with pytest.raises(Failure, match=r"chat_template\.jinja: does not load: byte 0 is not UTF-8 text"):
        read_tokenizer(tmp_path, 1000)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"eos_token": "\\ud800"}', "\udcff"])
def test_settings_that_are_no_settings(content: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(Failure, match=r"tokenizer_config\.json: does not load: ") as caught:
        read_tokenizer(tmp_path, 1000)
    assert len(caught.value.message.splitlines()) == 1


def test_damaged_settings_get_one_clear_line(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(Failure, match=r"tokenizer_config\.json: does not load"):
        read_tokenizer(tmp_path, 1000)


def test_text_comes_character_by_character(tmp_path: Path) -> None:
    saved(tmp_path)
    tokenizer: Tokenizer = read_tokenizer(tmp_path, 1000)
    ids = [*tokenizer.encode("ab 🐎"), *tokenizer.end, *tokenizer.encode("c")]
    stream = tokenizer.stream(tokenizer.encode("x"))
    pieces = [stream.feed(token) for token in ids]
    assert "".join(pieces) == "ab 🐎c"
    assert "�" not in "".join(pieces)


def byte_fallback() -> Tokenizer:
    """Words that mark their spaces, and a token for every byte of what is none of them."""
    words = {"▁a": 0, "b": 1, "▁": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    backend = tokenizers.Tokenizer(models.BPE(words, [], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_a_replacement_character_is_text_like_any_other(kind: str, tmp_path: Path) -> None:
    """It is also how bytes read that are no text; those of an unfinished character wait."""
    if kind == "byte level":
        saved(tmp_path)
    tokenizer = read_tokenizer(tmp_path, 1000) if kind == "byte level" else byte_fallback()
    stream = tokenizer.stream(tokenizer.encode("b�"))
    pieces = [stream.feed(token) for token in tokenizer.encode("b�")]
    assert [*filter(None, pieces)] == ["b", "�"]
    assert stream.flush() == ""
    horse = tokenizer.encode("🐎")
    assert len(horse) > 2
    assert [stream.feed(token) for token in horse[:-1]] == [""] * (len(horse) - 1)
    assert stream.flush() == ""


def test_what_stands_before_an_unfinished_character_is_text() -> None:
    """A token may hold more than the first bytes of a character."""
    backend = tokenizers.Tokenizer(models.BPE({"aâ": 0, "b": 1}, []))
    backend.decoder = decoders.ByteLevel()
    stream = Tokenizer(backend).stream([1])
    assert (stream.feed(0), stream.flush()) == ("", "a")
