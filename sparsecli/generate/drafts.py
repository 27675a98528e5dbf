"""Drafts for speculative decoding: tokens that probably follow, from the text so far or from a smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Protocol

import numpy as np

from sparsecli.console import Failure
from sparsecli.decode.engine import Engine
from sparsecli.decode.packed.pack import PackedModel
from sparsecli.generate.decoder import Decoder, DecoderOptions
from sparsecli.generate.native_decoder import NativeDecoder, packed_weights
from sparsecli.generate.sampling import distribution, draw, penalized
from sparsecli.model.files import PACKED, Description, find_model, read_description
from sparsecli.model.tokenizer import Tokenizer, read_tokenizer
from sparsecli.recipe.schema import GenerateSpec
from sparsecli.spec.feed_forward import PrecisionFeedForwardSpec

LOOKUP, SELF = "lookup", "self"
"""Values of `--draft` that name no model."""
LONGEST_SUFFIX = 16
SHORTEST_SUFFIX = 2


@dataclass(frozen=True)
class Draft:
    """Tokens that may follow."""

    tokens: list[int]
    probabilities: list[np.ndarray] | None = None
    """The distribution (V,) that each was drawn from; None where they were not drawn at random."""
    kind: int = 0
    """Drafts of one kind are accepted about equally often."""


class Drafter(Protocol):
    """Proposes the next tokens of one text."""

    def kind(self, tokens: Sequence[int]) -> int | None:
        """The kind of a draft after all `tokens` so far; None where there is none."""

    def catch_up(self, tokens: Sequence[int]) -> None:
        """Read what was added to the text since the last draft, where that takes long. Not before a `kind` of None."""

    def propose(self, tokens: Sequence[int], count: int) -> Draft:
        """`count` (at least 1) tokens after all `tokens` so far, or fewer."""

    def close(self) -> None:
        """Free memory and threads."""


class LookupDrafter:
    """Proposes the tokens after the most recent earlier occurrence of the text's longest suffix (prompt lookup)."""

    def __init__(self) -> None:
        self.after: dict[tuple[int, ...], int] = {}  # n-gram to the place after it
        self.read = 0

    def kind(self, tokens: Sequence[int]) -> int | None:
        """Tokens of the longest suffix of the text that occurred before."""
        for end in range(self.read + 1, len(tokens)):  # all n-grams but those at the very end
            for size in range(SHORTEST_SUFFIX, min(LONGEST_SUFFIX, end) + 1):
                self.after[tuple(tokens[end - size : end])] = end
        self.read = max(self.read, len(tokens) - 1)
        sizes = range(min(LONGEST_SUFFIX, len(tokens)), SHORTEST_SUFFIX - 1, -1)
        return next((size for size in sizes if tuple(tokens[len(tokens) - size :]) in self.after), None)

    def catch_up(self, tokens: Sequence[int]) -> None:
        """`kind` reads the text."""

    def propose(self, tokens: Sequence[int], count: int) -> Draft:
        size = self.kind(tokens)
        if size is None:
            return Draft([])
        place = self.after[tuple(tokens[len(tokens) - size :])]
        copied = list(tokens[place : place + count])
        while len(copied) < count:  # the text repeats itself, and so does its draft
            copied.append(copied[place - len(tokens)])
        return Draft(copied, kind=size)

    def close(self) -> None:
        """Nothing is held outside of Python."""


class ModelDrafter:
    """Proposes tokens of a second model, drawn with the same sampling options.

    Args:
        engine: the second model.
        vocabulary: tokens of the target model. Either model may have a few more, which the tokenizer does not use.
        capacity: tokens of the longest text.
        seed: of the draws.
    """

    def __init__(
        self, engine: Engine, vocabulary: int, options: GenerateSpec, capacity: int, seed: int
    ) -> None:
        self.engine, self.vocabulary, self.options = engine, vocabulary, options
        self.sequence = engine.sequence(min(capacity, engine.model.spec.max_positions))
        self.generator = np.random.default_rng((seed, 1))  # not the numbers that decide on the drafts
        self.seen: list[int] = []  # tokens of the sequence
        self.agreed = 0  # of them, those that are accepted

    def kind(self, tokens: Sequence[int]) -> int | None:
        return 0 if len(tokens) <= self.sequence.capacity else None

    def catch_up(self, tokens: Sequence[int]) -> None:
        self._take_back(tokens)
        if len(tokens) - self.agreed > 2:  # more than a draft leaves
            self._read(tokens[:-1])

    def propose(self, tokens: Sequence[int], count: int) -> Draft:
        count = min(count, self.sequence.capacity - len(tokens) + 1)  # the last one is not read
        self._take_back(tokens)
        logits = self._read(tokens)
        drafted: list[int] = []
        probabilities: list[np.ndarray] = []
        while True:
            token = self._next([*tokens, *drafted], logits, probabilities)
            drafted.append(token)
            if len(drafted) == count:
                break
            logits = self.engine.step(self.sequence, token)
            self.seen.append(token)
        return Draft(drafted, probabilities or None)

    def _take_back(self, tokens: Sequence[int]) -> None:
        """Forget the drafted tokens that are not in the text."""
        pairs = zip(self.seen[self.agreed :], tokens[self.agreed : len(tokens) - 1], strict=False)
        self.agreed += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.sequence.truncate(self.agreed)
        del self.seen[self.agreed :]

    def _read(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits (V,) after `tokens`, of which the agreed ones were read before."""
        added = tokens[self.agreed :]
        self.seen += added
        self.agreed = len(tokens)
        return self.engine.prefill(self.sequence, added)

    def _next(self, tokens: Sequence[int], logits: np.ndarray, probabilities: list[np.ndarray]) -> int:
        """The next token; unless decoding is greedy, the distribution it is drawn from goes to `probabilities`."""
        missing = self.vocabulary - len(logits)
        if missing > 0:
            logits = np.pad(logits, (0, missing), constant_values=-np.inf)
        logits = logits[: self.vocabulary]
        if self.options.temperature == 0:
            return int(penalized(logits, tokens, self.options.repetition_penalty).argmax())
        probabilities.append(distribution(tokens, logits, self.options))
        return draw(probabilities[-1], self.generator)

    def close(self) -> None:
        self.sequence.close()
        self.engine.close()


# -- opening -------------------------------------------------------------------------------------------------


def open_drafter(
    draft: str,
    target: Decoder,
    folder: Path,
    model: Description,
    tokenizer: Tokenizer,
    decoder: DecoderOptions,
    options: GenerateSpec,
    capacity: int,
    seed: int,
) -> Drafter:
    """The drafter that `draft` names: `lookup`, `self`, or a model.

    Args:
        target: the model that decides, from `folder`.
        capacity: tokens of the longest text.
    Raises:
        Failure: the target cannot take back tokens, or the draft model does not fit it.
    """
    check_target(target, folder, model)
    assert isinstance(target, NativeDecoder)
    if draft == LOOKUP:
        return LookupDrafter()
    if draft == SELF:
        packed = target.engine.model
        layer = packed.spec.feed_forward
        if not isinstance(layer, PrecisionFeedForwardSpec):
            raise Failure(
                f"--draft self: the model's feed-forward layers are {layer.kind}; only those of kind precision have "
                "a part that can draft"
            )
        coarse = layer.model_copy(update={"units_per_block": 0})
        packed = replace(packed, spec=packed.spec.model_copy(update={"feed_forward": coarse}))
    else:
        packed = _draft_weights(draft, tokenizer, decoder)
    engine = Engine(packed, threads=target.threads)
    return ModelDrafter(engine, model.spec.vocabulary.size, options, capacity, seed)


def check_target(target: Decoder, folder: Path, model: Description) -> None:
    """Raise `Failure` where a model cannot take back tokens that it has read."""
    if not isinstance(target, NativeDecoder):
        raise Failure("--draft: needs the native engine; leave it out with PyTorch")
    if reason := _unfit(model):
        raise Failure(f"--draft: the model in {folder} {reason}, and cannot take back tokens")


def _unfit(model: Description) -> str | None:
    if model.spec.encoder:
        return "has an encoder"
    return "has LSH attention" if model.spec.attention.hashing else None


def _draft_weights(draft: str, tokenizer: Tokenizer, decoder: DecoderOptions) -> PackedModel:
    folder = find_model(draft)
    model = read_description(folder)
    if reason := _unfit(model):
        raise Failure(f"--draft: the model in {folder} {reason}; choose another draft model")
    theirs = read_tokenizer(folder, model.spec.vocabulary.size)
    if theirs.backend.get_vocab() != tokenizer.backend.get_vocab():
        raise Failure(
            f"--draft: the model in {folder} has another vocabulary; a draft model needs that of the model"
        )
    dtype = None if (folder / PACKED).is_file() else decoder.dtype
    packed = packed_weights(folder, model, dtype)
    if decoder.cache_dtype is not None:
        packed = replace(packed, precision=replace(packed.precision, cache=decoder.cache_dtype))
    return packed
