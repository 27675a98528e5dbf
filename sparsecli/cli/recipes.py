"""`sparsecli recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsecli.cli.options import RECIPE_HELP, Json, RecipeArgument, shipped_names

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show, copy and check recipes.")


@app.command("ls")
def list_recipes(json: Json = False) -> None:
    """List the shipped recipes."""
    from sparsecli.recipe import commands

    commands.list_shipped(json)


@app.command()
def show(recipe: RecipeArgument) -> None:
    """Print a recipe."""
    from sparsecli.recipe import commands

    commands.show(recipe)


@app.command("cp", epilog="Example: sparsecli recipes cp quickstart mine.yaml")
def copy(
    recipe: RecipeArgument,
    destination: Annotated[
        Path | None,
        typer.Argument(
            metavar="DESTINATION", help="File or folder; default: the current folder.", show_default=False
        ),
    ] = None,
) -> None:
    """Copy a recipe to change it. Existing files are never overwritten."""
    from sparsecli.recipe import commands

    commands.copy(recipe, destination)


@app.command()
def check(
    recipe: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help=RECIPE_HELP, autocompletion=shipped_names)
    ],
    json: Json = False,
) -> None:
    """Check recipes and count their parameters."""
    from sparsecli.recipe import commands

    commands.check(recipe, json)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from sparsecli.recipe import commands

    commands.schema()
