"""`sparsecli sparsify-convert`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sparsecli.cli.options import (
    AsJson,
    DryRun,
    Format,
    Html,
    OptionalRecipe,
    Output,
    Overrides,
    Plot,
    Saved,
    Seed,
    check_alone,
    leave_imports_alone,
    load_recipe,
)
from sparsecli.console import Failure

app = typer.Typer()


@app.command("sparsify-convert", epilog="Example: sparsecli sparsify-convert quickstart-convert --dry-run")
def sparsify_convert(
    arguments: typer.Context,
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A run, a model folder, a name on the Hugging Face hub, or a GGUF file.",
            show_default=False,
        ),
    ] = None,
    output: Output = None,
    seed: Seed = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="llama.cpp: also measure the dense model with it.", show_default=False
        ),
    ] = None,
    dry_run: DryRun = False,
    format: Annotated[Format, typer.Option(help="Format of the report on stdout.")] = "table",
    json: AsJson = False,
    html: Html = None,
    plot: Plot = None,
    saved: Saved = None,
) -> None:
    """Make a dense model cheaper to decode.

    The result has quantized weights or sparse feed-forward layers, and the loss in quality is measured. The recipe
    needs a convert block. Without a data block, the text is that of the dense run, else Python's standard library.
    """
    if saved:
        check_alone(arguments, "--from", {"saved", "format", "json", "html", "plot"})
    elif recipe is None:
        raise Failure("RECIPE: missing; see sparsecli sparsify-convert --help", exit_code=2)
    reports: dict[str, Any] = {"format": "json" if json else format, "html": html, "plot": plot}
    from sparsecli.report import files

    files.check_reports(html, plot)
    if saved:
        files.check_readable(saved, "--from")
        from sparsecli.convert import command

        command.show_saved(saved, **reports)
        return
    assert recipe is not None
    loaded = load_recipe(recipe, overrides, seed)
    from sparsecli.data.places import check_places
    from sparsecli.interchange.hub import check_reference
    from sparsecli.recipe.loader import check_unread

    check_unread(overrides or (), "sparsify-convert", {"model", "train"})
    convert = loaded.recipe.convert
    check_reference(model or (convert.model if convert else None), weights=not dry_run)
    check_places(loaded.recipe.data, tokenizer=False)  # it is the model's own
    from sparsecli.convert import command

    leave_imports_alone()
    command.run(
        loaded,
        model=model,
        output=output or loaded.output,
        peers=peer or None,
        dry_run=dry_run,
        **reports,
    )
