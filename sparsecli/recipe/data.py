"""What a recipe may say about text: where it comes from, how it becomes tokens, and how it becomes pairs."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from sparsecli.spec.base import MANY, Size, Spec, Whole, fault

Names = Annotated[list[str], Field(min_length=1)]


# -- tokenizers ----------------------------------------------------------------------------------------------


class TrainedTokenizer(Spec):
    """A byte-level BPE trained on the training split of the corpus and saved with the run."""

    kind: Literal["bpe"]
    vocabulary_size: Annotated[int, Field(ge=257), MANY]
    """Tokens of the vocabulary, the 256 bytes and the special tokens included."""
    split_names: bool = False
    """A word is the same token in a name (`read_text`, `readText`) as in a sentence; spaces are tokens of their own."""


class SavedTokenizer(Spec):
    """A tokenizer saved by Hugging Face's `save_pretrained`, or by an earlier run."""

    kind: Literal["saved"]
    path: str
    """Folder of the tokenizer, or of a run."""


class HubTokenizer(Spec):
    """A tokenizer from the Hugging Face hub."""

    kind: Literal["hub"]
    name: str
    """Repository, for example `HuggingFaceTB/SmolLM2-135M`."""
    revision: str | None = None
    """Commit, tag or branch."""


TokenizerSpec = Annotated[TrainedTokenizer | SavedTokenizer | HubTokenizer, Field(discriminator="kind")]


# -- pairs ---------------------------------------------------------------------------------------------------


class _Pairs(Spec):
    """Fields that all kinds of pairs share. Lengths count the end token; what is longer is cut."""

    source_length: Annotated[Whole, Field(ge=2)] = 512
    """Longest source, in tokens."""
    target_length: Annotated[Whole, Field(ge=2)] = 128
    """Longest target, in tokens."""


class FieldPairs(_Pairs):
    """Two columns of a file of rows or of a dataset."""

    kind: Literal["fields"]
    input: str = "input"
    """Column of the sources."""
    target: str = "target"
    """Column of the targets."""


class DocstringPairs(_Pairs):
    """Functions of Python source, and what the first line of each one's docstring says about it."""

    kind: Literal["docstrings"]


class SpanCounts(NamedTuple):
    """How much of a window of text is corrupted, in tokens."""

    window: int
    hidden: int
    spans: int


class CorruptedPairs(_Pairs):
    """Text with spans left out, and the spans (T5's pre-training, and Terraformer's)."""

    kind: Literal["corrupted"]
    noise: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that is left out."""
    mean_span: Annotated[float, Field(ge=1)] = 3.0
    """Mean length of a span, in tokens."""

    def counts(self) -> SpanCounts:
        """Of the longest window whose source, with a sentinel for every span and the end token, is not too long.

        No window is longer than a source and a target, from which more is left out than a target holds.
        """
        # A longer window never has a shorter source.
        windows = range(2, self.source_length + self.target_length + 1)
        fitting = bisect_right(windows, self.source_length, key=lambda window: self._source(self._of(window)))
        return self._of(windows[max(0, fitting - 1)])

    def _of(self, window: int) -> SpanCounts:
        hidden = min(max(round(window * self.noise), 1), window - 1)
        return SpanCounts(window, hidden, min(max(round(hidden / self.mean_span), 1), window - hidden))

    @staticmethod
    def _source(counts: SpanCounts) -> int:
        return counts.window - counts.hidden + counts.spans + 1

    @model_validator(mode="after")
    def _check(self) -> CorruptedPairs:
        if self._source(self._of(2)) > self.source_length:
            raise fault("source_length", f"{self.source_length} tokens leave no room for text")
        _, hidden, spans = self.counts()
        if (length := hidden + spans + 1) > self.target_length:
            raise fault(
                "target_length", f"{self.target_length} is less than the {length} tokens that are left out"
            )
        return self


class CopiedPairs(_Pairs):
    """Random tokens of the text's tokenizer, and the same once more.

    No token follows from the ones before it, and sources differ in length: what is left to learn is to find in the
    source what was written last, and to go on as it does.
    """

    kind: Literal["copied"]
    shortest: Annotated[Whole, Field(ge=3)] = 4
    """Tokens of the shortest source; lengths are drawn evenly up to the longest. Fewer would be in both splits."""

    @model_validator(mode="after")
    def _check(self) -> CopiedPairs:
        if self.shortest >= self.source_length:
            raise fault(
                "shortest",
                f"{self.shortest} tokens and the end are more than source_length {self.source_length}",
            )
        if self.target_length < self.source_length:
            raise fault(
                "target_length", f"{self.target_length} is less than source_length {self.source_length}"
            )
        return self


PairsSpec = Annotated[FieldPairs | DocstringPairs | CorruptedPairs | CopiedPairs, Field(discriminator="kind")]


# -- sources -------------------------------------------------------------------------------------------------


class _Corpus(Spec):
    """Fields that every source of text shares."""

    tokenizer: TokenizerSpec | None = None
    """Where the tokenizer comes from; by default from the model that training starts from or that is converted."""
    pairs: PairsSpec | None = None
    """Sources and targets for a model with an encoder; by default the text is read as it runs."""
    sequence_length: Annotated[Whole, Field(ge=2)] = 256
    """Tokens of one training window of running text."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of documents kept for evaluation, chosen by a hash of their content."""
    held_out_tokens: Size | None = None
    """Evaluate on at most this many held-out tokens (of pairs: of their targets); all of them by default."""

    @property
    def copies(self) -> bool:
        """Whether targets are their sources, of random tokens."""
        return self.pairs is not None and self.pairs.kind == "copied"

    @property
    def pair_lengths(self) -> tuple[int, int] | None:
        """Longest source and target, in tokens; None for running text."""
        return (self.pairs.source_length, self.pairs.target_length) if self.pairs else None


class StdlibCorpus(_Corpus):
    """The running Python's own standard library source: real text on every machine, no download."""

    source: Literal["stdlib"]
    packages: Names | None = None
    """Installed packages whose Python source is trained on, too; all that is held out is the standard library's."""

    @model_validator(mode="after")
    def _check(self) -> StdlibCorpus:
        if self.pairs and self.pairs.kind == "fields":
            raise fault(
                "pairs.kind", "the standard library has no columns; expected docstrings, corrupted or copied"
            )
        return self


class FilesCorpus(_Corpus):
    """Local files: jsonl, ndjson, json, csv, tsv, parquet, arrow; others are one document of text each."""

    source: Literal["files"]
    paths: Names
    """Files or globs (`**` crosses folders), relative to the working directory."""
    held_out_paths: Names | None = None
    """Files or globs to evaluate on, in place of `held_out_fraction`."""
    text_field: str = "text"
    """Column that holds the text, in files of rows."""


class HubCorpus(_Corpus):
    """A dataset from the Hugging Face hub."""

    source: Literal["hub"]
    name: str
    """Dataset repository."""
    subset: str | None = None
    """Configuration of the dataset."""
    revision: str | None = None
    """Commit, tag or branch."""
    split: str = "train"
    """Split to read."""
    held_out_split: str | None = None
    """Split to evaluate on, in place of `held_out_fraction`."""
    text_field: str = "text"
    """Column that holds the text."""
    streaming: bool = False
    """Read rows as they arrive, without storing the dataset first; needs `max_documents`."""
    max_documents: Size | None = None
    """Stop after this many rows of a split."""

    @model_validator(mode="after")
    def _check(self) -> HubCorpus:
        if self.streaming and self.max_documents is None:
            raise fault("streaming", "needs max_documents, so that the packed corpus is the same every time")
        return self


TextSpec = Annotated[StdlibCorpus | FilesCorpus | HubCorpus, Field(discriminator="source")]


class CopyTask(Spec):
    """Random symbols as source and, again, as target: what a model must do to copy can be counted exactly."""

    source: Literal["copy"]
    symbols: Annotated[int, Field(ge=2), MANY] = 126
    """Symbols to draw from; padding and the end token come before them."""
    length: Size = 127
    """Symbols of a source."""
    examples: Size = 1_000_000
    """Sequences to train on; drawn when they are needed."""
    held_out: Size = 512
    """Sequences to evaluate on; there must be so many different ones that none of these is likely to be trained on."""

    copies: ClassVar[bool] = True

    @property
    def pair_lengths(self) -> tuple[int, int]:
        """Tokens of a source and of a target, with the end token."""
        return self.length + 1, self.length + 1

    @model_validator(mode="after")
    def _check(self) -> CopyTask:
        # In the mean, held_out * examples / sequences of the held-out ones are drawn for training, too.
        needed = 1000 * self.held_out * self.examples
        if self.length * math.log(self.symbols) < math.log(needed):
            sequences = self.symbols**self.length
            raise fault(
                "length",
                f"{self.symbols} symbols make {sequences:,} sequences of {self.length}, too few to hold some out",
            )
        return self


DataSpec = Annotated[StdlibCorpus | FilesCorpus | HubCorpus | CopyTask, Field(discriminator="source")]
