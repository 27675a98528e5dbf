"""The examples of training and evaluation: windows of running text, pairs of source and target, or images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from sparsecli.spec.vocabulary import IGNORED, PADDING

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerFast

Example = dict[str, Tensor]


class Examples(Protocol):
    """A fixed list of examples, with the methods that the training loop calls."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def lengths(self) -> np.ndarray | None:
        """Tokens of each example, (n,); None if all examples are equally long."""

    def collate(self, examples: Sequence[Example]) -> Example:
        """A batch: the arguments of the model's forward."""

    def predicted(self, batch: Example) -> int:
        """Number of tokens over which the loss of a batch is averaged."""

    def bytes_per_token(self, tokenizer: PreTrainedTokenizerFast) -> float | None:
        """UTF-8 bytes of the predicted text per token; converts nats per token into bits per byte. None for images."""


@dataclass(frozen=True)
class Prepared:
    """The examples of a recipe, ready for training."""

    train: Examples
    held_out: Examples
    processor: PreTrainedTokenizerFast | BaseImageProcessor
    """The tokenizer; of images what makes `pixel_values` of them."""
    fingerprint: str
    """A hash of the text, the split, the tokenizer and the format of the examples."""
    tuning: Examples | None = None
    """Further examples that nothing is trained on, to choose settings by."""
    labels: Sequence[str] | None = None
    """Names of the classes of images; None for text."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of text."""
        return cast("PreTrainedTokenizerFast", self.processor)


class PairExamples(Dataset[Example]):
    """Sources and targets as token ids, both with the end token. Subclasses define `pair` and `__len__`."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a source (L1,) and of its target (L2,)."""

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
        """Tokens of the targets, with their end tokens."""
        return int((batch["labels"] != IGNORED).sum())

    def bytes_per_token(self, tokenizer: PreTrainedTokenizerFast) -> float:
        """Bytes of the targets per token. The end token and sentinels have no bytes."""
        targets = [self.pair(index)[1] for index in range(len(self))]
        texts = tokenizer.batch_decode(targets, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return sum(len(text.encode()) for text in texts) / sum(map(len, targets))
