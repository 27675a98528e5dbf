"""The interfaces of timed decoders. Each module has one backend; `bench.peers` has other programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TimedDecoder(Protocol):
    """A loaded model with its cache, for one sequence."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """Start the sequence with these tokens."""

    def rewind(self) -> None:
        """Remove all tokens after the prefill from the cache."""

    def step(self, token: int) -> tuple[int, int | None]:
        """Append one token. Returns the greedy next token, and the nanoseconds of the block stack if measured."""


class ProfiledDecoder(TimedDecoder, Protocol):
    """A decoder that times the parts of its steps."""

    def profile(self) -> dict[str, float]:
        """Seconds by part since the last call."""


class EvictingDecoder(TimedDecoder, Protocol):
    """A decoder that reads weights from a file."""

    def evict(self) -> None:
        """Evict the file's weights from memory."""

    def bytes_read(self) -> int:
        """Bytes that the process has read from disk so far."""


class PromptReader:
    """A decoder whose step reads a whole prompt."""

    def __init__(self, decoder: TimedDecoder, vocabulary: int) -> None:
        self.decoder, self.vocabulary = decoder, vocabulary
        self.tokens: Sequence[int] = ()

    def prefill(self, tokens: Sequence[int]) -> None:
        """The prompt."""
        self.tokens = tokens

    def rewind(self) -> None:
        """See `TimedDecoder.rewind`. Every step starts a new sequence."""

    def step(self, token: int) -> tuple[int, None]:
        """Read the prompt, shifted by `token` so that no two rounds read the same one."""
        self.decoder.prefill([(each + token) % self.vocabulary for each in self.tokens])
        return 0, None


def others(token: int, index: int, vocabulary: int) -> int:
    """A token for sequence `index` of a batch whose first sequence has `token`, so that their tokens differ."""
    return (token + 7919 * index) % vocabulary
