"""Tokenizers of byte pairs (as GPT-2's) from a GGUF file's vocabulary, as `tokenizers` has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecli.console import Failure

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTROL, USER_DEFINED = 3, 4
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
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(tokens)},
            pairs,  # type: ignore[arg-type]
            ignore_merges=splitting.whole_words,
        )
    )
    if splitting.normal_form:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if splitting.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitting.pattern:
        steps.append(pre_tokenizers.Split(Regex(splitting.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
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
