"""`sparsecli evaluate`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from sparsecli.cli.options import (
    AnyModel,
    AutoDtype,
    CacheDtype,
    Keep,
    OptionalRecipe,
    Overrides,
    Threads,
    load_optional_recipe,
    shift,
)

app = typer.Typer()


@app.command(epilog="Example: sparsecli evaluate --model smollm2 --text book.txt --against smollm2-int8")
def evaluate(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    model: AnyModel = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Text, JSON, CSV, Parquet or Arrow, or a glob; default: the recipe's held-out text.",
            show_default=False,
        ),
    ] = None,
    text_field: Annotated[
        str, typer.Option(metavar="NAME", help="Column that holds the text, in files of rows.")
    ] = "text",
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Tokens of a window; default: 512, or a shorter context.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Read at most N tokens of the text.", show_default=False),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Another model, to compare with.", show_default=False),
    ] = None,
    backend: Annotated[
        Literal["auto", "native", "torch"], typer.Option(help="auto: native if it works here, else torch.")
    ] = "auto",
    dtype: AutoDtype = "auto",
    against_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "int8", "int4"] | None,
        typer.Option(
            help="Weight type of the other model; default: as packed, else --dtype.", show_default=False
        ),
    ] = None,
    cache_dtype: Annotated[
        CacheDtype | None, typer.Option(help="KV cache type; default: by --dtype.", show_default=False)
    ] = None,
    threads: Threads = None,
    keep: Keep = True,
    json: Annotated[bool, typer.Option("--json", help="Write one JSON object.")] = False,
) -> None:
    """Measure loss on text, or accuracy on images.

    The loss is given in nats per token, as perplexity, and in bits per byte. With --against, so is the difference
    to another model's loss on the same text, with its standard error. Without --model, the model is that of the
    recipe's run, else of the newest finished run under runs/. Without --text, the text is what the recipe, or that
    of the model's run, holds out. So are the images that a model of images classifies.
    """
    loaded = load_optional_recipe(recipe, overrides, None)
    from sparsecli.data.corpus import matching
    from sparsecli.interchange.hub import check_reference
    from sparsecli.recipe.loader import check_unread

    check_unread(shift(recipe, overrides)[1], "evaluate", {"model", "train", "convert", "generate", "bench"})
    if text is not None:
        matching(text, "--text")
    for reference in (model, against):
        check_reference(reference)
    from sparsecli.evaluate import command
    from sparsecli.generate.decoder import DecoderOptions

    command.run(
        loaded,
        model=model,
        text=text,
        text_field=text_field,
        window=window,
        tokens=tokens,
        against=against,
        against_dtype=against_dtype,
        decoder=DecoderOptions(backend, None if dtype == "auto" else dtype, cache_dtype, threads, keep),
        json=json,
    )
