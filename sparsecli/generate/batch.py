"""Many prompts from a file, decoded together; the answers are lines of JSON in the order of the prompts."""

from __future__ import annotations

import json
import queue
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.decode.native import binding
from sparsecli.generate.backend import open_decoder
from sparsecli.generate.batcher import Batcher, Event, Text
from sparsecli.generate.decoder import DecoderOptions
from sparsecli.generate.native_decoder import open_engine
from sparsecli.generate.prompt import encode_prompt
from sparsecli.generate.sampling import TokenLogprobs, make_sampler
from sparsecli.generate.text import TextBuilder, generate_text
from sparsecli.model.files import Description, parse_json, read_description
from sparsecli.model.tokenizer import Tokenizer, read_tokenizer
from sparsecli.recipe.schema import GenerateSpec


@dataclass
class Answered:
    """One prompt and what followed it.

    Attributes:
        entry: what the answer's line begins with: the fields of the prompt's line.
        seed: of its sampling.
        finish: as in `Generation`; empty while the text grows.
    """

    entry: dict[str, Any]
    ids: list[int]
    seed: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str = ""

    def line(self, tokenizer: Tokenizer, with_logprobs: bool) -> str:
        """The answer as JSON."""
        found = self.entry | {
            "text": self.text,
            "tokens": self.tokens,
            "finish": self.finish,
            "seed": self.seed,
            "prompt_tokens": len(self.ids),
        }
        if with_logprobs:
            found["logprobs"] = described(self.logprobs[: len(self.tokens)], tokenizer)
        return json.dumps(found, ensure_ascii=False)


def described(found: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Log-probabilities for JSON: of each token, and of the likeliest ones with their ids and texts."""

    def text(token: int) -> str:
        return tokenizer.bytes_of(token).decode(errors="replace")

    return [
        {
            "token": each.token,
            "text": text(each.token),
            "logprob": each.logprob,
            "top": [{"token": token, "text": text(token), "logprob": value} for token, value in each.top],
        }
        for each in found
    ]


def generate_batch(
    folder: Path,
    source: str,
    *,
    options: GenerateSpec,
    decoder: DecoderOptions,
    seed: int,
    template: bool,
    size: int,
    top_logprobs: int | None,
) -> None:
    """Continue every prompt of a file and write a line of JSON for each.

    Args:
        source: a file of lines, each a JSON string or an object with `prompt`, whose other fields are passed on; `-`
            is stdin.
        seed: of the first prompt; the next ones count on.
        size: texts that the engine decodes together. PyTorch, and models with hashed attention, take one at a time.
    Raises:
        Failure: a line that is no prompt, or whose prompt does not fit (the message names it), or a model that does
            not load.
    """
    model = read_description(folder)
    if model.spec.encoder:
        raise Failure(f"{folder}: has an encoder; --prompts needs a decoder-only model")
    tokenizer = read_tokenizer(folder, model.spec.vocabulary.size)
    texts: list[Answered] = []
    for number, entry in read_prompts(source):
        try:
            ids = encode_prompt(
                tokenizer, entry["prompt"], model.spec.max_positions, template, special=model.imported
            )
        except Failure as failure:
            raise Failure(f"{_place(source)}:{number}: {failure.message}") from None
        texts.append(Answered(entry, ids, seed + len(texts)))
    together = decoder.backend != "torch" and binding.available() is None and not model.spec.attention.hashing
    inputs = folder, model, tokenizer, texts, options, decoder, top_logprobs
    begun = time.perf_counter()
    for text in _together(*inputs, size) if together else _one_by_one(*inputs):
        console.out(text.line(tokenizer, top_logprobs is not None))
    seconds, count = time.perf_counter() - begun, sum(len(text.tokens) for text in texts)
    console.say(
        f"{len(texts)} prompts, {count} new tokens in {seconds:.1f} s ({count / seconds:.0f} tokens/s)"
    )


def read_prompts(source: str) -> list[tuple[int, dict[str, Any]]]:
    """The prompts of a file with the numbers of their lines. Raises Failure with the line that is wrong."""
    raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    found = []
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
        except ValueError:
            entry = None
        entry = {"prompt": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise Failure(
                f"{_place(source)}:{number}: expected a JSON string, or an object with a text as `prompt`"
            )
        found.append((number, entry))
    if not found:
        raise Failure(f"{_place(source)}: holds no prompts; give a line of JSON for each")
    return found


def _place(source: str) -> str:
    return "stdin" if source == "-" else source


def _one_by_one(
    folder: Path,
    model: Description,
    tokenizer: Tokenizer,
    texts: Sequence[Answered],
    options: GenerateSpec,
    decoder: DecoderOptions,
    top_logprobs: int | None,
) -> Iterator[Answered]:
    with closing(open_decoder(folder, model, decoder)) as opened:
        for text in texts:
            result = generate_text(
                opened,
                model,
                tokenizer,
                text.ids,
                options,
                text.seed,
                lambda _: None,
                top_logprobs=top_logprobs,
            )
            text.text, text.tokens, text.finish = result.text, result.tokens, result.finish
            text.logprobs = result.logprobs
            yield text


def _together(
    folder: Path,
    model: Description,
    tokenizer: Tokenizer,
    texts: Sequence[Answered],
    options: GenerateSpec,
    decoder: DecoderOptions,
    top_logprobs: int | None,
    size: int,
) -> Iterator[Answered]:
    engine = open_engine(folder, model, decoder)
    context = model.spec.max_positions
    capacity = min(max(len(text.ids) for text in texts) + options.max_new_tokens, context)
    batcher = Batcher(engine, min(size, len(texts)), capacity, len(texts), model.end_tokens)
    events: queue.Queue[tuple[int, Event]] = queue.Queue()
    builders = [TextBuilder(tokenizer, text.ids, options.stop) for text in texts]

    def asked(index: int, text: Answered) -> Text:
        limit = min(options.max_new_tokens, context - len(text.ids))
        sampler = make_sampler(options, text.seed)
        return Text(
            text.ids,
            limit,
            sampler,
            lambda event: events.put((index, event)),
            float("inf"),
            None,
            top_logprobs,
        )

    asked_texts = [asked(index, text) for index, text in enumerate(texts)]
    try:
        batcher.submit(asked_texts)
        for text in texts:
            while not text.finish:
                index, event = events.get()
                _take(texts[index], event, builders[index], options, context)
                if texts[index].finish:
                    batcher.cancel(asked_texts[index])
            yield text
    finally:
        batcher.stop(0)
        engine.close()


def _take(text: Answered, event: Event, builder: TextBuilder, options: GenerateSpec, context: int) -> None:
    """Add an event to a text. Raises Failure for an error of the engine."""
    if text.finish:
        return
    if event.token is not None:
        text.tokens.append(event.token)
        text.logprobs += event.logprobs
        shown, stopped = builder.feed(event.token)
        text.text += shown
        text.finish = "stop" if stopped else ""
    elif event.finish == "error":
        raise Failure(event.message)
    elif event.finish:
        shown, stopped = builder.end()
        text.text += shown
        full = event.finish == "length" and len(text.ids) + len(text.tokens) >= context
        short = len(text.tokens) < options.max_new_tokens
        text.finish = "stop" if stopped else "context" if full and short else event.finish
