"""Chat templates: programs that come with a model. Each runs in a sandbox, in a process of its own with little time and
memory, since no sandbox of Jinja's keeps a template from looping or growing.

This file is also what that process runs: above `render` it needs nothing of ours.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

SECONDS = 10.0
MEMORY = 1 << 30
"""Bytes of address space, of which Python with Jinja takes a tenth."""
LONGEST = 1 << 22
"""Characters of a chat."""


def _environment() -> jinja2.Environment:
    from jinja2 import TemplateError, ext, nodes, parser, utils
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Answer(ext.Extension):
        """`{% generation %}` marks, in templates made for training, what an assistant says; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, source: parser.Parser) -> list[nodes.Node]:
            next(source.stream)
            return source.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(utils.Namespace):
        """The template's own variables; names that Python gives a meaning to are none."""

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
    """The `text` of a chat, or the `error` that kept the template from making it."""
    from jinja2 import TemplateError

    try:
        text = _environment().from_string(asked["template"]).render(**asked["variables"])
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MiB of memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        return {"error": (str(error).strip() or type(error).__name__).splitlines()[-1].strip()}
    if len(text) > LONGEST:
        return {"error": f"it makes {len(text)} characters, more than {LONGEST}"}
    return {"text": text}


def _main() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # a system without such limits
        pass
    json.dump(_answer(json.load(sys.stdin)), sys.stdout)


def render(template: str, messages: Sequence[Mapping[str, str]], named: Mapping[str, str]) -> str:
    """The text of a chat, up to where the answer begins, as transformers renders it.

    Raises:
        Failure: the template is damaged, refuses the messages, does what the sandbox forbids, or takes too long or too
            much memory.
    """
    from sparsecli.console import Failure

    fixed = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
    asked = json.dumps({"template": template, "variables": {**fixed, **named}})
    # Without the folder of this file on the path, in which some names are those of other packages.
    command = [sys.executable, "-P", __file__]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=SECONDS)
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        answer = {"error": f"it takes longer than {SECONDS:g} s"}
    except ValueError:
        answer = {"error": f"the process that runs it ended with {done.returncode}"}
    if "text" not in answer:
        raise Failure(f"the chat template does not work: {answer['error']}; --no-chat leaves it out")
    return str(answer["text"])


if __name__ == "__main__":
    _main()
