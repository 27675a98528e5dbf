"""`sparsecli train`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsecli.cli.options import DryRun, Output, Overrides, RecipeArgument, Seed, load_recipe
from sparsecli.console import Failure

app = typer.Typer()


@app.command(epilog="Example: sparsecli train quickstart train.max_steps=200 --output runs/short")
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Output = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="auto", help="auto: resume from the newest checkpoint.", show_default=False),
    ] = None,
    seed: Seed = None,
    dry_run: DryRun = False,
) -> None:
    """Train a model, or the variants of a study.

    The recipe needs model, data and train blocks. The command also runs under torchrun and accelerate launch. With a
    study block it trains all variants and compares them; the same command continues a study that was stopped.
    """
    loaded = load_recipe(recipe, overrides, seed)
    if loaded.recipe.study:
        if seed is not None:
            raise Failure("--seed: a study has study.seeds; write study.seeds=[N]", exit_code=2)
        from sparsecli.study import command as study

        study.run(loaded, output=output or loaded.output, resume=resume, dry_run=dry_run)
        return
    from sparsecli.train import command

    command.run(loaded, output=output or loaded.output, resume=resume, dry_run=dry_run)
