"""Tokenizers: a byte-level BPE trained on the corpus, a saved one, or one from the hub."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecli.console import Failure, RecipeError, say, warn
from sparsecli.data.cache import cache_folder, digest, write_folder
from sparsecli.data.places import tokenizer_folder
from sparsecli.recipe.data import CorruptedPairs, TextSpec, TrainedTokenizer
from sparsecli.spec.vocabulary import END, PADDING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAIR_TOKENS = ("<pad>", "</s>")
"""Padding and end of text for models with an encoder. They come first in the vocabulary, as in T5's."""
FORMAT = "bpe-2"
"""Part of the cache key. A change of the training below needs a new version."""
WORDS = r"\p{Lu}?\p{Ll}+|\p{Lu}+(?!\p{Ll})|\d|_+|\s+|[^\p{L}\d_\s]+"
"""Matches the words of names and sentences, and the characters between them."""
PIECE = 1 << 20
"""Characters per call of a tokenizer, which needs some 250 bytes of memory for each of their tokens."""


def sentinel(index: int) -> str:
    """The sentinel token for removed span number `index` of a text, named as in T5's vocabulary."""
    return f"<extra_id_{index}>"


def load_or_train(
    data: TextSpec, train_documents: Sequence[str], cache_dir: Path | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer that `data.tokenizer` names; a `bpe` one is trained on `train_documents` alone.

    Its end-of-text token separates documents, and also pads where the tokenizer has no padding of its own. A
    tokenizer for pairs has padding 0, end of text 1, and a sentinel for every span that may be removed. Code that
    comes with a tokenizer is never run. Raises `Failure` when the tokenizer cannot be loaded or is not made for pairs.
    """
    spec = data.tokenizer
    if spec is None:
        raise RecipeError("data.tokenizer: missing; name the tokenizer to read the text with")
    sentinels = data.pairs.counts().spans if isinstance(data.pairs, CorruptedPairs) else 0
    special = (*PAIR_TOKENS, *map(sentinel, range(sentinels))) if data.pairs else (END_OF_TEXT,)
    if spec.kind == "bpe":
        return _cached_byte_pairs(spec, special, train_documents, cache_dir)
    if spec.kind == "saved":
        folder = tokenizer_folder(spec)
        key, loaded = "data.tokenizer.path", _pretrained(str(folder), None, "data.tokenizer.path", local=True)
    else:
        key = "data.tokenizer.name"
        loaded = _pretrained(spec.name, spec.revision, key, local=False)
    if data.pairs:
        _check_pairs(loaded, special[len(PAIR_TOKENS) :], key)
    _check_knows(loaded, train_documents, key)
    return loaded


def _check_knows(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], key: str) -> None:
    """Refuse a tokenizer that is not made for text, such as that of the copy task's symbols."""
    backend = tokenizer.backend_tokenizer
    unknown = backend.token_to_id(getattr(backend.model, "unk_token", None) or "")
    tokens = [token for ids in encode(tokenizer, [text[:2000] for text in documents[:8]]) for token in ids]
    known = sum(token != unknown for token in tokens)
    if 2 * known < len(tokens):
        raise Failure(
            f"{key}: the tokenizer knows {known} of the first {len(tokens)} words of the text; use one that was "
            f"trained on such text"
        )


def _check_pairs(tokenizer: PreTrainedTokenizerFast, sentinels: Sequence[str], key: str) -> None:
    found = tokenizer.pad_token_id, tokenizer.eos_token_id
    if found != (PADDING, END):
        raise Failure(
            f"{key}: pairs need padding {PADDING} and end of text {END}, as in T5's tokenizers; this one has "
            f"{found[0]} and {found[1]}"
        )
    known = tokenizer.get_vocab()
    if missing := [token for token in sentinels if token not in known]:
        raise Failure(
            f"{key}: has no token {missing[0]}; span corruption needs {len(sentinels)} sentinels; "
            f"use a tokenizer of T5 or one of kind bpe"
        )


def train_byte_pairs(
    vocabulary_size: int,
    documents: Sequence[str],
    special_tokens: Sequence[str] = (END_OF_TEXT,),
    *,
    split_names: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary_size` tokens. Decoding restores any UTF-8 text exactly.

    The special tokens come first. If they begin with `PAIR_TOKENS`, every text ends with the end token, as in T5. With
    `split_names` tokens end at the words of a name, and no token joins a word with the space before it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split_names:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in documents for piece in pieces(text)), trainer)
    if tuple(special_tokens[: len(PAIR_TOKENS)]) == PAIR_TOKENS:
        return for_pairs(tokenizer, special_tokens[len(PAIR_TOKENS) :])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def for_pairs(tokenizer: Tokenizer, sentinels: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """`tokenizer`, with `PAIR_TOKENS` and `sentinels`, for transformers. It ends every text with the end token."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    padding, end = PAIR_TOKENS
    tokenizer.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=padding,
        additional_special_tokens=list(sentinels),
        clean_up_tokenization_spaces=False,
    )


def beginning(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The special tokens that the tokenizer puts before a text, such as Llama's first token; often none."""
    text = "a"
    (plain,), whole = _encode(tokenizer, [text]), tokenizer(text)["input_ids"]
    return next(list(whole[:size]) for size in range(len(whole)) if whole[size : size + len(plain)] == plain)


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> Iterator[list[int]]:
    """Token ids of each document. The name of a special token in a text is plain text here.

    A document of more than `PIECE` characters is encoded in pieces that end with a line. Only around the cuts, tokens
    may differ from those of the whole document.
    """
    for batch in _batches(documents):
        if len(batch) > 1:
            yield from _encode(tokenizer, batch)
        else:
            yield [token for piece in pieces(batch[0]) for token in _encode(tokenizer, [piece])[0]]


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return encoded


def _batches(documents: Sequence[str]) -> Iterator[Sequence[str]]:
    """Groups of consecutive documents of at most `PIECE` characters together; a longer document is one group."""
    start = size = 0
    for index, document in enumerate(documents):
        size += len(document)
        if size > PIECE and index > start:
            yield documents[start:index]
            start, size = index, len(document)
    if start < len(documents):
        yield documents[start:]


def pieces(document: str) -> Iterator[str]:
    """The document in pieces of at most `PIECE` characters, cut after a line end if possible."""
    start = 0
    while len(document) - start > PIECE:
        end = document.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield document[start:end]
        start = end
    yield document[start:]


def _cached_byte_pairs(
    spec: TrainedTokenizer, special_tokens: Sequence[str], documents: Sequence[str], cache_dir: Path | None
) -> PreTrainedTokenizerFast:
    split = ["names"] * spec.split_names
    key = digest(FORMAT, str(spec.vocabulary_size), *split, *special_tokens, *documents)
    folder = cache_folder(cache_dir) / f"tokenizer-{key}"
    if folder.is_dir():
        try:
            return _pretrained(str(folder), None, "cache", local=True)
        except Failure as failure:
            warn(f"{failure}; training it again")
            shutil.rmtree(folder)
    say(f"training a tokenizer of {spec.vocabulary_size:,} tokens")
    trained = train_byte_pairs(spec.vocabulary_size, documents, special_tokens, split_names=spec.split_names)
    write_folder(folder, lambda beside: trained.save_pretrained(beside))
    return trained


def _pretrained(name: str, revision: str | None, key: str, *, local: bool) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, local_files_only=local, trust_remote_code=False
        )
    except Exception as error:  # the library raises OSError, ValueError, KeyError and its parser's own
        reason = str(error).strip().partition("\n")[0]
        raise Failure(f"{key}: no tokenizer can be loaded from {name}: {reason}") from None
    for fact in ("is_local", "local_files_only"):  # of this loading: a saved tokenizer would keep them
        tokenizer.init_kwargs.pop(fact, None)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise Failure(f"{key}: {name} has no `tokenizers` version (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise Failure(f"{key}: the tokenizer of {name} has no end-of-text token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
