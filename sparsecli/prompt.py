"""Where the prompt of `generate` comes from: an option, a file, a pipe, or the recipe."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from sparsecli.console import Failure


def read_prompt(
    text: str | None, prompt_file: Path | None, input_file: Path | None, default: str | None
) -> str:
    """The prompt from the one place that was named; else from a pipe; else the recipe's."""
    named = {"--prompt": text, "--prompt-file": prompt_file, "--input": input_file}
    given = [option for option, value in named.items() if value is not None]
    if len(given) > 1:
        raise Failure(f"{' and '.join(given)}: give one of them", exit_code=2)
    file = prompt_file or input_file
    if file is not None and str(file) != "-":
        return _decode(file.read_bytes(), str(file))
    if text == "-" or file is not None:
        return _decode(sys.stdin.buffer.read(), "stdin")
    if text is not None:
        return text
    if _piped() and (piped := sys.stdin.buffer.read()):
        return _decode(piped, "stdin")
    if default is None:
        raise Failure(
            "no prompt: give --prompt TEXT, --prompt-file FILE or --input FILE, or pipe text in", exit_code=2
        )
    return default


def _piped() -> bool:
    """Whether stdin is a pipe or a file; a terminal, or the null device of a service, has no prompt to read."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _decode(content: bytes, source: str) -> str:
    """UTF-8 text without the mark that some editors put first, and the line end that they and `echo` put last."""
    try:
        return content.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise Failure(f"{source}: byte {error.start} is not UTF-8 text") from None
