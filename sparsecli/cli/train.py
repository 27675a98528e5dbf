"""`sparsecli train`."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

from sparsecli.cli.options import (
    DryRun,
    Output,
    Overrides,
    RecipeArgument,
    Seed,
    duration,
    leave_imports_alone,
    load_recipe,
)
from sparsecli.console import Failure

app = typer.Typer()


@app.command(epilog="Example: sparsecli train quickstart train.max_steps=200 --output runs/short")
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Output = None,
    resume: Annotated[
        Literal["auto"] | None,
        typer.Option(metavar="auto", help="auto: resume from the newest checkpoint.", show_default=False),
    ] = None,
    stop_after: Annotated[
        float | None,
        typer.Option(
            parser=duration,
            metavar="TIME",
            help="Stop after 90s, 30m or 2h, with a checkpoint.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time of a step goes.")] = False,
    seed: Seed = None,
    dry_run: DryRun = False,
) -> None:
    """Train a model, or the variants of a study.

    The recipe needs model, data and train blocks. The command also runs under torchrun and accelerate launch. With a
    study block it trains all variants and compares them; the same command continues a study that was stopped.
    """
    loaded = load_recipe(recipe, overrides, seed)
    from sparsecli.data.places import check_places
    from sparsecli.train.sources import initial_model, teacher_model

    initial_model(loaded.recipe)
    teacher_model(loaded.recipe)
    check_places(loaded.recipe.data)
    _let_threads_sleep()
    if loaded.recipe.study:
        if seed is not None:
            raise Failure("--seed: a study has study.seeds; write study.seeds=[N]", exit_code=2)
        if profile:
            raise Failure("--profile: is for one run, and a study has several", exit_code=2)
        from sparsecli.study import command as study

        leave_imports_alone()
        study.run(
            loaded, output=output or loaded.output, resume=resume, dry_run=dry_run, stop_after=stop_after
        )
        return
    from sparsecli.train import command

    leave_imports_alone()
    command.run(
        loaded,
        output=output or loaded.output,
        resume=resume,
        dry_run=dry_run,
        stop_after=stop_after,
        profile=profile,
    )


def _let_threads_sleep() -> None:
    """Limit for how long PyTorch's threads (GNU OpenMP) wait for their next work in a loop, before they sleep.

    By default they do so for milliseconds, and take the processor from threads that have work: the native ops', or
    those of other programs. OpenMP reads the environment once, when PyTorch is imported.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"
