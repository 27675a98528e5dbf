"""`sparsecli export`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsecli.cli.options import RequiredOutput

app = typer.Typer()


@app.command(epilog="Example: sparsecli export smollm2 --output smollm2-hf")
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, or a model folder.", show_default=False)
    ],
    output: RequiredOutput,
) -> None:
    """Export an imported model to its own architecture.

    The output is a Hugging Face folder that transformers loads without this package. The model must still be dense.
    """
    from sparsecli.interchange import exporting

    exporting.run(model=model, output=output)
