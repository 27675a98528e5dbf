"""`sparsecli push`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsecli.cli.options import DryRun

app = typer.Typer()


@app.command(epilog="Example: sparsecli push runs/quickstart someone/quickstart --private")
def push(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, or a model folder.", show_default=False)
    ],
    repository: Annotated[
        str, typer.Argument(metavar="NAME", help="The repository: USER/NAME.", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="An existing branch.", show_default=False)
    ] = None,
    message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The message of the commit.", show_default=False)
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Upload a model to the Hugging Face hub.

    transformers loads it from there with trust_remote_code=True where sparsecli is installed. Log in with
    `hf auth login`, or set HF_TOKEN.
    """
    from sparsecli.interchange.hub import check_repository
    from sparsecli.model.files import check_exists

    check_repository(repository)
    check_exists(model)
    from sparsecli.interchange import pushing

    pushing.run(
        model=model,
        repository=repository,
        private=private,
        revision=revision,
        message=message,
        dry_run=dry_run,
    )
