"""Arguments and options that commands share, and how their values are read."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sparsecli.console import Failure, RecipeError

if TYPE_CHECKING:
    from sparsecli.recipe.loader import LoadedRecipe


def shipped_names(incomplete: str) -> list[str]:
    """Names of shipped recipes that begin with `incomplete`, for the shell's completion."""
    from sparsecli.recipe.loader import shipped

    return [name for name in shipped() if name.startswith(incomplete)]


RECIPE_HELP = "A recipe file, or the name of a shipped recipe."
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
    int | None, typer.Option(min=0, metavar="N", help="Override the recipe's seed.", show_default=False)
]
Output = Annotated[Path | None, typer.Option(metavar="DIR", help="Write to this folder.", show_default=False)]
RequiredOutput = Annotated[
    Path, typer.Option("--output", metavar="DIR", help="Write to this folder.", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan, and do nothing.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=256, metavar="N", help="CPU threads.", show_default=False)
]
AnyModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="A run, a model folder, a Hugging Face folder, a name on the hub, or a GGUF file.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Short for --format json.")]
Json = Annotated[bool, typer.Option("--json", help="Write one JSON document.")]
Format = Literal["table", "json", "csv", "markdown"]
Html = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Also write a page for a browser here.", show_default=False),
]
Saved = Annotated[
    Path | None,
    typer.Option(
        "--from", metavar="FILE", help="Show a saved result (JSON); measure nothing.", show_default=False
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Also write a figure here: .png, .svg or .pdf.", show_default=False),
]
CacheDtype = Literal["float32", "bfloat16", "int8"]
WeightDtype = Literal["float32", "bfloat16", "int8", "int4"]
AutoDtype = Annotated[
    Literal["auto", "float32", "bfloat16", "int8", "int4"],
    typer.Option("--dtype", help="Weight type; auto: as packed, else as stored."),
]
Keep = Annotated[
    bool,
    typer.Option(
        "--keep/--no-keep", help="Keep packed weights and imports for the next start, if they take long."
    ),
]


def percent(text: str) -> float:
    """`5%` or `0.05` as 0.05."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise typer.BadParameter(f"expected a share such as 5% or 0.05, got {text!r}")
    return value


def duration(text: str) -> float:
    """`90s`, `30m` or `2h` in seconds."""
    seconds = {"s": 1, "m": 60, "h": 3600}
    try:
        value = float(text[:-1]) * seconds[text[-1:]]
    except (ValueError, KeyError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise typer.BadParameter(f"expected a time such as 90s, 30m or 2h, got {text!r}")
    return value


def numbers(text: str) -> list[int]:
    """`64,2048` as [64, 2048]."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise typer.BadParameter(f"expected whole numbers above 0 such as 1,2, got {text!r}")
    return values


def check_alone(context: typer.Context, option: str, beside: set[str]) -> None:
    """Raise `Failure` if the command line has parameters that `option` makes useless: all but those `beside` it."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source and source.name == "COMMANDLINE" and parameter.name not in beside:
            name = parameter.opts[0] if parameter.opts[0].startswith("-") else str(parameter.metavar)
            raise Failure(
                f"{option}: shows a saved result and measures nothing; leave out {name}", exit_code=2
            )


def load_recipe(reference: str, overrides: list[str] | None, seed: int | None = None) -> LoadedRecipe:
    """The recipe with its overrides and `--seed`. Raises RecipeError with every problem."""
    from sparsecli.recipe.loader import load

    return load(reference, [*(overrides or []), *([] if seed is None else [f"seed={seed}"])])


def load_optional_recipe(
    reference: str | None, overrides: list[str] | None, seed: int | None
) -> LoadedRecipe | None:
    """`load_recipe` for an optional recipe. Without a recipe no override is allowed."""
    reference, overrides = shift(reference, overrides)
    if reference:
        return load_recipe(reference, overrides, seed)
    if overrides:
        raise RecipeError(f"{overrides[0]}: no recipe to change; name a recipe before the override")
    return None


def shift(reference: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """If the recipe is left out, its argument holds the first override."""
    if reference and "=" in reference and not Path(reference).exists():
        return None, [reference, *(overrides or [])]
    return reference, overrides or []


def leave_imports_alone() -> None:
    """Exempt what imports have made from garbage collections, each of which would take half a second for it.

    The Trainer starts one before every training; a study or a distillation with trials has many.
    """
    gc.freeze()
