"""The command line. Each command is a file with its arguments, and imports the module that does the work."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sparsecli import __version__, console
from sparsecli.cli import (
    bench,
    convert,
    doctor,
    errors,
    evaluate,
    export,
    generate,
    import_,
    pack,
    push,
    recipes,
    serve,
    train,
)


class _Commands(TyperGroup):
    def invoke(self, context: Any) -> Any:
        """Typer would turn an interrupt into an exit code without a message."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt as error:
            raise errors.as_failure(error) from error


app = typer.Typer(
    cls=_Commands,
    name="sparsecli",
    help="Train, convert, run and measure sparse Transformers on plain CPUs.",
    epilog="Start with: sparsecli train quickstart",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (train, convert, generate, serve, evaluate, import_, export, push, pack, bench, doctor):
    app.add_typer(command.app)
app.add_typer(recipes.app, name="recipes")

debug = False
"""Whether errors show their traceback; set by `--debug`."""


def main() -> None:
    """Entry point. Every error becomes one line on stderr and an exit code."""
    code = None
    try:
        code = app(prog_name="sparsecli", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        errors.end(error, debug)
    sys.exit(code)


def _version(asked: bool) -> None:
    if asked:
        console.out(f"sparsecli {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    show_traceback: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    global debug
    debug = show_traceback
