"""`sparsecli doctor`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from sparsecli.cli.options import AsJson

app = typer.Typer()


@app.command()
def doctor(
    format: Annotated[
        Literal["table", "json"], typer.Option(help="Format of the result on stdout.")
    ] = "table",
    json: AsJson = False,
) -> None:
    """Examine this machine and this installation."""
    from sparsecli import doctor as implementation

    implementation.run("json" if json else format)
