"""The `data:` block of a recipe: sources of text, tokenizers, pairs of source and target, and images."""

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
    """Size of the vocabulary, with the 256 bytes and the special tokens."""
    split_names: bool = False
    """Encode a word in a name (`read_text`, `readText`) as in a sentence; spaces are separate tokens."""


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
    """Fields that all kinds of pairs share. Lengths count the end token; longer texts are truncated."""

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
    """Functions of Python source, and the first line of each function's docstring."""

    kind: Literal["docstrings"]


class SpanCounts(NamedTuple):
    """Tokens of a window, tokens removed from it, and the number of their spans."""

    window: int
    hidden: int
    spans: int


class CorruptedPairs(_Pairs):
    """Span corruption, the pre-training of T5 and Terraformer: text without some spans, and those spans."""

    kind: Literal["corrupted"]
    noise: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that are removed."""
    mean_span: Annotated[float, Field(ge=1)] = 3.0
    """Mean length of a span, in tokens."""

    def counts(self) -> SpanCounts:
        """Of the longest window whose source, with a sentinel per span and the end token, fits `source_length`.

        Windows longer than a source and a target together are not tried: more would be removed than a target holds.
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
            raise fault("target_length", f"{self.target_length} is less than the {length} tokens of a target")
        return self


class CopiedPairs(_Pairs):
    """Random tokens of the text's tokenizer as source, and the same tokens as target.

    The tokens before a token do not predict it, and sources differ in length. So the model has to find the last
    written tokens in the source, and to copy the token after them.
    """

    kind: Literal["copied"]
    shortest: Annotated[Whole, Field(ge=3)] = 4
    """Tokens of the shortest source; lengths are uniform up to the longest. Shorter sources could be in both splits."""

    @model_validator(mode="after")
    def _check(self) -> CopiedPairs:
        if self.shortest >= self.source_length:
            raise fault(
                "shortest",
                f"{self.shortest} tokens and the end token are more than source_length {self.source_length}",
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
    """The tokenizer; by default that of the model that training starts from or that is converted."""
    pairs: PairsSpec | None = None
    """Sources and targets for a model with an encoder; by default the data are running text."""
    sequence_length: Annotated[Whole, Field(ge=2)] = 256
    """Tokens of one training window of running text."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of documents kept for evaluation, chosen by a hash of their content."""
    held_out_tokens: Size | None = None
    """Evaluate on at most this many held-out tokens (of pairs: of their targets); all of them by default."""

    @property
    def copies(self) -> bool:
        """Whether each target is a copy of its source, of random tokens."""
        return self.pairs is not None and self.pairs.kind == "copied"

    @property
    def pair_lengths(self) -> tuple[int, int] | None:
        """Longest source and target, in tokens; None for running text."""
        return (self.pairs.source_length, self.pairs.target_length) if self.pairs else None


class StdlibCorpus(_Corpus):
    """The running Python's own standard library source: real text on every machine, no download."""

    source: Literal["stdlib"]
    packages: Names | None = None
    """Installed packages whose Python source is added to the training text, but not to the held-out text."""

    @model_validator(mode="after")
    def _check(self) -> StdlibCorpus:
        if self.pairs and self.pairs.kind == "fields":
            raise fault(
                "pairs.kind", "the standard library has no columns; expected docstrings, corrupted or copied"
            )
        return self


class FilesCorpus(_Corpus):
    """Local files: jsonl, ndjson, json, csv, tsv, parquet, arrow; every other file is one document of plain text."""

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
    """The copy task: random symbols as source, and the same symbols as target."""

    source: Literal["copy"]
    symbols: Annotated[int, Field(ge=2), MANY] = 126
    """Symbols to draw from; padding and the end token come before them."""
    length: Size = 127
    """Symbols of a source."""
    examples: Size = 1_000_000
    """Sequences to train on; each is drawn when it is needed."""
    held_out: Size = 512
    """Sequences to evaluate on. The symbols and the length must allow so many sequences that training is
    unlikely to draw one of these."""

    copies: ClassVar[bool] = True

    @property
    def pair_lengths(self) -> tuple[int, int]:
        """Tokens of a source and of a target, with the end token."""
        return self.length + 1, self.length + 1

    @model_validator(mode="after")
    def _check(self) -> CopyTask:
        # The expected number of held-out sequences that training also draws is held_out * examples / sequences.
        needed = 1000 * self.held_out * self.examples
        if self.length * math.log(self.symbols) < math.log(needed):
            sequences = self.symbols**self.length
            raise fault(
                "length",
                f"{self.symbols} symbols make {sequences:,} sequences of {self.length}, too few for a held-out split",
            )
        return self


# -- images --------------------------------------------------------------------------------------------------


class _Images(Spec):
    """Fields that every source of images shares. Images of equal pixels are in the same split."""

    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the images kept for evaluation, chosen by a hash of their pixels; unused where the source has a split of
    its own."""
    held_out_images: Size | None = None
    """Evaluate on at most this many of them; all of them by default."""
    tuning_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the other images that nothing is trained on, for a study to choose learning rates by."""

    copies: ClassVar[bool] = False
    pair_lengths: ClassVar[None] = None


class DigitsImages(_Images):
    """1,797 handwritten digits of 8 x 8 pixels, which scikit-learn carries."""

    source: Literal["digits"]


class StoredImages(_Images):
    """Labelled images on disk: a folder with a folder for each class, an .npz file, or MNIST's own files."""

    source: Literal["images"]
    path: str
    """A folder of class folders, perhaps in `train` and `test`; an .npz file with x_train and y_train, perhaps x_test
    and y_test (Keras' names); or a folder with train-images-idx3-ubyte and its fellows, which may end with .gz."""


ImagesSpec = DigitsImages | StoredImages


DataSpec = Annotated[
    StdlibCorpus | FilesCorpus | HubCorpus | CopyTask | DigitsImages | StoredImages,
    Field(discriminator="source"),
]
