"""One request's texts, from the batcher's events to words: characters are whole, and stop strings end a text."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from sparsecli.generate.batcher import Batcher, Event, Text
from sparsecli.generate.sampling import TokenLogprobs, make_sampler
from sparsecli.generate.text import TextBuilder
from sparsecli.model.tokenizer import Tokenizer
from sparsecli.recipe.schema import GenerateSpec
from sparsecli.serve.protocol import Request


class Broken(Exception):
    """A text ended before its time: by its time limit, because the server stops, or by an error."""

    def __init__(self, finish: str, message: str) -> None:
        super().__init__(message)
        self.finish = finish


@dataclass(frozen=True)
class Delta:
    """What a text grew by.

    Attributes:
        text: to be shown; may be empty.
        logprobs: of the tokens since the last delta, as asked for.
        finish: `stop` or `length` with the last delta.
    """

    text: str
    logprobs: Sequence[TokenLogprobs] = ()
    finish: str | None = None


class Inbox:
    """Brings events from the batcher's thread into the event loop, which wakes up once for all of a pass."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.arrived: deque[tuple[asyncio.Queue[Event], Event]] = deque()

    def put(self, queue: asyncio.Queue[Event], event: Event) -> None:
        """Called in the batcher's thread."""
        self.arrived.append((queue, event))
        if len(self.arrived) == 1:  # else the loop is about to take this one, too
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self.arrived:
            queue, event = self.arrived.popleft()
            queue.put_nowait(event)


class Choice:
    """One text of a request, on its way."""

    def __init__(
        self,
        batcher: Batcher,
        inbox: Inbox,
        tokenizer: Tokenizer,
        request: Request,
        prompt: list[int],
        limit: int,
        seed: int,
        seconds: float,
        adjust: Callable[[Sequence[int], np.ndarray], np.ndarray] | None,
        top_logprobs: int | None,
        prompt_logprobs: bool,
    ) -> None:
        self.batcher, self.tokenizer = batcher, tokenizer
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.builder = TextBuilder(tokenizer, prompt, request.stops)
        options = GenerateSpec(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
        )
        self.text = Text(
            prompt,
            limit,
            make_sampler(options, seed),
            partial(inbox.put, self.events),
            time.monotonic() + seconds,
            adjust,
            top_logprobs,
            prompt_logprobs,
        )
        self.new_tokens = 0

    async def deltas(self) -> AsyncGenerator[Delta]:
        """The text piece by piece; the last delta has a `finish`. Ending the iteration early cancels the text.

        Raises:
            Broken: see there.
        """
        finish = None
        try:
            while finish is None:
                if (
                    not self.events.empty()
                ):  # `get` would not wait, and a client that has gone would go unnoticed
                    await asyncio.sleep(0)
                event = await self.events.get()
                if event.token is not None:
                    self.new_tokens += 1
                    shown, stopped = self.builder.feed(event.token)
                    finish = "stop" if stopped else None
                    yield Delta(shown, event.logprobs, finish)
                elif event.finish is None:
                    yield Delta("", event.logprobs)
                elif event.finish in ("end", "length"):
                    shown, stopped = self.builder.end()
                    finish = "length" if event.finish == "length" and not stopped else "stop"
                    yield Delta(shown, (), finish)
                else:
                    raise Broken(event.finish, event.message)
        finally:
            self.batcher.cancel(self.text)  # without effect once it has ended


def seeds(given: int | None, count: int) -> list[int]:
    """One for each choice; those of a given seed are the same each time."""
    first = secrets.randbelow(1 << 31) if given is None else given % (1 << 63)
    return [first + index for index in range(count)]
