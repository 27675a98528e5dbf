"""Streams of tokens on disk: made once from a corpus and a tokenizer, then memory-mapped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from sparsecli.console import Failure, say, warn
from sparsecli.data.cache import cache_folder, digest, write_folder
from sparsecli.data.corpus import read_documents
from sparsecli.data.tokenization import encode, load_or_train
from sparsecli.recipe.schema import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = "packed-1"
"""Part of the cache key; a change of the files below needs a new one."""
INDEX = "index.json"


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Consecutive windows of a stream: `input_ids` and `labels`, both int64 (sequence_length,).

    The labels are the same tokens; the model shifts them. What does not fill a window at the end is left out.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return len(self.tokens) // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.sequence_length
        window = torch.from_numpy(self.tokens[start : start + self.sequence_length].astype(np.int64))
        return {"input_ids": window, "labels": window}

    def bytes_per_token(self, tokenizer: PreTrainedTokenizerFast) -> float:
        """UTF-8 bytes of the text in these windows over their tokens; turns nats per token into bits per byte.

        The end-of-text token stands for no byte. A character that the last window cuts counts as three.
        """
        tokens = np.asarray(self.tokens[: len(self) * self.sequence_length])
        is_end = tokens == tokenizer.eos_token_id
        documents = np.split(tokens[~is_end], np.flatnonzero(is_end) - np.arange(is_end.sum()))
        texts = tokenizer.batch_decode(documents, clean_up_tokenization_spaces=False)
        return sum(len(text.encode()) for text in texts) / len(tokens)


@dataclass(frozen=True)
class TokenStream:
    """One split of a packed corpus, each document followed by the end-of-text token."""

    tokens: np.ndarray
    """uint16 or uint32, (number of tokens,), memory-mapped."""

    def windows(self, sequence_length: int, limit_tokens: int | None = None) -> Windows:
        """Windows of the first `limit_tokens` tokens (of all by default), at least one.

        Raises `Failure` when the stream is shorter than one window.
        """
        if len(self.tokens) < sequence_length:
            raise Failure(
                f"data: a split of {len(self.tokens)} tokens does not fill one window of "
                f"{sequence_length}; add text or lower data.sequence_length"
            )
        limit = len(self.tokens) if limit_tokens is None else max(limit_tokens, sequence_length)
        return Windows(self.tokens[:limit], sequence_length)


@dataclass(frozen=True)
class PackedCorpus:
    """A corpus ready to train on."""

    train: TokenStream
    held_out: TokenStream
    tokenizer: PreTrainedTokenizerFast
    fingerprint: str
    """Changes with the text, the split, the tokenizer and the file format."""


def pack(data: DataSpec, cache_dir: Path | None = None) -> PackedCorpus:
    """Read, tokenize and pack the corpus of a recipe, or map what an earlier call has packed.

    Raises `Failure` when the text or the tokenizer cannot be read or the cache cannot be written.
    """
    cache = cache_folder(cache_dir)
    splits = read_documents(data)
    tokenizer = load_or_train(data, splits.train, cache)
    key = digest(
        FORMAT,
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.eos_token_id),
        digest(*splits.train),
        digest(*splits.held_out),
    )
    folder = cache / f"packed-{key}"

    if folder.exists() and (damage := _damage(folder)):
        warn(f"{folder}: {damage}; packing again")
        shutil.rmtree(folder)
    if not folder.exists():
        say(f"packing {len(splits.train):,} documents to train on and {len(splits.held_out):,} held out")
        write_folder(folder, lambda beside: _write(beside, tokenizer, splits.train, splits.held_out))

    index = json.loads((folder / INDEX).read_text())
    streams = {
        name: TokenStream(np.memmap(folder / f"{name}.bin", dtype=index["dtype"], mode="r"))
        for name in index["streams"]
    }
    return PackedCorpus(streams["train"], streams["held_out"], tokenizer, key)


def _write(
    folder: Path, tokenizer: PreTrainedTokenizerFast, train: Sequence[str], held_out: Sequence[str]
) -> None:
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    streams = {}
    for name, documents in (("train", train), ("held_out", held_out)):
        tokens = 0
        with (folder / f"{name}.bin").open("wb") as file:
            for ids in encode(tokenizer, documents):
                file.write(np.array([*ids, tokenizer.eos_token_id], dtype=dtype).tobytes())
                tokens += len(ids) + 1
        streams[name] = {"tokens": tokens}
    (folder / INDEX).write_text(json.dumps({"dtype": np.dtype(dtype).name, "streams": streams}))


def _damage(folder: Path) -> str | None:
    """What is wrong with a packed corpus on disk, or None."""
    try:
        index = json.loads((folder / INDEX).read_text())
        width = np.dtype(index["dtype"]).itemsize
        for name in ("train", "held_out"):
            expected = index["streams"][name]["tokens"] * width
            size = (folder / f"{name}.bin").stat().st_size
            if size != expected:
                return f"{name}.bin has {size} bytes, not {expected}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"not a packed corpus ({type(error).__name__}: {error})"
    return None
