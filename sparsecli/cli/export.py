"""`sparsecli export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sparsecli.console import Failure

app = typer.Typer()


@app.command(epilog="Example: sparsecli export smollm2 --output smollm2-hf")
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, or a model folder.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", metavar="PATH", help="Write this folder, or this .gguf file.", show_default=False
        ),
    ],
    format: Annotated[
        Literal["huggingface", "gguf"],
        typer.Option(help="A folder for transformers, or a file for llama.cpp."),
    ] = "huggingface",
) -> None:
    """Export a model for other programs.

    With --format huggingface the output is a folder of the architecture that was imported, which transformers loads
    without this package. With --format gguf it is a file for llama.cpp: weights in GGUF's types keep their codes,
    others their type. The model must still be dense, or have experts.
    """
    if format == "gguf" and output.suffix != ".gguf":
        raise Failure(
            f"--output: expected the name of a file that ends with .gguf, got {output}", exit_code=2
        )
    from sparsecli.model.files import check_exists
    from sparsecli.model.outputs import check_new

    check_exists(model)
    check_new(output)
    from sparsecli.interchange import exporting

    exporting.run(model=model, output=output, format=format)
