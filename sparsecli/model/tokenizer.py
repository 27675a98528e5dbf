"""A model's tokenizer as `generate` needs it: the same token ids as in transformers, without importing it."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from sparsecli.console import Failure, warn_once
from sparsecli.model.files import last_line, read_json

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
GGUF_METADATA = "tokenizer.gguf"
"""A GGUF file without tensors: the metadata of that from which a tokenizer comes."""
FILES = (TOKENIZER, SETTINGS, TEMPLATE, "special_tokens_map.json", GGUF_METADATA)
"""Everything that belongs to a tokenizer; all but the first may be missing."""

REPLACEMENT = "\ufffd"
_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PLAIN]
BYTE_LETTERS = {chr(byte): byte for byte in _PLAIN} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
"""The letters that stand for bytes in vocabularies of byte-level BPE."""

BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
"""A byte in vocabularies of SentencePiece."""

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
        added = backend.get_added_tokens_decoder().items()
        self.special = {token: entry.content for token, entry in added if entry.special}
        """The text of each special token, by its id."""
        decoder = b"" if backend.decoder is None else backend.decoder.__getstate__()
        self.byte_level, self.byte_fallback = (
            kind in decoder for kind in (b'"ByteLevel"', b'"ByteFallback"')
        )

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def end(self) -> set[int]:
        """Its end token, if it names one."""
        token = self.backend.token_to_id(self.named.get("eos_token", ""))
        return set() if token is None else {token}

    def encode(self, text: str, special: bool = False, names_are_text: bool = True) -> list[int]:
        """Token ids of `text`.

        Args:
            text: as it stands; nothing is put before or behind it, as with the training text.
            special: add the tokens that the tokenizer puts around a text, such as Llama's first token.
            names_are_text: the name of a special token within the text is text, not that token.

        Raises:
            Failure: the text is not Unicode, or has a token that the model does not have.
        """
        return list(self._encode(text, special, names_are_text).ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of `text` as it stands, and the characters of the text from and up to which each goes.

        Tokens that share a character both include it.

        Raises:
            Failure: see `encode`.
        """
        encoded = self._encode(text, special=False, names_are_text=True)
        return list(encoded.ids), list(encoded.offsets)

    @property
    def beginning(self) -> list[int]:
        """What it puts before every text where special tokens are added, such as Llama's first token."""
        text = "a"
        plain, whole = self.encode(text), self.encode(text, special=True)
        return next(whole[:size] for size in range(len(whole)) if whole[size : size + len(plain)] == plain)

    def _encode(self, text: str, special: bool, names_are_text: bool) -> tokenizers.Encoding:
        self.backend.encode_special_tokens = names_are_text
        try:
            encoded = self.backend.encode(text, add_special_tokens=special)
        except TypeError as error:  # halves of characters, which stand for bytes on the command line
            raise Failure("the text is not UTF-8 text") from error
        if self.vocabulary is not None:
            for token, name in zip(encoded.ids, encoded.tokens, strict=True):
                if token >= self.vocabulary:
                    raise Failure(f"the text has the token {name!a}, which the model has not; leave it out")
        return encoded

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for within a text; for a special token its name."""
        text = self.backend.id_to_token(token) or ""
        if token in self.special:
            return text.encode()
        if self.byte_level and all(letter in BYTE_LETTERS for letter in text):
            return bytes(BYTE_LETTERS[letter] for letter in text)
        if self.byte_fallback and (byte := BYTE_TOKEN.fullmatch(text)):
            return bytes([int(byte[1], 16)])
        return text.replace("\u2581", " ").encode()  # SentencePiece's sign for a space

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """Turns tokens that follow `prompt` into text, one at a time."""
        return TextStream(self, prompt)


class TextStream:
    """Text of one token after the other; a character appears once all of its bytes are there.

    The prompt decides how the first token reads, for instance whether a space stands before it. Bytes that are no
    UTF-8 read as U+FFFD, and so does that character itself: only the bytes tell whether one is unfinished.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.backend, self.special = tokenizer.backend, tokenizer.special
        self.byte_level, self.byte_fallback = tokenizer.byte_level, tokenizer.byte_fallback
        self.context, self.since = list(prompt), list[int]()  # tokens before those that are not shown yet
        self.bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that `token` completes; empty within a character and for special tokens."""
        if token in self.special:
            return ""
        self.since.append(token)
        return "" if self._unfinished(token) else self._text()

    def flush(self) -> str:
        """What stands before a character that was left unfinished."""
        return self._text().removesuffix(REPLACEMENT) if self.since and self.byte_level else ""

    def _text(self) -> str:
        shown = self.backend.decode(self.context, skip_special_tokens=True)
        text = self.backend.decode(self.context + self.since, skip_special_tokens=True)
        self.context, self.since = self.since, []
        return text[len(shown) :]

    def _unfinished(self, token: int) -> bool:
        """Whether bytes of a character are missing behind `token`."""
        text = self.backend.id_to_token(token) or ""
        if self.byte_level:
            known = all(letter in BYTE_LETTERS for letter in text)
            self.bytes.decode(bytes(BYTE_LETTERS[letter] for letter in text) if known else text.encode())
        elif self.byte_fallback and (byte := BYTE_TOKEN.fullmatch(text)):
            self.bytes.decode(bytes.fromhex(byte[1]))
        else:
            self.bytes.reset()
        return bool(self.bytes.getstate()[0])


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
