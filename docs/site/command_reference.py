"""The reference of commands and their options as Markdown, from the command line itself."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import typer.main
from typer.core import TyperArgument

from sparsecli.cli import app

INTRODUCTION = """# Commands and options

All commands with their options, as `sparsecli COMMAND --help` shows them. `sparsecli --install-completion`
completes them in your shell. `sparsecli --debug COMMAND` shows the traceback of an error.
"""


def markdown() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for name, command in sorted(commands().items()):
        lines += ["", f"## {name}", "", *_help(command), "", "```text", usage(name, command), "```", ""]
        rows = [_row(each) for each in command.params if each.name != "help"]
        if rows:
            lines += ["| option | value | default | meaning |", "| --- | --- | --- | --- |", *rows]
    return "\n".join([*lines, ""])


def commands() -> dict[str, Any]:
    """All commands by the words that call them."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {f"{name} {word}": each for word, each in inner.items()} if inner else {name: command}
    return found


def usage(name: str, command: Any) -> str:
    """The line that shows how a command is called."""
    words = [f"sparsecli {name}", "[OPTIONS]"]
    for each in command.params:
        if isinstance(each, TyperArgument):
            shown = each.metavar or each.name.upper()
            words.append((shown if each.required else f"[{shown}]") + "..." * (each.nargs != 1))
    return " ".join(words)


def _help(command: Any) -> list[str]:
    return [" ".join(part.split()) for part in (command.help or "").split("\n\n") for part in (part, "")]


def _row(parameter: Any) -> str:
    names = [*parameter.opts, *parameter.secondary_opts]
    if isinstance(parameter, TyperArgument):
        names = [parameter.metavar or parameter.name.upper()]
    cells = (
        ", ".join(f"`{name}`" for name in names),
        _value(parameter),
        _default(parameter),
        _prose(parameter),
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _value(parameter: Any) -> str:
    annotation = parameter.type_descriptor.annotation
    if getattr(parameter, "is_flag", False) or isinstance(parameter, TyperArgument):
        return ""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{each}`" for each in get_args(annotation))
    return f"`{parameter.metavar or {int: 'N', float: 'NUMBER'}.get(annotation, 'TEXT')}`"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    hidden = value in (None, False, ()) or callable(value)
    return "" if hidden else f"`{'on' if value is True else value}`"


def _prose(parameter: Any) -> str:
    return " ".join((parameter.help or "").split())
