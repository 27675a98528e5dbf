"""Arguments and options that commands of the command line share, and how their words are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def shipped_names(incomplete: str) -> list[str]:
    from sparsecli.recipe.loader import shipped

    return [name for name in shipped() if name.startswith(incomplete)]


RECIPE_HELP = "Recipe: a file, or the name of a shipped one."
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help=RECIPE_HELP, autocompletion=shipped_names, show_default=False)
]
OptionalRecipe = Annotated[
    str | None,
    typer.Argument(metavar="RECIPE", help=RECIPE_HELP, autocompletion=shipped_names, show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.PATH=VALUE", help="Changes to the recipe.", show_default=False),
]
Seed = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="In place of the recipe's seed.", show_default=False)
]
Output = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write to.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=256, metavar="N", help="CPU threads.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Short for --format json.")]
Model = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="A run, or a folder of a Hugging Face model.", show_default=False),
]
Format = Literal["table", "json", "csv", "markdown"]
Dtype = Literal["float32", "bfloat16", "int8"]
WeightDtype = Literal["float32", "bfloat16", "int8", "int4"]


def percent(text: str) -> float:
    """`5%` or `0.05` as 0.05."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise typer.BadParameter(f"{text!r}; expected a share such as 5% or 0.05")
    return value


def numbers(text: str) -> list[int]:
    """`64,2048` as [64, 2048]."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise typer.BadParameter(f"{text!r}; expected whole numbers above 0, such as 1,2")
    return values
