"""`sparsecli serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsecli.cli.options import AnyModel, AutoDtype, CacheDtype, Keep, Threads

app = typer.Typer()


@app.command(epilog="Example: sparsecli serve --model runs/quickstart --port 8080")
def serve(
    model: AnyModel = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name of the model for clients; default: its run's.", show_default=False
        ),
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="SPARSECLI_API_KEY",
            metavar="KEY",
            help="Key that clients must send; needed wherever other machines can connect.",
            show_default=False,
        ),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=256, metavar="N", help="Texts decoded together.")] = 8,
    context: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Tokens of a text with its prompt; default: 4096, or the model's context.",
            show_default=False,
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option(min=0, metavar="N", help="Texts that may wait; more get status 429.")
    ] = 64,
    timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Time that a request may take.")
    ] = 600,
    grace: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Time for running requests when the server stops.")
    ] = 30,
    dtype: AutoDtype = "auto",
    cache_dtype: Annotated[
        CacheDtype | None, typer.Option(help="KV cache type; default: by --dtype.", show_default=False)
    ] = None,
    threads: Threads = None,
    keep: Keep = True,
) -> None:
    """Serve a model over HTTP, with OpenAI's API.

    Clients of that API work unchanged with the base URL http://127.0.0.1:8080/v1. The address itself shows a page to
    chat on. Without --model, the model is that of the newest finished run under runs/. SIGTERM and Ctrl-C let
    running requests end, then the exit code is 0.
    """
    from sparsecli.generate.decoder import DecoderOptions
    from sparsecli.serve import command

    command.run(
        model,
        name=name,
        host=host,
        port=port,
        api_key=api_key,
        slots=slots,
        context=context,
        queue=queue,
        seconds=timeout,
        grace=grace,
        decoder=DecoderOptions("native", None if dtype == "auto" else dtype, cache_dtype, threads, keep),
    )
