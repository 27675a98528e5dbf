"""The copy task: random symbols, to be written again. No text is read, and no sequence is ever seen twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparsecli.data.cache import digest
from sparsecli.data.examples import PairExamples, Prepared
from sparsecli.data.tokenization import PAIR_TOKENS, for_pairs
from sparsecli.model.architecture import END
from sparsecli.recipe.data import CopyTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FIRST_SYMBOL = len(PAIR_TOKENS)


def prepare_copies(task: CopyTask) -> Prepared:
    """Sequences to train on and others to evaluate on, and a tokenizer that reads symbols as numbers."""
    train, held_out = CopiedSymbols(task, 0, task.examples), CopiedSymbols(task, 1, task.held_out)
    return Prepared(train, held_out, symbol_tokenizer(task.symbols), digest("copy-1", task.model_dump_json()))


class CopiedSymbols(PairExamples):
    """Sequences of symbols, drawn when they are asked for, the same ones every time.

    Args:
        split: sequences of different splits are drawn independently.
    """

    def __init__(self, task: CopyTask, split: int, examples: int) -> None:
        self.task, self.split, self.examples = task, split, examples

    def __len__(self) -> int:
        return self.examples

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng((self.split, index))
        symbols = random.integers(FIRST_SYMBOL, FIRST_SYMBOL + self.task.symbols, self.task.length)
        ended = np.append(symbols, END)
        return ended, ended


def symbol_tokenizer(symbols: int) -> PreTrainedTokenizerFast:
    """Reads and writes symbols as numbers from 0, with spaces between them; what is no symbol reads as padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*PAIR_TOKENS, *map(str, range(symbols))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAIR_TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(PAIR_TOKENS))
    return for_pairs(tokenizer)
