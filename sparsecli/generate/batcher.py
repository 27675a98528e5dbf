"""Continuous batching: one thread owns the engine, and every pass takes a step of each text.

A pass has one token of every text that grows, and a piece of the prompts that are being read. The piece is so long that
the pass takes about two and a half times as long as without it: growing texts do not wait for long prompts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sparsecli.console import Failure
from sparsecli.decode.engine import Engine
from sparsecli.generate.sampling import Sampler, TokenLogprobs, logprobs_of
from sparsecli.generate.slots import Slot, Slots

LONGEST_PIECE = 256
"""Tokens of prompts in a pass at most: new texts and cancellations wait for it."""
SHORTEST_PIECE = 8
PASS_STEP = 8
"""The engine multiplies weights with so many tokens at once: a pass has a multiple of them where that fits."""
PROMPT_SHARE = 1.5
"""Time for prompts in a pass, over the time for growing texts."""
SMOOTHING = 0.2
"""Share of the newest pass in the running means of seconds."""


class Observer:
    """What a batcher tells of its work; this one keeps nothing."""

    def started(self, reused: int) -> None:
        """A text got a slot, which held `reused` tokens of its prompt."""

    def passed(self, seconds: float, prompt_tokens: int, active: int, waiting: int) -> None:
        """A pass took so long and read so many tokens of prompts; so many texts have a slot, or wait for one."""

    def token(self, seconds: float, first: bool) -> None:
        """A new token, so long after the one before, or after the arrival."""

    def finished(self, how: str, active: int, waiting: int) -> None:
        """A text has ended (`Event.finish`); so many others have a slot, or wait for one."""


class Full(Exception):
    """No room for another text; `retry_after` seconds may help."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Event:
    """What happened to a text: a new token, tokens of its prompt with their logprobs, or its end.

    Attributes:
        token: the new token; None at the end, and for those of a prompt.
        logprobs: of the new token, or of a piece of the prompt, as asked for.
        finish: `end` (an end token), `length`, `cancelled`, `timeout`, `stopping` or `error`; None while the text goes
            on.
    """

    token: int | None = None
    logprobs: Sequence[TokenLogprobs] = ()
    finish: str | None = None
    message: str = ""


@dataclass(eq=False)
class Text:
    """A text to be continued.

    Attributes:
        prompt: token ids, at least one.
        limit: new tokens at most; 0 only reads the prompt.
        sampler: picks the next token, given all tokens and the logits (V,).
        emit: is called with every event, in the batcher's thread, just before the engine's next pass: what receivers do
            with the events of a pass goes on beside that pass.
        deadline: of `time.monotonic()`.
        adjust: changes logits (V,) by the new tokens so far, before the sampler.
        top_logprobs: likeliest tokens whose logprobs are asked for; None: no logprobs.
        prompt_logprobs: whether they are asked for the prompt, too.
    """

    prompt: list[int]
    limit: int
    sampler: Sampler
    emit: Callable[[Event], None]
    deadline: float
    adjust: Callable[[Sequence[int], np.ndarray], np.ndarray] | None = None
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    new: list[int] = field(default_factory=list)
    cancelled: bool = False
    reused: int = 0
    arrived: float = field(default_factory=time.monotonic)
    last_token_at: float = 0.0


class Batcher:
    """The thread that decodes.

    Args:
        engine: no other thread may use it.
        slots: texts that are decoded together at most.
        capacity: tokens of a text at most, its prompt included.
        queue: texts that may wait for a slot.
        end_tokens: tokens that end a text.
    Raises:
        Failure: memory does not suffice for the slots.
    """

    def __init__(
        self,
        engine: Engine,
        slots: int,
        capacity: int,
        queue: int,
        end_tokens: frozenset[int],
        observer: Observer | None = None,
    ) -> None:
        self.engine, self.capacity, self.queue, self.end_tokens = engine, capacity, queue, end_tokens
        self.observer = observer or Observer()
        self.slots = Slots(engine, slots, capacity)
        self.waiting: list[Text] = []
        self.active: dict[Text, Slot] = {}
        self.told: list[tuple[Text, Event]] = []  # events that are not emitted yet
        self.step_seconds: dict[int, float] = {}  # running means of passes without prompts, by their texts
        self.prompt_seconds = 0.0  # of a token of a prompt
        self.text_seconds = 1.0  # of a text, from its slot to its end
        self.stopping = self._ending = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    # -- other threads ----------------------------------------------------------------------------------------

    def submit(self, texts: Sequence[Text]) -> None:
        """Add the texts of one request, all or none.

        Raises:
            Full: the queue is full, or the server stops.
        """
        with self._wake:
            free = len(self.slots.all) - len(self.active)
            if self.stopping or len(self.waiting) + len(texts) > self.queue + free:
                waves = 1 + len(self.waiting) // len(self.slots.all)
                raise Full(max(1, round(waves * self.text_seconds)))
            self.waiting.extend(texts)
            self._wake.notify()

    def cancel(self, text: Text) -> None:
        """Nobody wants the rest of a text. Its slot is free after the pass that is running."""
        text.cancelled = True

    def stop(self, seconds: float) -> None:
        """Take no more texts, let running ones end within `seconds`, then end the others and the thread."""
        with self._wake:
            self.stopping = True
            self._wake.notify()
        self._thread.join(seconds)
        self._ending = True
        self._thread.join()

    # -- the batcher's thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            if not self.active:
                self._emit()
            with self._wake:
                while not (self.waiting or self.active or self.stopping):
                    self._wake.wait()
                if self.stopping and not (self.waiting or self.active):
                    return
                self._drop_and_admit()
            if self.active:
                try:
                    self._pass()
                except Exception as error:  # whatever it is, clients must not wait for ever
                    for text, slot in [*self.active.items()]:
                        del slot.tokens[slot.sequence.length :]
                        self._end(text, Event(finish="error", message=str(error)))

    def _emit(self) -> None:
        """Tell what has happened since the last time, all at once: threads that are woken do not hold up this one."""
        told, self.told = self.told, []
        for text, event in told:
            text.emit(event)

    def _drop_and_admit(self) -> None:
        """End texts that are cancelled or late, and give slots to those that wait, in the order of arrival."""
        now = time.monotonic()
        for text in [*self.active, *self.waiting]:
            if text.cancelled:
                self._end(text, Event(finish="cancelled"))
            elif self._ending or now > text.deadline:
                self._end(text, Event(finish="stopping" if self._ending else "timeout"))
        for text in [*self.waiting]:
            if len(self.active) == len(self.slots.all):
                break
            slot = self.slots.take(text.prompt, reuse=not text.prompt_logprobs)
            if slot is None:
                continue
            self.waiting.remove(text)
            text.reused = len(slot.tokens)
            self.active[text] = slot
            self.observer.started(text.reused)

    def _pass(self) -> None:
        growing = [text for text in self.active if text.new]
        reading = [text for text in self.active if not text.new]
        room = self._piece(len(growing))
        texts, pieces = list(growing), [[text.new[-1]] for text in growing]
        for text in reading:
            left = text.prompt[len(self.active[text].tokens) :][:room]
            if text.prompt_logprobs:
                self._score(text, left)
            elif left:
                texts.append(text)
                pieces.append(left)
            room -= len(left)
            if room <= 0:
                break
        self._emit()
        if not texts:
            return
        started = time.perf_counter()
        rows = self.engine.advance([self.active[text].sequence for text in texts], pieces)
        self._measure(time.perf_counter() - started, len(growing), sum(map(len, pieces)) - len(growing))
        for text, piece, row in zip(texts, pieces, rows, strict=True):
            slot = self.active[text]
            slot.tokens.extend(piece)
            if len(slot.tokens) >= len(text.prompt):
                slot.prompt = ()
                self._sample(text, row)

    def _piece(self, growing: int) -> int:
        """Tokens of prompts in the next pass, beside so many texts that grow."""
        if not growing:
            return LONGEST_PIECE
        if not self.prompt_seconds or not self.step_seconds:
            return SHORTEST_PIECE
        piece = PROMPT_SHARE * self._step(growing) / self.prompt_seconds
        whole = round((growing + piece) / PASS_STEP) * PASS_STEP - growing
        return min(max(whole, SHORTEST_PIECE), LONGEST_PIECE)

    def _step(self, growing: int) -> float:
        """Seconds of a pass of so many texts without prompts. Where there was none, a text costs what a token of a
        prompt does: while prompts are read one after another, ever more texts grow without such a pass."""
        nearest = min(self.step_seconds, key=lambda count: abs(count - growing))
        further = (growing - nearest) * self.prompt_seconds
        return max(
            self.step_seconds[nearest] + further, self.step_seconds[nearest] * min(growing / nearest, 1)
        )

    def _measure(self, seconds: float, growing: int, read: int) -> None:
        self.observer.passed(seconds, read, len(self.active), len(self.waiting))
        if not read:
            self.step_seconds[growing] = _smoothed(self.step_seconds.get(growing, 0.0), seconds)
        elif read >= SHORTEST_PIECE:  # a few tokens cost little beside what every pass costs
            alone = not growing  # one of the tokens then stands for a growing text
            without = self._step(max(growing, 1)) if self.step_seconds else 0.0
            for_prompt = max(seconds - without, 0.1 * seconds) / (read - alone)
            self.prompt_seconds = _smoothed(self.prompt_seconds, for_prompt)

    def _score(self, text: Text, piece: list[int]) -> None:
        """Read a piece of a prompt, and tell the logprobs of the tokens behind its tokens."""
        slot = self.active[text]
        self._emit()
        begun = time.perf_counter()
        rows = self.engine.logits(slot.sequence, piece)
        seconds = time.perf_counter() - begun
        self.observer.passed(seconds, len(piece), len(self.active), len(self.waiting))
        slot.tokens.extend(piece)
        at = len(slot.tokens)
        following = text.prompt[at - len(piece) + 1 : at + 1]
        found = [
            logprobs_of(row, token, text.top_logprobs or 0)
            for token, row in zip(following, rows, strict=False)
        ]
        if found:
            self.told.append((text, Event(logprobs=found)))
        if at >= len(text.prompt):
            slot.prompt = ()
            self._sample(text, rows[-1])

    def _sample(self, text: Text, row: np.ndarray) -> None:
        """Pick the token after `row` (V,), and tell it or the text's end."""
        if text.limit == 0:
            self._end(text, Event(finish="length"))
            return
        try:
            scores = text.adjust(text.new, row) if text.adjust else row
            token = text.sampler([*text.prompt, *text.new], scores)
        except Failure as failure:
            self._end(text, Event(finish="error", message=failure.message))
            return
        self._time_token(text)
        if token in self.end_tokens:
            self._end(text, Event(finish="end"))
            return
        text.new.append(token)
        logprobs = [] if text.top_logprobs is None else [logprobs_of(row, token, text.top_logprobs)]
        self.told.append((text, Event(token, logprobs)))
        if len(text.new) >= text.limit or len(text.prompt) + len(text.new) >= self.capacity:
            self._end(text, Event(finish="length"))

    def _time_token(self, text: Text) -> None:
        now = time.monotonic()
        self.observer.token(now - (text.last_token_at or text.arrived), first=not text.last_token_at)
        text.last_token_at = now

    def _end(self, text: Text, event: Event) -> None:
        slot = self.active.pop(text, None)
        if slot:
            self.slots.give_back(slot)
            self.text_seconds = _smoothed(self.text_seconds, time.monotonic() - text.arrived)
        elif text in self.waiting:
            self.waiting.remove(text)
        self.observer.finished(event.finish or "", len(self.active), len(self.waiting))
        self.told.append((text, event))


def _smoothed(mean: float, newest: float) -> float:
    """The running mean with a newest value; 0: no value so far."""
    return mean + SMOOTHING * (newest - mean) if mean else newest
