"""`sparsecli pack`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsecli.cli.options import DryRun, Output, WeightDtype

app = typer.Typer()


@app.command(epilog="Example: sparsecli pack runs/quickstart --dtype int8")
def pack(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A run, or a model folder.", show_default=False)
    ] = None,
    output: Output = None,
    dtype: Annotated[WeightDtype, typer.Option(help="Weight type.")] = "bfloat16",
    dry_run: DryRun = False,
) -> None:
    """Pack a model's weights for the native engine.

    The output is a model folder for `sparsecli generate --model`. By default it is written beside the model, with the
    weight type at the end of its name. Without MODEL, the newest finished run under runs/ is packed.
    """
    from sparsecli import pack as implementation

    implementation.run(model=model, output=output, dtype=dtype, dry_run=dry_run)
