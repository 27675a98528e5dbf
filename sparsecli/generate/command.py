"""The `generate` command: settle model, options and prompt, then write the text or one JSON document to stdout."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.generate.backend import open_decoder
from sparsecli.generate.batch import described, generate_batch
from sparsecli.generate.conversation import converse
from sparsecli.generate.decoder import Decoder, DecoderOptions
from sparsecli.generate.drafts import open_drafter
from sparsecli.generate.prompt import encode_input, encode_prompt, read_prompt
from sparsecli.generate.text import generate_text
from sparsecli.interchange.model_folder import model_folder
from sparsecli.model.files import read_description, recipe_of
from sparsecli.model.tokenizer import read_tokenizer
from sparsecli.recipe.loader import load, with_options
from sparsecli.recipe.schema import GenerateSpec

if TYPE_CHECKING:
    from sparsecli.recipe.loader import LoadedRecipe


@dataclass(frozen=True)
class Asked:
    """What the command line asks for beside sampling and decoding.

    Attributes:
        prompt, prompt_file, input_file: the prompt, where a recipe or a pipe does not hold it; see `read_prompt`.
        prompts: a file of prompts, which are decoded `batch` at a time.
        chat, system: keep a conversation, after a first message of the system.
        template: put the prompt into the tokenizer's chat template, if it has one.
        draft: source of drafts, see `open_drafter`.
        logprobs: how many likeliest tokens to give in JSON with their log-probabilities; None: no log-probabilities.
    """

    prompt: str | None = None
    prompt_file: Path | None = None
    input_file: Path | None = None
    prompts: str | None = None
    batch: int = 8
    chat: bool = False
    system: str | None = None
    template: bool = True
    draft: str | None = None
    logprobs: int | None = None
    stats: bool = False
    json: bool = False

    def check(self) -> None:
        """Raises Failure for options that exclude one another (exit code 2)."""
        one = {
            "--prompt-file": self.prompt_file is not None,
            "--input": self.input_file is not None,
            "--draft": self.draft is not None,
        }
        if self.prompts is not None:
            others = {"--prompt": self.prompt is not None, "--chat": self.chat, "--stats": self.stats}
            _refuse("--prompts", one | others)
        elif self.chat:
            logprobs = self.logprobs is not None
            _refuse(
                "--chat",
                one | {"--json": self.json, "--logprobs": logprobs, "--no-template": not self.template},
            )
        elif self.logprobs is not None:
            _refuse("--logprobs", {"--draft": self.draft is not None})
            if not self.json:
                raise Failure("--logprobs: needs --json or --prompts", exit_code=2)
        if self.system is not None and not self.chat:
            raise Failure("--system: needs --chat", exit_code=2)


def _refuse(option: str, others: Mapping[str, bool]) -> None:
    """Raises Failure where another option is given that cannot be combined with `option`."""
    for other, given in others.items():
        if given:
            raise Failure(f"{option}: cannot be combined with {other}", exit_code=2)


def run(
    loaded: LoadedRecipe | None,
    *,
    model: str | None,
    asked: Asked,
    sampling: Mapping[str, object],
    seed: int | None,
    decoder: DecoderOptions,
) -> None:
    """Generate with the model of `model`, of the recipe's run, or of the newest finished run.

    `sampling` holds options of the command line by field name. The others come from the recipe, else from the recipe
    that the model was trained with. All options are checked before a missing model is an error. Without a recipe or a
    seed, the seed is random.

    Raises:
        Failure: a wrong option, no prompt, no model; or see `generate`.
    """
    asked.check()
    missing: Failure | None = None
    folder = Path()
    with ExitStack() as stack:
        try:
            opened = model_folder(model, loaded.output if loaded else None, decoder.keep)
            folder = stack.enter_context(opened)
        except Failure as failure:
            missing = failure
        defaults = (
            loaded.recipe.generate if loaded else GenerateSpec() if missing else _trained_options(folder)
        )
        options = with_options(defaults, sampling)
        seed = loaded.recipe.seed if loaded else secrets.randbelow(1 << 31) if seed is None else seed
        text = ""
        if not asked.chat and asked.prompts is None:
            text = read_prompt(asked.prompt, asked.prompt_file, asked.input_file, options.prompt)
        if missing:
            raise missing
        if asked.chat:
            converse(
                folder,
                options=options,
                decoder=decoder,
                system=asked.system,
                first=asked.prompt,
                seed=seed,
                stats=asked.stats,
            )
        elif asked.prompts is not None:
            generate_batch(
                folder,
                asked.prompts,
                options=options,
                decoder=decoder,
                seed=seed,
                template=asked.template,
                size=asked.batch,
                top_logprobs=asked.logprobs,
            )
        else:
            generate(
                folder,
                prompt=text,
                options=options,
                decoder=decoder,
                is_input=asked.input_file is not None,
                seed=seed,
                template=asked.template,
                stats=asked.stats,
                json=asked.json,
                draft=asked.draft,
                top_logprobs=asked.logprobs,
            )


def _trained_options(folder: Path) -> GenerateSpec:
    """The `generate:` block of the recipe that the model was trained with, without its prompt; else the defaults."""
    stored = recipe_of(folder)
    return load(str(stored)).recipe.generate.model_copy(update={"prompt": None}) if stored else GenerateSpec()


def generate(
    folder: Path,
    *,
    prompt: str,
    options: GenerateSpec,
    decoder: DecoderOptions,
    is_input: bool = False,
    seed: int = 0,
    template: bool = True,
    stats: bool = False,
    json: bool = False,
    draft: str | None = None,
    top_logprobs: int | None = None,
) -> None:
    """Generate with the model in `folder`. The text goes to stdout as it grows, or as one JSON document.

    With `is_input` the prompt is the input of an encoder. The other arguments are those of `Asked`.

    Raises:
        Failure: a damaged model, a prompt that does not fit, an input for a model without an encoder, or a backend
            that lacks what the options ask for.
    """
    description = read_description(folder)
    context, encoder = description.spec.max_positions, description.spec.encoder
    tokenizer = read_tokenizer(folder, description.spec.vocabulary.size)
    if encoder:
        ids = encode_input(tokenizer, prompt, encoder.max_positions)
    elif is_input:
        raise Failure(f"--input: the model in {folder} has no encoder; give a text to continue with --prompt")
    else:
        ids = encode_prompt(tokenizer, prompt, context, template, special=description.imported)
    show = _ignore if json else _stream
    with ExitStack() as stack:
        opened = stack.enter_context(closing(open_decoder(folder, description, decoder)))
        drafter = None
        if draft is not None:
            capacity = min(len(ids) + options.max_new_tokens, context)
            drafter = open_drafter(
                draft, opened, folder, description, tokenizer, decoder, options, capacity, seed
            )
            stack.callback(drafter.close)
        result = generate_text(
            opened, description, tokenizer, ids, options, seed, show, drafter, top_logprobs
        )
    figures = result.stats()
    if json:
        logprobs = {} if top_logprobs is None else {"logprobs": described(result.logprobs, tokenizer)}
        console.json_out(
            {
                "model": str(folder),
                "backend": opened.name,
                "isa": opened.isa,
                "threads": opened.threads,
                "dtype": opened.dtype,
                "cache_dtype": opened.cache_dtype,
                "prompt": prompt,
                "text": result.text,
                "tokens": result.tokens,
                "finish": result.finish,
                "seed": seed,
                "stats": figures,
            }
            | logprobs
        )
        return
    console.out()
    if result.finish == "context":
        console.warn(f"stopped at the model's context of {context} tokens")
    if stats:
        _show_stats(opened, figures)


def _show_stats(decoder: Decoder, figures: Mapping[str, Any]) -> None:
    console.say(
        f"prefill {figures['prompt_tokens']} tokens in {figures['prefill_ms']:.1f} ms "
        f"({figures['prefill_tokens_per_second']:.0f} tokens/s)"
    )
    if figures["decode_ms_per_token"] is not None:
        console.say(
            f"decode {figures['new_tokens']} tokens, {figures['decode_ms_per_token']:.2f} ms/token "
            f"({figures['decode_tokens_per_second']:.0f} tokens/s)"
        )
    if speculation := figures.get("speculation"):
        console.say(_describe_speculation(speculation))
    plural = "s" if decoder.threads != 1 else ""
    console.say(
        f"{decoder.name} backend, {decoder.isa}, {decoder.threads} thread{plural}, {decoder.dtype} weights, "
        f"{decoder.cache_dtype} cache"
    )


def _describe_speculation(figures: Mapping[str, Any]) -> str:
    passes = f"{figures['passes']} passes of the model"
    if not figures["verifying_passes"]:
        return f"no drafts in {passes}"
    return (
        f"drafts: {figures['acceptance']:.0%} of {figures['drafted_tokens']} tokens accepted, "
        f"{figures['mean_accepted']:.2f} in the mean of {figures['verifying_passes']}; "
        f"{figures['tokens_per_pass']:.2f} tokens per pass in {passes}"
    )


def _stream(text: str) -> None:
    console.out(text, end="")


def _ignore(text: str) -> None:
    """Show nothing: the JSON document carries the text."""
