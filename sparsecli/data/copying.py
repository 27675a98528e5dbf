"""The copy task: the target is the source, of random symbols or tokens. No sequence is used twice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparsecli.data.cache import cache_folder, digest
from sparsecli.data.corpus import read_documents
from sparsecli.data.examples import PairExamples, Prepared
from sparsecli.data.tokenization import PAIR_TOKENS, for_pairs, load_or_train
from sparsecli.recipe.data import CopiedPairs, CopyTask, TextSpec
from sparsecli.spec.vocabulary import END

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EXAMPLES, HELD_OUT = 1_000_000, 512
"""Sequences of random tokens for training and evaluation."""


def prepare_copies(task: CopyTask) -> Prepared:
    """Sequences for training, others for evaluation, and a tokenizer that reads symbols as numbers."""
    symbols = np.arange(len(PAIR_TOKENS), len(PAIR_TOKENS) + task.symbols)
    lengths = task.length, task.length
    train, held_out = Copies(symbols, lengths, 0, task.examples), Copies(symbols, lengths, 1, task.held_out)
    return Prepared(train, held_out, symbol_tokenizer(task.symbols), digest("copy-1", task.model_dump_json()))


def prepare_copied_tokens(data: TextSpec, pairs: CopiedPairs, cache_dir: Path | None = None) -> Prepared:
    """Sequences of random tokens of a text's tokenizer, with different lengths.

    Raises `Failure` when the text or the tokenizer cannot be read or the cache cannot be written.
    """
    tokenizer = load_or_train(data, read_documents(data).train, cache_folder(cache_dir))
    tokens = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    lengths = pairs.shortest, pairs.source_length - 1
    limit = HELD_OUT if data.held_out_tokens is None else max(1, data.held_out_tokens // pairs.source_length)
    train, held_out = Copies(tokens, lengths, 0, EXAMPLES), Copies(tokens, lengths, 1, min(HELD_OUT, limit))
    key = digest("copied-1", tokenizer.backend_tokenizer.to_str(), pairs.model_dump_json())
    return Prepared(train, held_out, tokenizer, key)


class Copies(PairExamples):
    """Sequences that are drawn on access. An index always gives the same sequence.

    Args:
        symbols: token ids (n,) to draw from.
        lengths: tokens of the shortest and of the longest sequence, without the end token.
        split: sequences of different splits are drawn independently.
    """

    def __init__(self, symbols: np.ndarray, lengths: tuple[int, int], split: int, examples: int) -> None:
        self.symbols, self.shortest, self.longest = symbols, *lengths
        self.split, self.examples = split, examples

    def __len__(self) -> int:
        return self.examples

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng((self.split, index))
        drawn = self.symbols[random.integers(0, len(self.symbols), self.longest)]
        ended = np.append(drawn[: random.integers(self.shortest, self.longest + 1)], END)
        return ended, ended


def symbol_tokenizer(symbols: int) -> PreTrainedTokenizerFast:
    """Reads and writes symbols as numbers from 0, with spaces between them. Any other word is read as padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*PAIR_TOKENS, *map(str, range(symbols))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAIR_TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(PAIR_TOKENS))
    return for_pairs(tokenizer)
