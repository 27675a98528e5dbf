"""The `generate` command: settle model, options and prompt, then write the text or one JSON document to stdout."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.generate.backend import open_decoder
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


def run(
    loaded: LoadedRecipe | None,
    *,
    model: str | None,
    prompt: str | None,
    prompt_file: Path | None,
    input_file: Path | None,
    sampling: Mapping[str, object],
    seed: int | None,
    decoder: DecoderOptions,
    chat: bool,
    stats: bool,
    json: bool,
    draft: str | None = None,
) -> None:
    """Generate with the model of `model`, of the recipe's run, or of the newest finished run.

    `sampling` holds options of the command line by field name. The others come from the recipe, else from the recipe
    that the model was trained with. All options are checked before a missing model is an error.

    Raises:
        Failure: a wrong option, no prompt, no model; or see `generate`.
    """
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
        text = read_prompt(prompt, prompt_file, input_file, options.prompt)
        if missing:
            raise missing
        generate(
            folder,
            prompt=text,
            options=options,
            decoder=decoder,
            is_input=input_file is not None,
            seed=loaded.recipe.seed if loaded else seed or 0,
            chat=chat,
            stats=stats,
            json=json,
            draft=draft,
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
    chat: bool = True,
    stats: bool = False,
    json: bool = False,
    draft: str | None = None,
) -> None:
    """Generate with the model in `folder`. The text goes to stdout as it grows, or as one JSON document.

    With `is_input` the prompt is the input of an encoder. `draft` is the source of drafts: see `open_drafter`.

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
        ids = encode_prompt(tokenizer, prompt, context, chat, special=description.imported)
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
        result = generate_text(opened, description, tokenizer, ids, options, seed, show, drafter)
    figures = result.stats()
    if json:
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
                "stats": figures,
            }
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
