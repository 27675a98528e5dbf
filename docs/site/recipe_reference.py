"""The reference of a recipe's keys as Markdown, from its schema: a section for each block, a row for each key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from sparsecli.recipe.commands import described_schema

INTRODUCTION = """# Recipe keys

Every key that a [recipe](../recipes.md) may have. This page is made from the schema that checks recipes, which
`sparsecli recipes schema` prints as JSON. A block in the title is the path of its keys: `max_steps` of `train` is
`train.max_steps` on the command line and in messages.
"""


def markdown() -> str:
    """The whole page."""
    document = described_schema()
    lines = [INTRODUCTION]
    for path, block in sections(document):
        lines += ["", f"## {path or 'Top level'} {{#{anchor(path)}}}", ""]
        if block.get("description") and path:
            lines += [_prose(block["description"]), ""]
        lines += ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
        for key, value in block.get("properties", {}).items():
            lines.append(_row(document, path, key, value, key in block.get("required", ())))
    return "\n".join([*lines, ""])


def sections(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and schema of every block in the order of the recipe; a block that occurs again is described once."""
    seen = set()

    def walk(path: str, block: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        yield path, block
        for key, value in block.get("properties", {}).items():
            for name in _references(value):
                if name not in seen:
                    seen.add(name)
                    yield from walk(_path_of(document, path, key, name, value), document["$defs"][name])

    yield from walk("", document)


def anchor(path: str) -> str:
    """The name of a section in addresses."""
    return re.sub(r"[^a-z0-9_]+", "-", path.lower()).strip("-") or "top"


def _references(value: dict[str, Any]) -> list[str]:
    """Names of the blocks that a value may be."""
    if "$ref" in value:
        return [value["$ref"].rpartition("/")[2]]
    nested = [*value.get("anyOf", ()), *value.get("oneOf", ())]
    nested += [value["items"]] if isinstance(value.get("items"), dict) else []
    return [name for each in nested for name in _references(each)]


def _kind(block: dict[str, Any]) -> str:
    """Which block of a union this is: the literal that tells them apart."""
    for key in ("kind", "source"):
        given = block.get("properties", {}).get(key, {})
        for literal in (given.get("const"), *given.get("enum", ())):
            if literal is not None:
                return f"{key}: {literal}"
    return ""


def _path_of(document: dict[str, Any], path: str, key: str, name: str, value: dict[str, Any]) -> str:
    here = f"{path.partition(' ')[0]}.{key}".lstrip(".")
    if any("items" in each for each in (value, *value.get("anyOf", ()))):
        here += "[]"
    kind = _kind(document["$defs"][name]) if len(_references(value)) > 1 else ""
    return f"{here} ({kind})" if kind else here


def _row(document: dict[str, Any], path: str, key: str, value: dict[str, Any], required: bool) -> str:
    default = "required" if required else _default(value.get("default"))
    cells = (f"`{key}`", _type(document, path, key, value), default, _prose(value.get("description", "")))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(value: Any) -> str:
    if value is None:
        return ""
    return "its defaults" if isinstance(value, dict) else f"`{json.dumps(value, ensure_ascii=False)}`"


def _type(document: dict[str, Any], path: str, key: str, value: dict[str, Any]) -> str:
    """What a value may be, in words; blocks are links to their sections."""
    found = list(dict.fromkeys(_types(document, path, key, value, value)))
    return " or ".join(found)


def _types(
    document: dict[str, Any], path: str, key: str, value: dict[str, Any], whole: dict[str, Any]
) -> Iterator[str]:
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        target = next(each for each, block in sections(document) if block is document["$defs"][name])
        label = _kind(document["$defs"][name]) if len(_references(whole)) > 1 else "block"
        yield f"[{label or 'block'}](#{anchor(target)})"
    elif nested := [*value.get("anyOf", ()), *value.get("oneOf", ())]:
        for each in nested:
            yield from _types(document, path, key, each, whole)
    elif "const" in value:
        yield f"`{value['const']}`"
    elif "enum" in value:
        yield ", ".join(f"`{each}`" for each in value["enum"])
    elif value.get("type") == "array":
        items = value.get("items", {})
        yield f"list of {_type(document, path, key, items) or 'values'}"
    elif (kind := value.get("type")) and kind != "null":
        yield {
            "integer": "whole number",
            "number": "number",
            "string": "text",
            "boolean": "`true`, `false`",
        }.get(kind, kind) + _range(value)


def _range(value: dict[str, Any]) -> str:
    signs = {"exclusiveMinimum": "above", "minimum": "from", "exclusiveMaximum": "below", "maximum": "to"}
    words = [f"{sign} {value[name]:g}" for name, sign in signs.items() if name in value]
    return f" {' '.join(words)}" if words else ""


def _prose(text: str) -> str:
    return " ".join(text.split())
