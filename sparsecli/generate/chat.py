"""Chat templates, which are programs that come with a model. Each runs in a sandbox, in its own process.

The process has limits of time and memory, because Jinja's sandbox does not stop a template that loops or grows. The
process runs this file, so it imports nothing of this package at its beginning.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

SECONDS = 10.0
MEMORY = 1 << 30
"""Bytes of address space. Python with Jinja takes a tenth of it."""
LONGEST = 1 << 22
"""Characters of a chat."""


def _environment() -> jinja2.Environment:
    from jinja2 import TemplateError, ext, nodes, parser, utils
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Answer(ext.Extension):
        """`{% generation %}` marks the assistant's part in templates for training. Here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, source: parser.Parser) -> list[nodes.Node]:
            next(source.stream)
            return source.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(utils.Namespace):
        """The template's own variables. Names with a leading underscore are refused: Python uses them."""

        def __init__(*positional: Any, **given: Any) -> None:
            self, *rest = positional
            for name in dict(*rest, **given):
                Namespace.check(name)
            utils.Namespace.__init__(self, *rest, **given)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace.check(name)
            super().__setitem__(name, value)

        @staticmethod
        def check(name: str) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace cannot hold {name!r}")

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    def new_dict(*positional: Any, **given: Any) -> dict[Any, Any]:
        return dict(*positional, **given)

    def now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Answer, ext.loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals |= {
        "dict": new_dict,
        "namespace": Namespace,
        "raise_exception": refuse,
        "strftime_now": now,
    }
    return environment


def _answer(asked: Mapping[str, Any]) -> dict[str, str]:
    """The `text` of the chat, or the template's `error`."""
    from jinja2 import TemplateError

    try:
        text = _environment().from_string(asked["template"]).render(**asked["variables"])
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MiB of memory"}
    except RecursionError:
        return {"error": "its recursion is too deep"}
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        return {"error": (str(error).strip() or type(error).__name__).splitlines()[-1].strip()}
    if len(text) > LONGEST:
        return {"error": f"its text has {len(text)} characters, more than {LONGEST}"}
    return {"text": text}


def _main() -> None:
    """Answer every line of stdin with a line, until it ends."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # a system without such limits
        pass
    for line in sys.stdin:
        sys.stdout.buffer.write(json.dumps(_answer(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


class TemplateProcess:
    """A chat template in its process, which starts with the first chat and after every failure anew.

    Threads may share it, one chat at a time.

    Args:
        named: the text of each special token that has a name.
    """

    def __init__(self, template: str, named: Mapping[str, str]) -> None:
        self.template, self.named = template, named
        self._process: subprocess.Popen[str] | None = None
        self._mutex = threading.Lock()

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a chat up to the start of the answer, as transformers renders it.

        Raises:
            Failure: the template is damaged, refuses the messages, breaks a rule of the sandbox, or exceeds a limit
                of time or memory.
        """
        from sparsecli.console import Failure

        fixed = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        asked = json.dumps({"template": self.template, "variables": {**fixed, **self.named}})
        with self._mutex:
            answer = self._ask(asked)
        if "text" not in answer:
            raise Failure(f"the chat template fails: {answer['error']}; --no-template leaves it out")
        return str(answer["text"])

    def close(self) -> None:
        """End the process."""
        if self._process:
            self._process.kill()
            with self._process:  # closes the pipes, and waits
                self._process = None

    def _ask(self, asked: str) -> dict[str, str]:
        if self._process is None:
            # -P keeps this folder off the path: some of its names could hide other packages.
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        process = self._process
        assert process.stdin
        assert process.stdout
        late = threading.Timer(SECONDS, process.kill)
        late.start()
        line = ""
        with suppress(BrokenPipeError):
            process.stdin.write(asked + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        in_time = late.is_alive()
        late.cancel()
        if line.endswith("\n"):
            answer: dict[str, str] = json.loads(line)
            return answer
        self.close()
        if not in_time:
            return {"error": f"it takes longer than {SECONDS:g} s"}
        return {"error": f"the process that runs it ended with {process.returncode}"}


def render(template: str, messages: Sequence[Mapping[str, str]], named: Mapping[str, str]) -> str:
    """The text of one chat: see `TemplateProcess.render`."""
    with closing(TemplateProcess(template, named)) as process:
        return process.render(messages)


if __name__ == "__main__":
    _main()
