"""The text of an evaluation: documents, their tokens, and where each token ends in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsecli.console import Failure
from sparsecli.data.corpus import read_documents
from sparsecli.data.packing import Windows
from sparsecli.data.tokenization import pieces
from sparsecli.model.tokenizer import Tokenizer
from sparsecli.recipe.data import CopyTask, DataSpec, ImagesSpec


@dataclass(frozen=True)
class TokenizedText:
    """Documents as one stream, each followed by the tokenizer's end-of-text token, as in training."""

    tokens: np.ndarray
    """int64 (N,)."""
    ends: np.ndarray
    """int64 (N,), ascending: bytes of the text before the end of each token. Tokens that share a
    character, and the last of a document and the end-of-text token after it, share an end."""

    def begins_as(self, other: TokenizedText, count: int) -> bool:
        """Whether the first `count` tokens of both are the same."""
        return np.array_equal(self.tokens[:count], other.tokens[:count])

    def windows(self, length: int, beginning: Sequence[int], label: str) -> Windows:
        """Windows of `length` tokens, of which `beginning` are the first.

        Raises:
            Failure: the stream is shorter than one window.
        """
        stride = length - len(beginning)
        if len(self.tokens) < stride:
            raise Failure(
                f"{label}: {len(self.tokens)} tokens do not fill one window of {length}; give more text or lower "
                "--window"
            )
        return Windows(self.tokens, length, beginning)


def held_out_documents(data: DataSpec, label: str) -> list[str]:
    """The held-out documents of a recipe's running text.

    Raises:
        Failure: the recipe has pairs or images, or the text cannot be read.
    """
    if isinstance(data, ImagesSpec):
        raise Failure(f"{label}: its data are images; name a model of images, or a file of text with --text")
    if isinstance(data, CopyTask) or data.pairs:
        raise Failure(f"{label}: its data are pairs; evaluate reads running text: name a file with --text")
    return read_documents(data).held_out


def tokenize(
    tokenizer: Tokenizer,
    documents: Sequence[str],
    *,
    tokens: int | None = None,
    bytes: int | None = None,
) -> TokenizedText:
    """The tokens of the documents.

    Args:
        tokens: stop after this number of tokens.
        bytes: stop after this number of bytes of text.
    Raises:
        Failure: a document is not Unicode, or has a token that the model does not have.
    """
    ids: list[int] = []
    ends: list[np.ndarray] = []
    start = 0
    for document in documents:
        for text in pieces(document):
            found, offsets = tokenizer.encode_with_offsets(text)
            sizes = _bytes_before(text)
            ids += found
            ends.append(start + sizes[_character_ends(offsets, len(text))])
            start += int(sizes[-1])
        ids += tokenizer.end
        ends.append(np.full(len(tokenizer.end), start))
        if (tokens is not None and len(ids) >= tokens) or (bytes is not None and start >= bytes):
            break
    stream = TokenizedText(np.array(ids, np.int64), np.concatenate(ends))
    last = len(ids) if bytes is None else int(np.searchsorted(stream.ends, bytes, side="right"))
    last = last if tokens is None else min(last, tokens)
    return TokenizedText(stream.tokens[:last], stream.ends[:last])


def _character_ends(offsets: Sequence[tuple[int, int]], size: int) -> np.ndarray:
    """Characters of the text before the end of each token (N,), ascending: those that share a character end
    together."""
    begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T.copy()
    ends = np.maximum.accumulate(ends)
    ends[-1:] = size  # a tokenizer may drop spaces at the end
    for token in np.flatnonzero(begins[1:] < ends[:-1])[::-1]:
        ends[token] = ends[token + 1]
    return ends


def _bytes_before(text: str) -> np.ndarray:
    """Bytes of UTF-8 before each character, and of the whole text: (characters + 1,)."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate(([0], np.cumsum(sizes)))
