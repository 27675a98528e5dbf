"""`sparsecli import`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from sparsecli.cli.options import DryRun, RequiredOutput

app = typer.Typer()


@app.command("import", epilog="Example: sparsecli import openai-community/gpt2 --output runs/gpt2")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A Hugging Face folder, a name on the hub, or a GGUF file.",
            show_default=False,
        ),
    ],
    output: RequiredOutput,
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Branch, tag or commit on the hub.", show_default=False),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(
            help="Type of the written weights; auto keeps the original type, including GGUF's types."
        ),
    ] = "auto",
    dry_run: DryRun = False,
) -> None:
    """Import a model of another architecture.

    The architectures are Llama, Mistral, Mixtral, Qwen 2, 3 and 3-MoE, OLMo 2, OLMoE, Phi-3, Gemma 1 to 3, SmolLM3,
    Granite, StableLM, Falcon, GPT-2, GPT-J, OPT and GPT-NeoX. The result computes exactly the same
    function as the original.
    """
    from sparsecli.interchange.hub import check_reference
    from sparsecli.model.outputs import check_new

    check_new(output)
    check_reference(source, revision, weights=not dry_run)
    from sparsecli.interchange import importing

    importing.run(source=source, output=output, revision=revision, dtype=dtype, dry_run=dry_run)
