"""Sources and the targets that a model with an encoder learns to write for them."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sparsecli.console import Failure
from sparsecli.data.cache import digest
from sparsecli.data.corpus import Column, Row, Splits
from sparsecli.recipe.data import FieldPairs, PairsSpec, TextSpec

SHORTEST_SUMMARY = 3
"""Words below which the first line of a docstring says too little."""


class Pair(NamedTuple):
    """What is read, and what is to be written."""

    source: str
    target: str


def columns_of(data: TextSpec) -> list[Column]:
    """The columns that pairs are made of: two, or one of text."""
    if isinstance(data.pairs, FieldPairs):
        named = (data.pairs.input, "data.pairs.input"), (data.pairs.target, "data.pairs.target")
        return [Column(name, key) for name, key in named]
    return [Column("text" if data.source == "stdlib" else data.text_field, "data.text_field")]


def make_pairs(spec: PairsSpec, rows: Splits[Row]) -> Splits[Pair]:
    """The pairs of kind `fields` or `docstrings` that are in rows of text, without repetitions.

    No source is in both splits, and functions of one file are all in the same one. Held-out pairs are in the order
    of their hashes, so that the first ones are a sample of all. Raises `Failure` when one split has no pair.
    """
    if isinstance(spec, FieldPairs):
        train, held_out = ([Pair(*row) for row in split] for split in (rows.train, rows.held_out))
    else:
        train, held_out = _functions(rows.train), _functions(rows.held_out)
    known = {pair.source for pair in train}
    held_out = sorted((pair for pair in held_out if pair.source not in known), key=lambda pair: digest(*pair))
    for pairs, use in ((train, "train"), (held_out, "evaluate")):
        if not pairs:
            raise Failure(f"data.pairs: the text to {use} on holds no pair of kind {spec.kind}")
    return Splits(train, held_out)


def _functions(documents: Iterable[Row]) -> list[Pair]:
    return list(dict.fromkeys(pair for (document,) in documents for pair in docstring_pairs(document)))


def docstring_pairs(document: str) -> Iterator[Pair]:
    """Every function and method of a Python file, its docstring taken out, with the docstring's first line.

    Left out are functions that do nothing or share a line with their docstring, and docstrings that begin with an
    example or with a word or two. A file that is no Python has no pairs.
    """
    lines = document.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's strings
            tree = ast.parse("\n".join(lines))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: too deep for the parser
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node, clean=False)
        if text is None or all(isinstance(statement, ast.Pass) for statement in node.body[1:]):
            continue
        docstring, first = node.body[:2]
        assert docstring.end_lineno
        alone = node.lineno < docstring.lineno <= docstring.end_lineno < first.lineno
        summary = inspect.cleandoc(text).partition("\n")[0].strip()
        if alone and summary[:1].isalpha() and len(summary.split()) >= SHORTEST_SUMMARY:
            kept = (
                lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
            )
            yield Pair("\n".join(_without_indent(line, node.col_offset) for line in kept), summary)


def _without_indent(line: str, indent: int) -> str:
    """The line of a function that begins at column `indent`; that of a string may begin before."""
    return line[indent:] if line[:indent].isspace() else line
