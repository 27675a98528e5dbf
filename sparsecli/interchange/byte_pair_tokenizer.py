"""Tokenizers of byte pairs (as GPT-2's) from a GGUF file's vocabulary, as `tokenizers` has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecli.console import Failure

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens, by GGUF's numbers."""
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS, SYMBOLS, SPACES = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
)


def _words(numbers: str) -> str:
    """How Llama 3 and its like cut a text into words: contractions, letters, `numbers`, symbols, spaces."""
    return "|".join((CONTRACTIONS, LETTERS, numbers, SYMBOLS, SPACES))


@dataclass(frozen=True)
class Splitting:
    """How a text is cut into the words within which pairs are merged.

    Attributes:
        pattern: of a word; without one GPT-2's, which `tokenizers` has.
        digits: whether every digit is a word.
        normal_form: whether the text is brought to Unicode's form C before.
        whole_words: whether a word that is a token stays whole, whatever the merges say.
    """

    pattern: str | None = None
    digits: bool = False
    normal_form: bool = False
    whole_words: bool = False


GPT2, DIGITS = Splitting(), Splitting(digits=True)
LLAMA3 = Splitting(_words(r"\p{N}{1,3}"), whole_words=True)
SPLITTINGS = {
    "default": GPT2,
    "gpt-2": GPT2,
    "phi-2": GPT2,
    "olmo": GPT2,
    "jina-v1-en": GPT2,
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "refact": DIGITS,
    "command-r": DIGITS,
    "codeshell": DIGITS,
    "exaone": DIGITS,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "smaug-bpe": LLAMA3,
    "dbrx": Splitting(_words(r"\p{N}{1,3}")),
    "olmo2": Splitting(_words(r"\p{N}{1,3}")),
    "qwen2": Splitting(_words(r"\p{N}"), normal_form=True),
    "stablelm2": Splitting(_words(r"\p{N}"), normal_form=True),
}
"""By what a GGUF file calls them (`tokenizer.ggml.pre`)."""


def build_byte_pair_tokenizer(
    tokens: Sequence[str], merges: Sequence[str], kinds: Sequence[int], splitting: Splitting
) -> Tokenizer:
    """The tokenizer; control tokens are special, user-defined ones are found in any text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(tokens)},
            pairs,  # type: ignore[arg-type]
            ignore_merges=splitting.whole_words,
        )
    )
    _split_text(backend, splitting)
    backend.decoder = decoders.ByteLevel()
    by_kind = {
        kind: [token for token, given in zip(tokens, kinds, strict=True) if given == kind]
        for kind in (CONTROL, USER_DEFINED)
    }
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in by_kind[CONTROL]]
    )
    backend.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in by_kind[USER_DEFINED]]
    )
    return backend


def _split_text(backend: Tokenizer, splitting: Splitting) -> None:
    """Set the normalizer and the pre-tokenizer."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    if splitting.normal_form:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if splitting.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitting.pattern:
        steps.append(pre_tokenizers.Split(Regex(splitting.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)


def splitting_of(name: object) -> Splitting:
    """The way that a GGUF file names.

    Raises:
        Failure: it is none that is known.
    """
    if not isinstance(name, str) or name not in SPLITTINGS:
        raise Failure(
            f"tokenizer.ggml.pre: {name!r} is not a way to cut texts that is known ({', '.join(SPLITTINGS)}); "
            "import the original checkpoint"
        )
    return SPLITTINGS[name]


SAMPLE = (
    "I'd say: we've GOT 1234567 items, they'LL cost $3.50... CamelCase HTTPServer's _names_ don't"
    "\n\n  \t two\u00a0spaces \r\n\n  e\u0301 x\u0301\u0323 \u4f60\u597d\uff0c\u4e16\u754c 12\u0663\u0664 "
    "\U0001f642!! //--->\n\tend  "
)
"""A text that every two ways to cut it, of those that a GGUF file may name, cut in different places."""


def _words_of(backend: Tokenizer) -> list[str]:
    """The words into which it cuts the sample."""
    text = backend.normalizer.normalize_str(SAMPLE) if backend.normalizer else SAMPLE
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else []


def name_of_splitting(backend: Tokenizer) -> str | None:
    """What a GGUF file calls the way in which a tokenizer cuts texts; None where it is none that is known."""
    from tokenizers import Tokenizer, models

    whole_words = json.loads(backend.to_str())["model"].get("ignore_merges", False)
    for name, splitting in SPLITTINGS.items():
        if (
            name == "default" or splitting.whole_words != whole_words
        ):  # what llama.cpp does by default is not GPT-2's
            continue
        known = Tokenizer(models.BPE())
        _split_text(known, splitting)
        if _words_of(known) == _words_of(backend):
            return name
    return None


def byte_pair_metadata(backend: Tokenizer, size: int) -> dict[str, Any]:
    """A tokenizer as the metadata of a GGUF file, below `tokenizer.ggml`, for a model of `size` tokens.

    Raises:
        Failure: it is not of byte pairs, has no merges, or cuts texts in a way that has no name there.
    """
    facts = json.loads(backend.to_str())
    model, decoder = facts["model"], facts.get("decoder") or {}
    if model.get("type") != "BPE" or decoder.get("type") != "ByteLevel" or model.get("byte_fallback"):
        raise Failure("is not byte-level BPE, which alone can be written to a GGUF file")
    if not model["merges"]:  # llama.cpp refuses such a file, and the package gguf to write an empty list
        raise Failure("has no merges, without which llama.cpp reads no byte-level BPE")
    name = name_of_splitting(backend)
    if name is None:
        raise Failure("cuts texts into words in a way that no GGUF file can name")
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    added = backend.get_added_tokens_decoder()
    for token, number in backend.get_vocab(with_added_tokens=True).items():
        if number < size:
            special = CONTROL if number in added and added[number].special else USER_DEFINED
            tokens[number], kinds[number] = token, special if number in added else NORMAL
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {"model": "gpt2", "pre": name, "tokens": tokens, "token_type": kinds, "merges": merges}


def write_byte_pair_tokenizer(backend: Tokenizer, settings: dict[str, Any], folder: Path) -> None:
    """Write it to `folder` as tokenizer.json and tokenizer_config.json.

    Args:
        settings: of a tokenizer_config.json; with `add_bos_token` the first token is put before every text.
    """
    from tokenizers.processors import ByteLevel, TemplateProcessing
    from tokenizers.processors import Sequence as Processors
    from transformers import PreTrainedTokenizerFast

    kept = {**settings}
    first = kept.get("bos_token") if kept.pop("add_bos_token", False) else None
    last = kept.get("eos_token") if kept.pop("add_eos_token", False) else None
    steps: list[Any] = [ByteLevel(trim_offsets=False)]
    if first or last:
        numbers = [(token, backend.token_to_id(token)) for token in (first, last) if token]
        template = " ".join(filter(None, (first, "$A", last)))
        steps.append(TemplateProcessing(single=template, special_tokens=numbers))
    backend.post_processor = Processors(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **kept)
    tokenizer.save_pretrained(folder)
