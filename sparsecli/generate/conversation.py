"""A conversation on a terminal: messages from stdin, answers to stdout, the history in between."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import numpy as np

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.generate.backend import open_decoder
from sparsecli.generate.chat import TemplateProcess
from sparsecli.generate.decoder import Decoder, DecoderOptions
from sparsecli.generate.native_decoder import NativeDecoder
from sparsecli.generate.slots import common
from sparsecli.generate.text import Generation, generate_text
from sparsecli.model.files import read_description
from sparsecli.model.tokenizer import read_tokenizer
from sparsecli.recipe.schema import GenerateSpec

LONGEST = 8192
"""Tokens of a conversation at most; the oldest messages are left out beyond it, or beyond the model's context."""
LEAST_ANSWER = 64
"""Tokens that old messages leave to an answer, or `max_new_tokens`, if they are fewer."""
HELP = "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"


class Continued(Decoder):
    """A decoder that keeps what its sequence holds when the next prompt begins with it: see `Decoder`.

    Args:
        room: the sequence's capacity.
    """

    def __init__(self, decoder: Decoder, room: int) -> None:
        self.decoder, self.room = decoder, room
        self.name, self.isa, self.threads = decoder.name, decoder.isa, decoder.threads
        self.dtype, self.cache_dtype = decoder.dtype, decoder.cache_dtype
        self.held: list[int] = []

    def prefill(self, prompt: Sequence[int], capacity: int) -> np.ndarray:
        """As in `Decoder`."""
        length, logits = common(prompt[:-1], self.held), None
        native = (
            self.decoder if isinstance(self.decoder, NativeDecoder) and not self.decoder.prefiller else None
        )
        if native and native.sequence and length:
            with suppress(Failure):  # a sliding window does not hold so much any more
                native.truncate(length)
                logits = native.engine.prefill(native.sequence, prompt[length:])
        if logits is None:
            logits = self.decoder.prefill(prompt, self.room)
        self.held = list(prompt)
        return logits

    def step(self, token: int) -> np.ndarray:
        """As in `Decoder`."""
        self.held.append(token)
        return self.decoder.step(token)

    def close(self) -> None:
        """As in `Decoder`."""
        self.decoder.close()


class Conversation:
    """A model and what was said.

    Args:
        system: the first message, in the role `system`; None: none.
    """

    def __init__(
        self, folder: Path, options: GenerateSpec, decoder: DecoderOptions, system: str | None, seed: int
    ) -> None:
        self.model = read_description(folder)
        if self.model.spec.encoder:
            raise Failure(f"{folder}: has an encoder; --chat needs a decoder-only model")
        self.tokenizer = read_tokenizer(folder, self.model.spec.vocabulary.size)
        if self.tokenizer.template is None:
            raise Failure(f"{folder}: the tokenizer has no chat template; --prompt continues a text")
        self.options, self.seed = options, seed
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.history: list[dict[str, str]] = []
        with ExitStack() as stack:
            self.room = min(self.model.spec.max_positions, LONGEST)
            opened = Continued(open_decoder(folder, self.model, decoder), self.room)
            self.decoder = stack.enter_context(closing(opened))
            self.template = TemplateProcess(self.tokenizer.template, self.tokenizer.named)
            stack.callback(self.template.close)
            self._open = stack.pop_all()

    def close(self) -> None:
        """Free memory and processes."""
        self._open.close()

    def answer(self, message: str) -> Generation:
        """Write the answer to stdout as it grows. Ctrl-C ends it, and the conversation goes on with what there is.

        Raises:
            Failure: the template fails, or the message alone is longer than the context.
        """
        self.history.append({"role": "user", "content": message})
        try:
            ids = self._encode()
        except Failure:
            self.history.pop()
            raise
        said: list[str] = []

        def show(text: str) -> None:
            said.append(text)
            console.out(text, end="")

        most = min(self.options.max_new_tokens, self.room - len(ids))
        options = self.options.model_copy(update={"max_new_tokens": most})
        try:
            result = generate_text(self.decoder, self.model, self.tokenizer, ids, options, self.seed, show)
        except KeyboardInterrupt:
            result = Generation(prompt_tokens=len(ids), finish="interrupted")
        console.out()
        self.seed += 1
        self.history.append({"role": "assistant", "content": "".join(said)})
        return result

    def reset(self) -> None:
        """Forget everything but the system's message."""
        self.history = []

    def _encode(self) -> list[int]:
        """Token ids of the chat; the oldest messages are left out where the context is too short for all."""
        least = min(LEAST_ANSWER, self.options.max_new_tokens)
        dropped = False
        while True:
            text = self.template.render([*self.system, *self.history])
            ids = self.tokenizer.encode(text, names_are_text=False)
            if len(ids) + least <= self.room:
                break
            if len(self.history) < 3:
                raise Failure(f"the message is too long for the context of {self.room} tokens")
            self.history, dropped = self.history[2:], True
        if dropped:
            console.say("the context is full: the oldest messages are left out")
        return ids


def converse(
    folder: Path,
    *,
    options: GenerateSpec,
    decoder: DecoderOptions,
    system: str | None,
    first: str | None,
    seed: int,
    stats: bool,
) -> None:
    """Answer message after message, until /exit or the end of stdin.

    Args:
        first: a message before those of stdin.
    Raises:
        Failure: the model has an encoder or no chat template, or does not load.
    """
    with closing(Conversation(folder, options, decoder, system, seed)) as talk:
        if sys.stdin.isatty():
            console.say(HELP)
        for message in _messages(first):
            if message == "/reset":
                talk.reset()
            elif message.startswith("/"):
                console.say(f"{message}: no such command; {HELP}")
            else:
                try:
                    result = talk.answer(message)
                except Failure as failure:
                    console.fail(failure)
                    continue
                if stats and result.step_seconds:
                    speed = result.stats()["decode_tokens_per_second"]
                    console.say(f"{len(result.tokens)} tokens, {speed:.0f} tokens/s")


def _messages(first: str | None) -> Iterator[str]:
    """Lines of stdin that are not empty, up to /exit."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  edits the line, and recalls earlier ones
    if first is not None:
        yield first
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            return
        if (not line and not sys.stdin.isatty()) or line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()
