"""The prompt of `generate`: read from an option, a file, a pipe or the recipe, and turned into token ids."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.generate.chat import render
from sparsecli.model.tokenizer import Tokenizer
from sparsecli.spec.vocabulary import END, PADDING


def read_prompt(
    text: str | None, prompt_file: Path | None, input_file: Path | None, default: str | None
) -> str:
    """The prompt from the one option that was given; else from a pipe; else the recipe's.

    Raises:
        Failure: several options, no prompt at all, or bytes that are not UTF-8.
    """
    options = {"--prompt": text, "--prompt-file": prompt_file, "--input": input_file}
    given = [option for option, value in options.items() if value is not None]
    if len(given) > 1:
        raise Failure(f"{', '.join(given)}: cannot be combined; give one of them", exit_code=2)
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
            "--prompt: missing; give --prompt TEXT, --prompt-file FILE or --input FILE, or pipe text in",
            exit_code=2,
        )
    return default


def _piped() -> bool:
    """Whether stdin is a pipe or a file. A terminal, or the null device of a service, holds no prompt."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _decode(content: bytes, source: str) -> str:
    """UTF-8 text without a byte-order mark and without the last line end, which editors and `echo` add."""
    try:
        return content.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise Failure(f"{source}: byte {error.start} is not UTF-8 text") from None


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, context: int, template: bool = True, special: bool = False
) -> list[int]:
    """Token ids of `prompt`; with `template` it goes through the tokenizer's chat template, if there is one.

    Without a template, `special` adds the tokens that the tokenizer puts around a text.

    Raises:
        Failure: the prompt is empty, leaves no room in the model's context of `context` tokens, or has tokens that
            the model does not have; or the template fails.
    """
    if not prompt:
        raise Failure("the prompt is empty; give a text to continue")
    ids = (
        encode_chat(tokenizer, prompt)
        if template and tokenizer.template
        else tokenizer.encode(prompt, special=special)
    )
    if not ids:
        raise Failure("the tokenizer knows no token of the prompt; give another text")
    if len(ids) >= context:
        raise Failure(
            f"the prompt has {len(ids)} tokens, and the model's context of {context} needs room for a new one; "
            "shorten the prompt"
        )
    return ids


def encode_chat(tokenizer: Tokenizer, message: str) -> list[int]:
    """Token ids of a chat with one user message, up to the start of the assistant's answer.

    As in transformers, the name of a special token is that token, also within the message.

    Raises:
        Failure: there is no chat template, it fails, or its text has tokens that the model does not have.
    """
    if tokenizer.template is None:
        raise Failure("the tokenizer has no chat template")
    text = render(tokenizer.template, [{"role": "user", "content": message}], tokenizer.named)
    return tokenizer.encode(text, names_are_text=False)


def encode_input(tokenizer: Tokenizer, text: str, positions: int) -> list[int]:
    """Token ids for an encoder of `positions` positions, with the tokenizer's end token.

    An input that is too long is cut off, with a warning.

    Raises:
        Failure: the input is empty, or has words that the tokenizer does not know.
    """
    if not text.strip():
        raise Failure("the input is empty; give a text to read")
    ids = tokenizer.encode(text, special=True)
    if {PADDING, END} & {*ids[:-1]}:  # a vocabulary of symbols maps every unknown word to these
        unknown = [word for word in text.split() if {PADDING, END} & {*tokenizer.encode(word)}]
        raise Failure(
            f"the input has words that the tokenizer does not know: {' '.join(unknown[:5])}; leave them out"
        )
    if len(ids) > positions:
        console.warn(f"the input has {len(ids)} tokens; the model reads the first {positions}")
        ids = [*ids[: positions - 1], ids[-1]]
    return ids
