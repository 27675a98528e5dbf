"""What a model is trained and evaluated on: windows of running text, or sources and their targets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from sparsecli.spec.vocabulary import IGNORED, PADDING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Example = dict[str, Tensor]


class Examples(Protocol):
    """A fixed list of examples, and what the training loop asks about them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def lengths(self) -> np.ndarray | None:
        """Tokens that are read of each example, (n,); None where they are equally many."""

    def collate(self, examples: Sequence[Example]) -> Example:
        """One batch, the arguments of the model's forward."""

    def predicted(self, batch: Example) -> int:
        """How many tokens the loss of a batch is the mean of."""

    def bytes_per_token(self, tokenizer: PreTrainedTokenizerFast) -> float:
        """UTF-8 bytes of the predicted text over its tokens; turns nats per token into bits per byte."""


@dataclass(frozen=True)
class Prepared:
    """The examples of a recipe, ready to train on."""

    train: Examples
    held_out: Examples
    tokenizer: PreTrainedTokenizerFast
    fingerprint: str
    """Changes with the text, the split, the tokenizer and what examples are made of them."""


class PairExamples(Dataset[Example]):
    """Sources and targets as token ids, both with the end token; the kinds differ in `pair` and `__len__`."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a source and of its target, each of one axis."""

    def __getitem__(self, index: int) -> Example:
        """`input_ids` (L1,) and `labels` (L2,), int64."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        source, target = self.pair(index)
        return {
            "input_ids": torch.from_numpy(source.astype(np.int64)),
            "labels": torch.from_numpy(target.astype(np.int64)),
        }

    def lengths(self) -> np.ndarray | None:
        return None

    def collate(self, examples: Sequence[Example]) -> Example:
        """Padding on the right: `input_ids` and `attention_mask` (B, L1), `labels` (B, L2), int64."""
        sources = [example["input_ids"] for example in examples]
        targets = [example["labels"] for example in examples]
        return {
            "input_ids": pad_sequence(sources, batch_first=True, padding_value=PADDING),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in sources], batch_first=True),
            "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        }

    def predicted(self, batch: Example) -> int:
        """Tokens of the targets, their end tokens included."""
        return int((batch["labels"] != IGNORED).sum())

    def bytes_per_token(self, tokenizer: PreTrainedTokenizerFast) -> float:
        """Bytes of the targets over their tokens; the end token and sentinels stand for no byte."""
        targets = [self.pair(index)[1] for index in range(len(self))]
        texts = tokenizer.batch_decode(targets, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return sum(len(text.encode()) for text in texts) / sum(map(len, targets))
