"""A model's tokenizer as `generate` needs it: the same token ids as in transformers, without importing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from sparsecli.console import Failure, warn_once
from sparsecli.model.chat import render
from sparsecli.model.folder import last_line, read_json

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
FILES = (TOKENIZER, SETTINGS, TEMPLATE, "special_tokens_map.json")
"""Everything that belongs to a tokenizer; all but the first may be missing."""

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: the vocabulary and its rules.
        named: the text of each special token that has a name, such as `eos_token`.
        template: Jinja source that lays a chat out as text, or None.
        vocabulary: tokens of the model; None allows any.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        named: Mapping[str, str] | None = None,
        template: str | None = None,
        vocabulary: int | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.named = dict(named or {})
        self.template = template
        self.vocabulary = vocabulary
        known = backend.get_vocab(with_added_tokens=True)
        backend.add_special_tokens([token for token in self.named.values() if token not in known])

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text` as it stands: nothing is put before or behind it, as with the training text.

        With `special` the tokenizer adds what it has for that, such as Llama's first token.

        Raises:
            Failure: the text is no Unicode, or has a token that the model does not have.
        """
        try:
            encoded = self.backend.encode(text, add_special_tokens=special)
        except TypeError as error:  # halves of characters, which stand for bytes on the command line
            raise Failure("the text is not UTF-8 text") from error
        if self.vocabulary is not None:
            for token, name in zip(encoded.ids, encoded.tokens, strict=True):
                if token >= self.vocabulary:
                    raise Failure(f"the text has the token {name!a}, which the model has not; leave it out")
        return list(encoded.ids)

    def encode_chat(self, message: str) -> list[int]:
        """Token ids of a chat in which the user has said `message` and the answer begins.

        Raises:
            Failure: the tokenizer has no chat template, or the template does not work.
        """
        if self.template is None:
            raise Failure("the tokenizer has no chat template")
        return self.encode(render(self.template, [{"role": "user", "content": message}], self.named))

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """Turns tokens that follow `prompt` into text, one at a time."""
        return TextStream(self.backend, prompt)


class TextStream:
    """Text of one token after the other; a character appears once all of its bytes are there.

    The prompt decides how the first token reads, for instance whether a space stands before it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, prompt: Sequence[int]) -> None:
        self.backend = backend
        self.decoder = DecodeStream(ids=list(prompt), skip_special_tokens=True)

    def feed(self, token: int) -> str:
        """The text that `token` completes; empty within a character and for special tokens."""
        return self.decoder.step(self.backend, token) or ""


def read_tokenizer(folder: Path, vocabulary: int) -> Tokenizer:
    """The tokenizer saved in `folder`, for a model of `vocabulary` tokens.

    Raises:
        Failure: there is none, it does not load, or it is not made for so many tokens (see `check_fit`).
    """
    check_tokenizer(folder)
    path = folder / TOKENIZER
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for a damaged file
        raise Failure(f"{path}: does not load: {last_line(error)}") from error
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    backend.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    named = {name: text for name in NAMED_TOKENS if (text := _token_text(settings.get(name)))}
    template = _template(folder, settings)
    try:
        tokenizer = Tokenizer(backend, named, template, vocabulary)
    except (ValueError, TypeError) as error:  # a name that is no text
        raise Failure(f"{folder / SETTINGS}: does not load: {last_line(error)}") from error
    check_fit(folder, backend, vocabulary)
    return tokenizer


def check_tokenizer(folder: Path) -> None:
    """Raise Failure where there is no tokenizer in `folder`."""
    if not (folder / TOKENIZER).is_file():
        raise Failure(f"{folder}: no {TOKENIZER}; the tokenizer belongs beside the model")


def check_fit(folder: Path, backend: tokenizers.Tokenizer, vocabulary: int) -> None:
    """Compare the tokens of a tokenizer with the model's `vocabulary`; a warning names special ones beyond it.

    A text has those, such as a padding token that was added later, only where it spells them, which `Tokenizer.encode`
    refuses.

    Raises:
        Failure: other tokens lie beyond it.
    """
    ordinary, special = beyond(backend, vocabulary)
    if ordinary:
        tokens = backend.get_vocab_size()
        raise Failure(
            f"{folder}: the tokenizer has {tokens} tokens, the model {vocabulary}; they do not belong together"
        )
    if special:
        more = f" and {len(special) - 3} more" if len(special) > 3 else ""
        warn_once(
            f"{folder}: the tokenizer has {', '.join(map(ascii, special[:3]))}{more} beyond the model's {vocabulary} "
            "tokens; a text with such a token is refused"
        )


def beyond(backend: tokenizers.Tokenizer, vocabulary: int) -> tuple[list[str], list[str]]:
    """Ordinary and special tokens whose numbers are not below `vocabulary`."""
    found = sorted(token for token, index in backend.get_vocab().items() if index >= vocabulary)
    named = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    return [token for token in found if token not in named], [token for token in found if token in named]


def _token_text(value: object) -> str | None:
    """A token's text; settings hold it as such, or in a block with its rules."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own, or a setting, which may be a list of named ones."""
    if (folder / TEMPLATE).is_file():
        try:
            return (folder / TEMPLATE).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            place = f"byte {error.start} is not UTF-8 text"
            raise Failure(f"{folder / TEMPLATE}: does not load: {place}") from error
    held = settings.get("chat_template")
    if isinstance(held, list):
        named = {one.get("name"): one.get("template") for one in held if isinstance(one, dict)}
        held = named.get("default")
    return held if isinstance(held, str) else None
