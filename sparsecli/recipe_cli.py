"""The command line of `sparsecli recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsecli.arguments import RECIPE_HELP, RecipeArgument, shipped_names

recipes = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show, copy and check recipes.")


@recipes.command("ls")
def recipes_list() -> None:
    """List the shipped recipes."""
    from sparsecli.recipe import commands

    commands.list_shipped()


@recipes.command("show")
def recipes_show(recipe: RecipeArgument) -> None:
    """Print a recipe."""
    from sparsecli.recipe import commands

    commands.show(recipe)


@recipes.command("cp", epilog="Example: sparsecli recipes cp quickstart mine.yaml")
def recipes_copy(
    recipe: RecipeArgument,
    destination: Annotated[
        Path | None, typer.Argument(help="File or folder; here by default.", show_default=False)
    ] = None,
) -> None:
    """Copy a recipe, to change it; never overwrites."""
    from sparsecli.recipe import commands

    commands.copy(recipe, destination)


@recipes.command("check")
def recipes_check(
    recipe: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help=RECIPE_HELP, autocompletion=shipped_names)
    ],
) -> None:
    """Check recipes and count their parameters."""
    from sparsecli.recipe import commands

    commands.check(recipe)


@recipes.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from sparsecli.recipe import commands

    commands.schema()
