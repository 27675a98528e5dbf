"""Text from a decoder, token by token: characters are shown whole, and stop strings end it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Any

from sparsecli.generate.decoder import Decoder
from sparsecli.generate.drafts import Drafter
from sparsecli.generate.native_decoder import NativeDecoder
from sparsecli.generate.sampling import Sampler, TokenLogprobs, logprobs_of, make_sampler
from sparsecli.generate.speculation import SpeculationStats, speculate
from sparsecli.model.files import Description
from sparsecli.model.tokenizer import Tokenizer
from sparsecli.recipe.schema import GenerateSpec
from sparsecli.spec.vocabulary import START

if TYPE_CHECKING:
    import numpy as np


class StopFilter:
    """Passes text on, but holds back a suffix that may begin a stop string.

    Special tokens are not shown, but a stop string may name them.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self.held = ""
        self.visible: list[bool] = []

    def feed(self, text: str, special: bool = False) -> tuple[str, bool]:
        """Return text that is safe to show, and whether a stop string was found. Text from there on is dropped.

        With `special`, `text` is the name of a special token. It counts only where a stop string contains it.
        """
        if not special or any(text in stop for stop in self.stops):
            self.held += text
            self.visible += [not special] * len(text)
        found = [position for stop in self.stops if (position := self.held.find(stop)) >= 0]
        if found:
            shown = self._release(min(found))
            self._release(len(self.held))
            return shown, True
        longest = max((self._overlap(stop) for stop in self.stops), default=0)
        return self._release(len(self.held) - longest), False

    def _overlap(self, stop: str) -> int:
        """Length of the longest suffix of the held text that is a prefix of `stop`."""
        sizes = range(min(len(stop), len(self.held)), 0, -1)
        return next((size for size in sizes if self.held.endswith(stop[:size])), 0)

    def flush(self) -> str:
        """The text that was held back, once no more text comes."""
        return self._release(len(self.held))

    def _release(self, size: int) -> str:
        shown = "".join(compress(self.held[:size], self.visible))
        self.held, self.visible = self.held[size:], self.visible[size:]
        return shown


class TextBuilder:
    """The text of tokens that follow `prefix`, one after the other: whole characters, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, prefix: Sequence[int], stops: Sequence[str]) -> None:
        self.special = tokenizer.special
        self.stream = tokenizer.stream(prefix)
        self.stops = StopFilter(stops)

    def feed(self, token: int) -> tuple[str, bool]:
        """The text that can be shown after `token`, and whether a stop string ended it."""
        if name := self.special.get(token):
            return self.stops.feed(name, special=True)
        return self.stops.feed(self.stream.feed(token))

    def end(self) -> tuple[str, bool]:
        """The text that was held back, once no more tokens come; a character that is unfinished is left out."""
        text, stopped = self.stops.feed(self.stream.flush())
        return text + self.stops.flush(), stopped


@dataclass
class Generation:
    """The new tokens, their text, and the time they took."""

    prompt_tokens: int
    """Tokens of the prompt, or of the encoder's input."""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = "length"  # length | context | end | stop
    prefill_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    """Seconds of each step; with speculative decoding, of each pass, for any number of tokens."""
    speculation: SpeculationStats | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the tokens, where they were asked for."""

    def stats(self) -> dict[str, Any]:
        """Figures of `--stats` and `--json`; None where nothing was measured."""
        steps = sorted(self.step_seconds)
        seconds = steps[len(steps) // 2] if steps else None
        if self.speculation and steps:  # passes give different numbers of tokens
            seconds = sum(steps) / self.speculation.tokens
        figures = {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
            "prefill_ms": 1e3 * self.prefill_seconds,
            "prefill_tokens_per_second": self.prompt_tokens / self.prefill_seconds,
            "decode_ms_per_token": 1e3 * seconds if seconds else None,
            "decode_tokens_per_second": 1 / seconds if seconds else None,
        }
        return figures | ({"speculation": self.speculation.figures()} if self.speculation else {})


def decode(
    decoder: Decoder,
    prompt: Sequence[int],
    prefix: Sequence[int],
    sampler: Sampler,
    limit: int,
    result: Generation,
    top_logprobs: int | None = None,
) -> Iterator[int]:
    """Yield up to `limit` (at least 1) new tokens after `prefix`; timings and logprobs go to `result`.

    The prefix is the prompt, or the start token where an encoder reads the prompt.
    """
    tokens = list(prefix)

    def sample(logits: np.ndarray) -> None:
        tokens.append(sampler(tokens, logits))
        if top_logprobs is not None:
            result.logprobs.append(logprobs_of(logits, tokens[-1], top_logprobs))

    started = time.perf_counter()
    sample(decoder.prefill(prompt, capacity=len(prefix) + limit))
    result.prefill_seconds = time.perf_counter() - started
    yield tokens[-1]
    for _ in range(limit - 1):
        started = time.perf_counter()
        sample(decoder.step(tokens[-1]))
        result.step_seconds.append(time.perf_counter() - started)
        yield tokens[-1]


def generate_text(
    decoder: Decoder,
    model: Description,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    options: GenerateSpec,
    seed: int,
    show: Callable[[str], None],
    drafter: Drafter | None = None,
    top_logprobs: int | None = None,
) -> Generation:
    """Generate after the token ids `prompt`, and pass text to `show` as soon as its characters are whole.

    A model with an encoder encodes the prompt and generates from the start token. A character that is unfinished at
    the end is not shown. With a `drafter` the decoder checks its drafts. `top_logprobs` asks for log-probabilities of
    the tokens and of so many likeliest ones; drafts do not allow it.
    """
    result = Generation(prompt_tokens=len(prompt))
    prefix = [START] if model.spec.encoder else list(prompt)
    room = model.spec.max_positions - len(prefix)
    limit = min(options.max_new_tokens, room)
    builder = TextBuilder(tokenizer, prefix, options.stop)
    stopped = False

    def emit(text: str) -> None:
        result.text += text
        if text:
            show(text)

    sampler = make_sampler(options, seed)
    if drafter:
        assert isinstance(decoder, NativeDecoder)
        decoded = speculate(decoder, drafter, prompt, options, sampler, seed, limit, result)
    else:
        decoded = decode(decoder, prompt, prefix, sampler, limit, result, top_logprobs)
    for token in decoded:
        if token in model.end_tokens:
            result.finish = "end"
            break
        result.tokens.append(token)
        text, stopped = builder.feed(token)
        emit(text)
        if stopped:
            result.finish = "stop"
            break
    if not stopped:
        text, stopped = builder.end()
        emit(text)
        result.finish = "stop" if stopped else result.finish
    del result.logprobs[len(result.tokens) :]  # an end token is not part of the text
    if result.finish == "length" and room < options.max_new_tokens:
        result.finish = "context"
    return result
