"""Slots: sequences of the engine that texts take in turn, with the tokens that earlier texts left in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sparsecli.console import Failure
from sparsecli.decode.engine import Engine
from sparsecli.decode.engine import Sequence as EngineSequence

LEAST_SHARED = 16
"""Tokens that a prompt must have in common with a slot, for a copy to be worth it."""


@dataclass(eq=False)
class Slot:
    """A sequence, and the tokens that it holds.

    Attributes:
        busy: whether a text owns it.
        prompt: the whole prompt that its text is reading; empty once it is read.
        last_use: when it was last given back; slots count their uses.
    """

    sequence: EngineSequence
    tokens: list[int] = field(default_factory=list)
    busy: bool = False
    prompt: Sequence[int] = ()
    last_use: int = 0


class Slots:
    """`count` slots with room for `capacity` tokens each.

    A slot keeps its tokens when its text ends. A new text begins with what its prompt has in common with any slot.

    Raises:
        Failure: memory does not suffice.
    """

    def __init__(self, engine: Engine, count: int, capacity: int) -> None:
        self.all = [Slot(engine.sequence(capacity)) for _ in range(count)]
        self._uses = 0
        for slot in self.all:  # the system clears memory when it is first used: now, not while texts wait
            engine.step(slot.sequence, 0)
            slot.sequence.truncate(0)

    def take(self, prompt: Sequence[int], reuse: bool = True) -> Slot | None:
        """A slot that holds as much of the beginning of `prompt` as any does, but not its last token.

        None where all slots are busy, or where one is just reading what this prompt begins with: a copy of that costs
        less than to read it again.

        Args:
            reuse: whether the slot may hold tokens; without, it is empty.
        """
        free = [slot for slot in self.all if not slot.busy]
        if not free:
            return None
        shared = {slot: common(prompt[:-1], slot.tokens) for slot in self.all} if reuse else {}
        best = max(shared, key=lambda slot: shared[slot], default=None)
        most = shared[best] if best else 0
        for slot in self.all:
            coming = common(prompt[:-1], slot.prompt) if reuse and slot.busy else 0
            if coming >= most + LEAST_SHARED:
                return None
        keeps_most = best in free and 2 * most >= len(best.tokens)
        chosen = best if best and keeps_most else min(free, key=lambda slot: slot.last_use)
        self._begin(chosen, best, most)
        chosen.busy, chosen.prompt = True, prompt
        return chosen

    def _begin(self, slot: Slot, other: Slot | None, length: int) -> None:
        """Let `slot` hold the first `length` tokens of `other`, or of its own; none where layers do not allow it."""
        try:
            if other is None or other is slot:
                slot.sequence.truncate(length)
            elif length >= LEAST_SHARED:
                slot.sequence.copy_from(other.sequence, length)
                slot.tokens = other.tokens
            else:
                length = 0
        except Failure:  # a sliding window, an encoder, LSH attention
            length = 0
        if not length:
            slot.sequence.truncate(0)
        slot.tokens = slot.tokens[:length]

    def give_back(self, slot: Slot) -> None:
        """The slot's text has ended."""
        self._uses += 1
        slot.busy, slot.prompt, slot.last_use = False, (), self._uses


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    for length, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return length
    return min(len(first), len(second))
