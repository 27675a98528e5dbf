"""Write text from a prompt: sampling, streaming that never cuts a character, and stop strings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging as transformers_logging

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.model.cache import DecodeCache
from sparsecli.model.checkpoint import find_model, load_model
from sparsecli.recipe.schema import GenerateSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
    from sparsecli.recipe.loader import LoadedRecipe

Sampler = Callable[[Tensor, Tensor], int]


def make_sampler(options: GenerateSpec, seed: int) -> Sampler:
    """A function from token ids (1, T) and logits (1, V) to the next token; all randomness comes from `seed`."""
    processors = LogitsProcessorList()
    if options.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.temperature == 0:
        return lambda ids, logits: int(processors(ids, logits).argmax())
    if options.temperature != 1:
        processors.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        processors.append(MinPLogitsWarper(options.min_p))
    generator = torch.Generator().manual_seed(seed)

    def sample(ids: Tensor, logits: Tensor) -> int:
        probabilities = processors(ids, logits).softmax(dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=generator))

    return sample


class StopFilter:
    """Passes text on, but holds back what may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self.held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string was met (it and all behind it are dropped)."""
        self.held += text
        met = [position for stop in self.stops if (position := self.held.find(stop)) >= 0]
        if met:
            shown, self.held = self.held[: min(met)], ""
            return shown, True
        longest = max((self._overlap(stop) for stop in self.stops), default=0)
        cut = len(self.held) - longest
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown, False

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
        shown, self.held = self.held, ""
        return shown


@dataclass
class Generation:
    """What was written, and how long it took."""

    prompt_tokens: int
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


@torch.inference_mode()
def decode(
    model: ScalingTransformerForCausalLM,
    prompt: Sequence[int],
    sampler: Sampler,
    limit: int,
    result: Generation,
) -> Iterator[int]:
    """Yield up to `limit` new tokens after `prompt`; timings go to `result`."""
    ids = torch.tensor([list(prompt)])
    cache = DecodeCache(model.config.layers, capacity=len(prompt) + limit)
    step = ids
    for index in range(limit):
        started = time.perf_counter()
        logits = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        token = sampler(ids, logits)
        elapsed = time.perf_counter() - started
        if index == 0:
            result.prefill_seconds = elapsed
        else:
            result.step_seconds.append(elapsed)
        yield token
        step = torch.tensor([[token]])
        ids = torch.cat((ids, step), dim=1)


def write(
    model: ScalingTransformerForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    options: GenerateSpec,
    seed: int,
    show: Callable[[str], None],
) -> Generation:
    """Generate after the token ids `prompt`, handing text to `show` as soon as its characters are whole.

    A character that the model leaves unfinished at the very end is not shown.
    """
    result = Generation(prompt_tokens=len(prompt))
    room = model.config.max_positions - len(prompt)
    ends = model.config.eos_token_id
    end_tokens = set(ends if isinstance(ends, list) else [ends])
    # The prompt decides how the first token reads, for instance whether a space stands before it.
    stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
    stops = StopFilter(options.stop)
    stopped = False

    def emit(text: str) -> None:
        result.text += text
        if text:
            show(text)

    for token in decode(
        model, prompt, make_sampler(options, seed), min(options.max_new_tokens, room), result
    ):
        if token in end_tokens:
            result.finish = "end"
            break
        result.tokens.append(token)
        text, stopped = stops.feed(stream.step(tokenizer._tokenizer, token) or "")
        emit(text)
        if stopped:
            result.finish = "stop"
            break
    if not stopped:
        emit(stops.flush())
    if result.finish == "length" and room < options.max_new_tokens:
        result.finish = "context"
    return result


def encode_prompt(
    model: ScalingTransformerForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool = True
) -> list[int]:
    """Token ids of `prompt`, through the chat template if the tokenizer has one and `chat` asks for it.

    Raises:
        Failure: nothing to go on from, or no room left in the model's context.
    """
    if not prompt:
        raise Failure("the prompt is empty; give some text to go on from")
    if chat and tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    else:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]  # as the training text was encoded
    limit = model.config.max_positions
    if len(ids) >= limit:
        raise Failure(
            f"the prompt has {len(ids)} tokens, the model's context is {limit} with at least one to be written; "
            "shorten the prompt"
        )
    return list(ids)


def run(
    loaded: LoadedRecipe | None,
    *,
    model: str | None,
    prompt: str,
    options: GenerateSpec,
    seed: int = 0,
    stats: bool = False,
    json: bool = False,
    dtype: str = "float32",
    threads: int | None = None,
    chat: bool = True,
) -> None:
    """The `generate` command: text to stdout as it is written, or one JSON document.

    Raises:
        Failure: no model, a damaged one, or a prompt that does not fit.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = find_model(model, loaded.output if loaded else None)
    network, tokenizer = load_model(folder, getattr(torch, dtype))
    ids = encode_prompt(network, tokenizer, prompt, chat)
    result = write(network, tokenizer, ids, options, seed, _ignore if json else _stream)
    figures = result.stats()
    if json:
        console.json_out(
            {
                "model": str(folder),
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
        console.warn(f"stopped at the model's context of {network.config.max_positions} tokens")
    if stats:
        console.say(
            f"prefill {figures['prompt_tokens']} tokens in {figures['prefill_ms']:.1f} ms "
            f"({figures['prefill_tokens_per_second']:.0f} tokens/s)"
        )
        if figures["decode_ms_per_token"] is not None:
            console.say(
                f"decode {figures['new_tokens']} tokens, {figures['decode_ms_per_token']:.2f} ms/token "
                f"({figures['decode_tokens_per_second']:.0f} tokens/s, {dtype}, torch backend)"
            )


def _stream(text: str) -> None:
    console.out(text, end="")


def _ignore(text: str) -> None:
    """Show nothing while writing; the JSON document carries the text."""
