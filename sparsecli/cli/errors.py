"""Errors of the command line. Every error is one line, `where: what was wrong; what to do`, and an exit code."""

from __future__ import annotations

import os
import re
import sys
import traceback
from contextlib import suppress
from typing import Any

from typer.exceptions import TyperException

from sparsecli import console
from sparsecli.console import Failure, Stopped

EXPECTED = {
    "int_parsing": "expected a whole number, got {input!r}",
    "float_parsing": "expected a number, got {input!r}",
    "greater_than_equal": "expected a whole number of at least {ge}, got {input}",
    "less_than_equal": "expected a whole number of at most {le}, got {input}",
}
"""Messages by the type of a Pydantic error: Typer checks values with Pydantic, and only whole numbers have limits."""

FORMS = (
    (r"Missing (?:argument|option) '(.+?)'.*", r"\1: missing"),
    (r"No such command '(.+)'", r"\1: no such command"),
    (r"No such option: (\S+) \(Possible options: (.+)\)", r"\1: no such option, did you mean \2?"),
    (r"No such option: (\S+)", r"\1: no such option"),
    (r"Option '(.+)' requires an argument", r"\1: expected a value"),
    (r"Got unexpected extra argument\(s\) \((.+)\)", r"\1: unexpected argument"),
)
"""Typer's messages about the command line, and our form of them."""


def end(error: BaseException, debug: bool) -> None:
    """Show an error on stderr, with its traceback for `debug`, and exit with its code."""
    failure = as_failure(error)
    if debug:
        console.say(traceback.format_exc())
    console.fail(failure)
    # If stdout is full or closed, its buffer cannot be written, and Python would report another error on exit.
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(failure.exit_code)


def as_failure(error: BaseException) -> Failure:
    """Convert any error to an expected error with its message and exit code."""
    reason = console.system_reason(error)
    match error:
        case Failure():
            return error
        case TyperException():
            return _usage(error)
        case KeyboardInterrupt():
            return Stopped("interrupted", exit_code=130)
        case OSError():
            named = error.filename2 or error.filename  # of a copy that fails, what was to be written
            return Failure(f"{named}: {reason}" if named else f"{reason}")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # PyTorch's message
        return Failure("not enough memory; use a smaller model, context or batch")
    if reason:
        return Failure(reason)
    lines = str(error).strip().splitlines() or [""]
    name = type(error).__name__
    return Failure(f"unexpected {name}: {lines[0]}; `sparsecli --debug ...` shows the traceback")


def _usage(error: TyperException) -> Failure:
    """Typer's error in the form of our own checks: `--option: expected a value, got another`."""
    message = error.format_message()
    if len(message.splitlines()) > 1:  # the help, shown if a command group has no argument
        console.say(message)
        sys.exit(error.exit_code)
    if wrong := re.fullmatch(r"Invalid value for '(.+?)': (.+)", message):
        return Failure(f"{wrong[1]}: {_wrong_value(error, wrong[2])}", error.exit_code)
    message = message.rstrip(".")
    for pattern, form in FORMS:
        message = re.sub(f"^{pattern}$", form, message)
    context = getattr(error, "ctx", None)
    return Failure(f"{message}; see {context.command_path} --help" if context else message, error.exit_code)


def _wrong_value(error: TyperException, message: str) -> str:
    """The expected and the found value, in words."""
    if choice := re.search(r"('.*') is not one of (.+?)\.?$", message):
        return f"expected one of {choice[2].replace(chr(39), '')}, got {choice[1]}"
    problems: list[dict[str, Any]] = getattr(error.__cause__, "errors", list)()
    if problems and (expected := EXPECTED.get(problems[0]["type"])):
        return expected.format(input=problems[0]["input"], **problems[0].get("ctx", {}))
    return message
