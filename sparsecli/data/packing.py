"""Token ids on disk: written once from a corpus and a tokenizer, then memory-mapped."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from sparsecli.console import Failure, progress, say
from sparsecli.data.arrays import ArrayWriter, stored_arrays
from sparsecli.data.cache import cache_folder, digest
from sparsecli.data.corpus import read_documents, read_rows
from sparsecli.data.examples import Example, PairExamples, Prepared
from sparsecli.data.pairs import Pair, columns_of, make_pairs
from sparsecli.data.tokenization import encode, load_or_train
from sparsecli.recipe.data import TextSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = "packed-2"
"""Part of the cache key. A change of the file format needs a new version."""


# -- running text --------------------------------------------------------------------------------------------


class Windows(Dataset[Example]):
    """Consecutive windows of a stream: `input_ids` and `labels`, both int64 (sequence_length,).

    The labels are the same tokens; the model shifts them. An incomplete window at the end is dropped.

    Args:
        tokens: the stream, (number of tokens,).
        beginning: token ids that every window begins with; they are part of its length, but not of the stream.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, beginning: Sequence[int] = ()) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.beginning = torch.tensor(beginning, dtype=torch.int64)
        self.stride = sequence_length - len(self.beginning)
        self.places: Sequence[int] = range(len(tokens) // self.stride)  # of each window in the stream

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        window = torch.cat((self.beginning, torch.from_numpy(self._text(index).astype(np.int64))))
        return {"input_ids": window, "labels": window}

    def _text(self, index: int) -> np.ndarray:
        """The tokens of a window without its beginning (stride,)."""
        start = self.places[index] * self.stride
        return self.tokens[start : start + self.stride]

    def without(self, indices: Iterable[int]) -> Windows:
        """All windows but those of these indices."""
        left_out, rest = set(indices), copy.copy(self)
        rest.places = [place for index, place in enumerate(self.places) if index not in left_out]
        return rest

    def lengths(self) -> None:
        """All windows are equally long."""

    def collate(self, examples: Sequence[Example]) -> Example:
        """`input_ids` and `labels`, int64 (B, sequence_length)."""
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    def predicted(self, batch: Example) -> int:
        """Predicted tokens of the batch: all tokens of a window except the first."""
        return batch["labels"][:, 1:].numel()

    def bytes_per_token(self, tokenizer: PreTrainedTokenizerFast) -> float:
        """UTF-8 bytes of the text in these windows per token; converts nats per token into bits per byte.

        The end-of-text token has no bytes. A character that the last window cuts counts as three bytes.
        """
        tokens = np.concatenate([self._text(index) for index in range(len(self))])
        is_end = tokens == tokenizer.eos_token_id
        documents = np.split(tokens[~is_end], np.flatnonzero(is_end) - np.arange(is_end.sum()))
        texts = tokenizer.batch_decode(documents, clean_up_tokenization_spaces=False)
        return sum(len(text.encode()) for text in texts) / len(tokens)


@dataclass(frozen=True)
class TokenStream:
    """One split of a packed corpus, each document followed by the end-of-text token."""

    tokens: np.ndarray
    """uint16 or uint32, (number of tokens,), memory-mapped."""

    def windows(
        self, sequence_length: int, limit_tokens: int | None = None, beginning: Sequence[int] = ()
    ) -> Windows:
        """Windows of the first `limit_tokens` tokens (of all by default), at least one; see `Windows`.

        Raises `Failure` when the stream is shorter than one window.
        """
        if len(self.tokens) < sequence_length:
            raise Failure(
                f"data: a split of {len(self.tokens)} tokens does not fill one window of "
                f"{sequence_length}; add text or lower data.sequence_length"
            )
        limit = len(self.tokens) if limit_tokens is None else max(limit_tokens, sequence_length)
        return Windows(self.tokens[:limit], sequence_length, beginning)


@dataclass(frozen=True)
class PackedCorpus:
    """A corpus ready for training."""

    train: TokenStream
    held_out: TokenStream
    tokenizer: PreTrainedTokenizerFast
    fingerprint: str
    """A hash of the text, the split, the tokenizer and the file format."""


def pack(data: TextSpec, cache_dir: Path | None = None) -> PackedCorpus:
    """Read, tokenize and pack the running text of a recipe, or map the files of an earlier call.

    Raises `Failure` when the text or the tokenizer cannot be read or the cache cannot be written.
    """
    cache = cache_folder(cache_dir)
    splits = read_documents(data)
    tokenizer = load_or_train(data, splits.train, cache)
    key = digest(FORMAT, *_identity(tokenizer), digest(*splits.train), digest(*splits.held_out))

    def fill(writer: ArrayWriter) -> None:
        say(f"packing {len(splits.train):,} training and {len(splits.held_out):,} held-out documents")
        with progress("tokenizing", len(splits.train) + len(splits.held_out)) as bar:
            for name, documents in (("train", splits.train), ("held_out", splits.held_out)):
                for ids in encode(tokenizer, documents):
                    writer.append(name, _tokens([*ids, tokenizer.eos_token_id], tokenizer))
                    bar.advance()

    arrays = stored_arrays(cache / f"packed-{key}", fill)
    return PackedCorpus(TokenStream(arrays["train"]), TokenStream(arrays["held_out"]), tokenizer, key)


def _identity(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    return tokenizer.backend_tokenizer.to_str(), str(tokenizer.eos_token_id)


def _tokens(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    return np.array(ids, dtype=np.uint16 if len(tokenizer) <= 2**16 else np.uint32)


# -- pairs ---------------------------------------------------------------------------------------------------


class PackedPairs(PairExamples):
    """Sources and targets, concatenated into one array of tokens.

    Args:
        tokens: the source and the target of each pair in turn, each with its end token.
        ends: end of each source and target in `tokens`, (2 n,).
    """

    def __init__(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        self.tokens, self.ends = tokens, ends

    def __len__(self) -> int:
        return len(self.ends) // 2

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start = self.ends[2 * index - 1] if index else 0
        middle, end = self.ends[2 * index : 2 * index + 2]
        return self.tokens[start:middle], self.tokens[middle:end]

    def lengths(self) -> np.ndarray:
        """Tokens of each source."""
        return np.diff(self.ends, prepend=0)[::2]

    def first(self, target_tokens: int) -> PackedPairs:
        """The first pairs whose targets have `target_tokens` tokens together; at least one pair."""
        lengths = np.diff(self.ends, prepend=0)[1::2]
        count = max(1, int((lengths.cumsum() <= target_tokens).sum()))
        return PackedPairs(self.tokens, self.ends[: 2 * count])


def pack_pairs(data: TextSpec, cache_dir: Path | None = None) -> Prepared:
    """Read, tokenize and pack the pairs of a recipe (kinds `fields` and `docstrings`), or map those packed before.

    Sources and targets are truncated to the recipe's lengths. Raises `Failure` when the text or the tokenizer cannot be
    read, the text contains no pairs, or the cache cannot be written.
    """
    assert data.pairs
    spec, cache = data.pairs, cache_folder(cache_dir)
    rows = read_rows(data, columns_of(data))
    tokenizer = load_or_train(data, [text for row in rows.train for text in row], cache)
    texts = [digest(*(text for row in split for text in row)) for split in (rows.train, rows.held_out)]
    key = digest(FORMAT, *_identity(tokenizer), spec.model_dump_json(), *texts)

    def fill(writer: ArrayWriter) -> None:
        say(f"making pairs from {len(rows.train):,} training and {len(rows.held_out):,} held-out documents")
        pairs = make_pairs(spec, rows)
        say(f"packing {len(pairs.train):,} training and {len(pairs.held_out):,} held-out pairs")
        for name, split in (("train", pairs.train), ("held_out", pairs.held_out)):
            end = 0
            for ids in _halves(split, tokenizer, spec.source_length, spec.target_length):
                writer.append(name, _tokens(ids, tokenizer))
                end += len(ids)
                writer.append(f"{name}.ends", np.array([end]))

    arrays = stored_arrays(cache / f"pairs-{key}", fill)
    train, held_out = (PackedPairs(arrays[name], arrays[f"{name}.ends"]) for name in ("train", "held_out"))
    if data.held_out_tokens is not None:
        held_out = held_out.first(data.held_out_tokens)
    return Prepared(train, held_out, tokenizer, key)


def _halves(
    pairs: Iterable[Pair], tokenizer: PreTrainedTokenizerFast, source_length: int, target_length: int
) -> Iterable[list[int]]:
    """Source and target of each pair, truncated to their lengths and followed by the end token."""
    pairs = list(pairs)
    sources = encode(tokenizer, [pair.source for pair in pairs])
    targets = encode(tokenizer, [pair.target for pair in pairs])
    for source, target in zip(sources, targets, strict=True):
        yield [*source[: source_length - 1], tokenizer.eos_token_id]
        yield [*target[: target_length - 1], tokenizer.eos_token_id]
