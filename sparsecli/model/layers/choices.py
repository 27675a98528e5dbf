"""Discrete choices of a forward pass, kept for when it is computed once more.

A backward pass that computes activations again, instead of having stored them, does so from inputs that may differ
in their last bits. Sums do not mind; a choice between two nearly equal scores may fall the other way, and then the
gradients belong to another function. Layers therefore choose through `recorded_choice`, which costs nothing unless
someone keeps a `ChoiceRecord`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor


class ChoiceRecord:
    """The choices of one piece of code, in the order in which it makes them."""

    def __init__(self) -> None:
        self._made: list[Tensor] = []

    def recording(self) -> Pass:
        """A context in which choices are made, and kept."""
        return Pass(self._made, replays=False)

    def replaying(self) -> Pass:
        """A context in which the same code makes the same choices again."""
        return Pass(self._made, replays=True)


class Pass:
    """One run through code that chooses, as a context; it may lie within a pass of a larger piece of code."""

    def __init__(self, made: list[Tensor], replays: bool) -> None:
        self.made, self.replays = made, replays
        self.position = 0
        self.outer: Pass | None = None

    def __enter__(self) -> Pass:
        self.outer, _running.innermost = _running.innermost, self
        self.position = 0
        if not self.replays:
            self.made.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _running.innermost = self.outer

    def decide(self, choose: Callable[[], Tensor], below: int) -> Tensor:
        """See `recorded_choice`."""
        if self.replays:
            chosen = self.made[self.position].long()
            self.position += 1
            return chosen
        # What this pass makes for the first time may be a repetition to the one around it.
        chosen = self.outer.decide(choose, below) if self.outer else choose()
        self.made.append(chosen.to(_smallest_type(below)))
        return chosen


class _Running(threading.local):
    """The innermost pass of each thread: autograd runs backward passes in threads of its own."""

    innermost: Pass | None = None


_running = _Running()


def recorded_choice(choose: Callable[[], Tensor], below: int) -> Tensor:
    """The indices that `choose` returns, int64 from 0 to `below` - 1; in a repeated pass those it returned before.

    `choose` is not called again then, and must not draw random numbers: later draws would be others.
    """
    if _running.innermost is None:
        return choose()
    return _running.innermost.decide(choose, below)


def _smallest_type(below: int) -> torch.dtype:
    types = (torch.uint8, torch.int16, torch.int32)
    return next((kind for kind in types if below - 1 <= torch.iinfo(kind).max), torch.int64)
