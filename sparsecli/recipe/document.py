"""Parses YAML text into plain data with the position of every value.

Recipes are inert: no tags, no merge keys, no dates. Scalars follow YAML 1.2 (`1e-4` is a number, `no` is a
word). Depth and aliases are limited, so that no text is expensive to read.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

DEPTH = 24
VALUES = 20_000
"""Values of one document, counting every use of an alias."""

Path = tuple[str | int, ...]


@dataclass(frozen=True, order=True)
class Place:
    """A position in the file, or in an override (which sorts after the file)."""

    override: int
    """0 for the file, else the number of the override."""
    line: int
    column: int
    label: str = ""
    """The start of a message: `file:line:column` or `override #1 (train.learning_rate)`."""


@dataclass(frozen=True)
class Problem:
    """One error, with its position."""

    place: Place
    path: Path
    message: str

    def __str__(self) -> str:
        # The label of an override already names its key.
        key = spell(self.path)
        named = key and f"({key})" not in self.place.label
        return (
            f"{self.place.label}: {key}: {self.message}" if named else f"{self.place.label}: {self.message}"
        )


@dataclass
class Document:
    """Plain data (dict, list, str, int, float, bool, None) and the place of every path in it."""

    data: Any = None
    places: dict[Path, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: Path) -> Place:
        """The place of the nearest enclosing value that has one."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places[path]


def spell(path: Path) -> str:
    """`bench.variants[2].name`; a key that could confuse a terminal or a reader is quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            shown = part if re.fullmatch(r"[\w-]{1,60}", part, re.ASCII) else ascii(part[:60])
            text += f".{shown}" if text else shown
    return text


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML up to its node tree, with YAML 1.2's scalars and a limit on depth."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"nested more than {DEPTH} deep", problem_mark=mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


_NULL, _BOOL, _INT, _FLOAT, _TEXT, _LIST, _MAP = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")
)
# 18 digits fit 64 bits; a longer row of digits is text, which no number field accepts.
_NUMBER = r"[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)(?:[eE][-+]?\d+)?"
SCALARS = [
    (tag, re.compile(rf"(?:{pattern})\Z", re.ASCII))
    for tag, pattern in (
        (_NULL, r"~|null|Null|NULL|"),
        (_BOOL, r"true|True|TRUE|false|False|FALSE"),
        (_INT, r"[-+]?\d[\d_]{0,17}"),
        (_FLOAT, rf"(?=.*[.eE]){_NUMBER}"),
    )
]
for _tag, _pattern in SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, None)


def read_document(text: str, name: str, override: int = 0) -> Document:
    """Parse `text`. The result's `problems` list all errors; none is raised.

    For a file, `name` is its path and places read `name:line:column`; for an override (its number above 0),
    `name` is its key and places read `override #1 (name)`.
    """

    def place(mark: Any) -> Place:
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        label = f"override #{override} ({name})" if override else f"{name}:{line}:{column}"
        return Place(override, line, column, label)

    document = Document(places={(): place(None)})
    try:
        node = _Loader(text).get_single_node()
    except ReaderError as error:
        before = text[: error.position]
        mark = yaml.Mark(name, 0, before.count("\n"), len(before) - before.rfind("\n") - 1, None, 0)
        character = ascii(error.character if isinstance(error.character, str) else chr(error.character))
        document.problems.append(Problem(place(mark), (), f"the character {character} is not allowed"))
    except yaml.MarkedYAMLError as error:
        said = ", ".join(filter(None, [error.context, error.problem]))
        document.problems.append(
            Problem(place(error.problem_mark or error.context_mark), (), f"not YAML: {said}")
        )
    except (ValueError, OverflowError):  # PyYAML: an escape or a version number beyond what Python can hold
        document.problems.append(Problem(place(None), (), "not YAML: an escape or a number is out of range"))
    else:
        if node is not None:
            document.data = _Reading(document, place).value(node, ())
    return document


class _Reading:
    """Fills a document in one walk over a node tree."""

    def __init__(self, document: Document, place: Any) -> None:
        self.document, self.place, self.count = document, place, 0

    def refuse(self, node: yaml.Node, path: Path, message: str) -> None:
        self.document.problems.append(Problem(self.place(node.start_mark), path, message))

    def value(self, node: yaml.Node, path: Path) -> Any:
        self.count += 1
        if self.count >= VALUES or len(path) > DEPTH:
            if self.count == VALUES or len(path) > DEPTH:
                self.refuse(
                    node, (), f"aliases (*name) make it larger than {VALUES} values or {DEPTH} levels"
                )
            self.count = max(self.count, VALUES)
            return None
        if node.tag not in (_NULL, _BOOL, _INT, _FLOAT, _TEXT, _LIST, _MAP):
            self.refuse(node, path, f"the tag {node.tag!a} is not allowed; a recipe holds plain values")
            return None
        if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _LIST:
            items = []
            for index, child in enumerate(node.value):
                self.document.places[(*path, index)] = self.place(child.start_mark)
                items.append(self.value(child, (*path, index)))
            return items
        if isinstance(node, yaml.ScalarNode) and node.tag not in (_MAP, _LIST):
            return self.scalar(node, path)
        self.refuse(node, path, f"the tag {node.tag!a} does not fit its value")
        return None

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, child in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.refuse(key_node, path, "a key must be a word")
                continue
            key = key_node.value
            here = self.place(key_node.start_mark)
            if _surrogates(key):
                self.refuse(key_node, path, "a key must be text")
            elif _glued(key_node, child):
                name, _, value = key.partition(":")
                self.refuse(
                    key_node, path, f"{key[:40]!a} needs a space after the colon: `{name[:40]}: {value[:40]}`"
                )
            elif key in result:
                first = self.document.places[(*path, key)].line
                self.document.problems.append(
                    Problem(here, (*path, key), f"given twice; the first is on line {first}")
                )
            else:
                self.document.places[(*path, key)] = here
                result[key] = self.value(child, (*path, key))
        return result

    def scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        text = node.value
        try:
            match node.tag:
                case t if t == _NULL:
                    return None
                case t if t == _BOOL:
                    return {"true": True, "false": False}[text.lower()]
                case t if t == _INT:
                    return int(text.replace("_", ""))
                case t if t == _FLOAT:
                    number = float(text.replace("_", ""))
                    return number if math.isfinite(number) else text
        except (ValueError, KeyError):
            self.refuse(node, path, f"{text[:40]!a} does not fit its tag")
            return None
        if _surrogates(text):
            self.refuse(node, path, "contains a lone surrogate, which is not a character")
            return None
        return text


def _glued(key: yaml.ScalarNode, value: yaml.Node) -> bool:
    """Whether a pair is one word to YAML, as `kind:dense` is, because no space follows the colon."""
    return (
        re.fullmatch(r"[\w-]+:[\w.-]+", key.value, re.ASCII) is not None
        and key.style is None
        and value.value == ""
    )


def _surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
