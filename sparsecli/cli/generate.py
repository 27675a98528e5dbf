"""`sparsecli generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sparsecli.cli.options import (
    AnyModel,
    AutoDtype,
    CacheDtype,
    Keep,
    OptionalRecipe,
    Overrides,
    Seed,
    Threads,
    load_optional_recipe,
    shift,
)

app = typer.Typer()


@app.command(epilog='Example: sparsecli generate --prompt "def " --temperature 0')
def generate(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The text to continue; - reads stdin.", show_default=False),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read the prompt from a file.", show_default=False)
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help="The text that an encoder reads; - is stdin.",
            show_default=False,
        ),
    ] = None,
    model: AnyModel = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Stop after N new tokens; default 128.", show_default=False),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="X", help="Sampling temperature; 0 is greedy; default 0.8.")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(metavar="N", help="Sample from the N likeliest tokens; default 0, which means all."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Sample from the likeliest tokens with total probability X; default 0.95."
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(metavar="X", help="Drop tokens below X times the highest probability; default 0."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="Values above 1 reduce repetition; default 1.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Stop at this text; may be repeated.")
    ] = None,
    seed: Seed = None,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Source of draft tokens for speculative decoding: a small model, lookup (in the text), or self.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Continue every prompt of a file: a JSON string or object with `prompt` in each line; - is stdin.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, max=256, metavar="N", help="Prompts of --prompts decoded together.")
    ] = 8,
    chat: Annotated[bool, typer.Option("--chat", help="Keep a conversation: messages from stdin.")] = False,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="System message of the conversation.", show_default=False),
    ] = None,
    template: Annotated[
        bool,
        typer.Option("--template/--no-template", help="Use the tokenizer's chat template, if it has one."),
    ] = True,
    logprobs: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=100,
            metavar="N",
            help="In JSON, log-probabilities of the tokens and of the N likeliest ones.",
            show_default=False,
        ),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show the speed of prefill and decode.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Write one JSON object at the end.")] = False,
    backend: Annotated[
        Literal["auto", "native", "torch"], typer.Option(help="auto: native if it works here, else torch.")
    ] = "auto",
    dtype: AutoDtype = "auto",
    cache_dtype: Annotated[
        CacheDtype | None, typer.Option(help="KV cache type; default: by --dtype.", show_default=False)
    ] = None,
    threads: Threads = None,
    keep: Keep = True,
) -> None:
    """Continue a prompt, or summarize an input.

    The prompt comes from --prompt, --prompt-file, a pipe, or the recipe. A model with an encoder reads it as its
    input, as with --input. --prompts takes many prompts, --chat keeps a conversation.

    Without --model, the model is that of the recipe's run, else of the newest finished run under runs/. Sampling
    options that are not given come from the recipe, else from the recipe of the model's run.
    """
    loaded = load_optional_recipe(recipe, overrides, seed)
    from sparsecli.generate import command
    from sparsecli.generate.decoder import DecoderOptions
    from sparsecli.recipe.loader import check_unread

    check_unread(shift(recipe, overrides)[1], "generate", {"model", "data", "train", "convert", "bench"})
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or None,
    }
    command.run(
        loaded,
        model=model,
        asked=command.Asked(
            prompt=prompt,
            prompt_file=prompt_file,
            input_file=input_file,
            prompts=prompts,
            batch=batch,
            chat=chat,
            system=system,
            template=template,
            draft=draft,
            logprobs=logprobs,
            stats=stats,
            json=json,
        ),
        sampling={name: value for name, value in sampling.items() if value is not None},
        seed=seed,
        decoder=DecoderOptions(backend, None if dtype == "auto" else dtype, cache_dtype, threads, keep),
    )
