"""Write text from a prompt or an input: streaming that never cuts a character, stop strings, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Any, Literal

from sparsecli import console
from sparsecli.backends import Backend, Choices, open_backend
from sparsecli.console import Failure
from sparsecli.model.files import Description, find_model, read_description
from sparsecli.model.tokenizer import Tokenizer, read_tokenizer
from sparsecli.recipe.schema import GenerateSpec
from sparsecli.sampling import Sampler, make_sampler
from sparsecli.spec.vocabulary import END, PADDING, START

if TYPE_CHECKING:
    from sparsecli.recipe.loader import LoadedRecipe


class StopFilter:
    """Passes text on, but holds back what may be the beginning of a stop string.

    Special tokens are not shown, but a stop string may name them.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self.held = ""
        self.visible: list[bool] = []

    def feed(self, text: str, special: bool = False) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string was met (it and all behind it are dropped).

        With `special` the text is that of a special token; it counts where a stop string has it.
        """
        if not special or any(text in stop for stop in self.stops):
            self.held += text
            self.visible += [not special] * len(text)
        met = [position for stop in self.stops if (position := self.held.find(stop)) >= 0]
        if met:
            shown = self._release(min(met))
            self._release(len(self.held))
            return shown, True
        longest = max((self._overlap(stop) for stop in self.stops), default=0)
        return self._release(len(self.held) - longest), False

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        return next(
            (
                size
                for size in range(min(len(stop), len(self.held)), 0, -1)
                if self.held.endswith(stop[:size])
            ),
            0,
        )

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        return self._release(len(self.held))

    def _release(self, size: int) -> str:
        shown = "".join(compress(self.held[:size], self.visible))
        self.held, self.visible = self.held[size:], self.visible[size:]
        return shown


@dataclass
class Generation:
    """What was written, and how long it took."""

    prompt_tokens: int
    """Tokens of the prompt, or of the input that an encoder read."""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = "length"  # length | context | end | stop
    prefill_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)

    def stats(self) -> dict[str, Any]:
        """Figures of `--stats` and `--json`; None where nothing was measured."""
        steps = sorted(self.step_seconds)
        median = steps[len(steps) // 2] if steps else None
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
            "prefill_ms": 1e3 * self.prefill_seconds,
            "prefill_tokens_per_second": self.prompt_tokens / self.prefill_seconds,
            "decode_ms_per_token": 1e3 * median if median else None,
            "decode_tokens_per_second": 1 / median if median else None,
        }


def decode(
    backend: Backend,
    prompt: Sequence[int],
    begun: Sequence[int],
    sampler: Sampler,
    limit: int,
    result: Generation,
) -> Iterator[int]:
    """Yield up to `limit` (at least 1) new tokens after `begun`; timings go to `result`.

    The text has begun with the prompt, or with the start token where an encoder reads the prompt.
    """
    tokens = list(begun)
    started = time.perf_counter()
    tokens.append(sampler(tokens, backend.start(prompt, capacity=len(begun) + limit)))
    result.prefill_seconds = time.perf_counter() - started
    yield tokens[-1]
    for _ in range(limit - 1):
        started = time.perf_counter()
        tokens.append(sampler(tokens, backend.step(tokens[-1])))
        result.step_seconds.append(time.perf_counter() - started)
        yield tokens[-1]


def write(
    backend: Backend,
    model: Description,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    options: GenerateSpec,
    seed: int,
    show: Callable[[str], None],
) -> Generation:
    """Generate after the token ids `prompt`, handing text to `show` as soon as its characters are whole.

    A model with an encoder reads them, and then writes from the beginning. A character that the model leaves
    unfinished at the very end is not shown.
    """
    result = Generation(prompt_tokens=len(prompt))
    begun = [START] if model.spec.encoder else list(prompt)
    room = model.spec.max_positions - len(begun)
    limit = min(options.max_new_tokens, room)
    stream = tokenizer.stream(begun)
    stops = StopFilter(options.stop)
    stopped = False

    def emit(text: str) -> None:
        result.text += text
        if text:
            show(text)

    for token in decode(backend, prompt, begun, make_sampler(options, seed), limit, result):
        if token in model.end_tokens:
            result.finish = "end"
            break
        result.tokens.append(token)
        special = tokenizer.special.get(token)
        text, stopped = stops.feed(special, special=True) if special else stops.feed(stream.feed(token))
        emit(text)
        if stopped:
            result.finish = "stop"
            break
    if not stopped:
        text, stopped = stops.feed(stream.flush())
        emit(text + stops.flush())
        result.finish = "stop" if stopped else result.finish
    if result.finish == "length" and room < options.max_new_tokens:
        result.finish = "context"
    return result


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, context: int, chat: bool = True, special: bool = False
) -> list[int]:
    """Token ids of `prompt`, through the chat template if the tokenizer has one and `chat` asks for it.

    Without a template, `special` adds the tokens that the tokenizer puts around a text.

    Raises:
        Failure: nothing to go on from, or no room left in the model's context.
    """
    if not prompt:
        raise Failure("the prompt is empty; give some text to go on from")
    chatting = chat and tokenizer.template
    ids = tokenizer.encode_chat(prompt) if chatting else tokenizer.encode(prompt, special)
    if not ids:
        raise Failure("the prompt has nothing in it that the tokenizer knows; give some other text")
    if len(ids) >= context:
        raise Failure(
            f"the prompt has {len(ids)} tokens, the model's context is {context} with at least one to be written; "
            "shorten the prompt"
        )
    return ids


def encode_input(tokenizer: Tokenizer, text: str, positions: int) -> list[int]:
    """Token ids of what an encoder of so many positions reads, with the tokenizer's end token.

    The beginning of an input that is too long, with a warning.

    Raises:
        Failure: nothing to read, or something that the tokenizer does not know.
    """
    if not text.strip():
        raise Failure("the input is empty; give some text to read")
    ids = tokenizer.encode(text, special=True)
    if {PADDING, END} & {*ids[:-1]}:  # a vocabulary of symbols has nothing else for what is none of them
        unknown = [word for word in text.split() if {PADDING, END} & {*tokenizer.encode(word)}]
        raise Failure(
            f"the input has words that the tokenizer does not know: {' '.join(unknown[:5])}; leave them out"
        )
    if len(ids) > positions:
        console.warn(f"the input has {len(ids)} tokens; the model reads the first {positions}")
        ids = [*ids[: positions - 1], ids[-1]]
    return ids


def run(
    loaded: LoadedRecipe | None,
    *,
    model: str | None,
    prompt: str,
    is_input: bool = False,
    options: GenerateSpec,
    seed: int = 0,
    stats: bool = False,
    json: bool = False,
    backend: Literal["auto", "native", "torch"] = "auto",
    dtype: str | None = None,
    cache_dtype: str | None = None,
    threads: int | None = None,
    chat: bool = True,
) -> None:
    """The `generate` command: text to stdout as it is written, or one JSON document.

    Raises:
        Failure: no model, a damaged one, a prompt that does not fit, an input for a model without an encoder, or a
            backend that cannot do what is asked.
    """
    folder = find_model(model, loaded.output if loaded else None)
    description = read_description(folder)
    context = description.spec.max_positions
    tokenizer = read_tokenizer(folder, description.spec.vocabulary.size)
    encoder = description.spec.encoder
    if encoder:
        ids = encode_input(tokenizer, prompt, encoder.max_positions)
    elif is_input:
        raise Failure(
            f"--input: the model in {folder} has no encoder; give what it goes on from with --prompt"
        )
    else:
        ids = encode_prompt(tokenizer, prompt, context, chat, special=description.imported)
    choices = Choices(backend, dtype, cache_dtype, threads)
    with closing(open_backend(folder, description, choices)) as decoder:
        result = write(decoder, description, tokenizer, ids, options, seed, _ignore if json else _stream)
    figures = result.stats()
    if json:
        console.json_out(
            {
                "model": str(folder),
                "backend": decoder.name,
                "isa": decoder.isa,
                "threads": decoder.threads,
                "dtype": decoder.dtype,
                "cache_dtype": decoder.cache_dtype,
                "prompt": prompt,
                "text": result.text,
                "tokens": result.tokens,
                "finish": result.finish,
                "stats": figures,
            }
        )
        return
    console.out()
    if result.finish == "context":
        console.warn(f"stopped at the model's context of {context} tokens")
    if stats:
        console.say(
            f"prefill {figures['prompt_tokens']} tokens in {figures['prefill_ms']:.1f} ms "
            f"({figures['prefill_tokens_per_second']:.0f} tokens/s)"
        )
        if figures["decode_ms_per_token"] is not None:
            console.say(
                f"decode {figures['new_tokens']} tokens, {figures['decode_ms_per_token']:.2f} ms/token "
                f"({figures['decode_tokens_per_second']:.0f} tokens/s)"
            )
        plural = "s" if decoder.threads != 1 else ""
        console.say(
            f"{decoder.name} backend, {decoder.isa}, {decoder.threads} thread{plural}, {decoder.dtype} weights, "
            f"{decoder.cache_dtype} cache"
        )


def _stream(text: str) -> None:
    console.out(text, end="")


def _ignore(text: str) -> None:
    """Show nothing while writing; the JSON document carries the text."""
