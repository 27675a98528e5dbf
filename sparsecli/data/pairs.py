"""Pairs of source and target, for models with an encoder."""

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
"""Fewest words of a docstring's first line; shorter ones say too little."""


class Pair(NamedTuple):
    """The text that the encoder reads, and the text to generate."""

    source: str
    target: str


def columns_of(data: TextSpec) -> list[Column]:
    """The columns that pairs are read from: source and target, or one column of text."""
    if isinstance(data.pairs, FieldPairs):
        named = (data.pairs.input, "data.pairs.input"), (data.pairs.target, "data.pairs.target")
        return [Column(name, key) for name, key in named]
    return [Column("text" if data.source == "stdlib" else data.text_field, "data.text_field")]


def make_pairs(spec: PairsSpec, rows: Splits[Row]) -> Splits[Pair]:
    """The pairs of kind `fields` or `docstrings` in rows of text, without repetitions.

    No source is in both splits, and all functions of a file are in the same split. Held-out pairs are sorted by their
    hashes, so that the first ones are a random sample. Raises `Failure` when one split has no pair.
    """
    if isinstance(spec, FieldPairs):
        train, held_out = ([Pair(*row) for row in split] for split in (rows.train, rows.held_out))
    else:
        train, held_out = _functions(rows.train), _functions(rows.held_out)
    known = {pair.source for pair in train}
    held_out = sorted((pair for pair in held_out if pair.source not in known), key=lambda pair: digest(*pair))
    for pairs, use in ((train, "train"), (held_out, "evaluate")):
        if not pairs:
            raise Failure(f"data.pairs: the text to {use} on contains no pair of kind {spec.kind}")
    return Splits(train, held_out)


def _functions(documents: Iterable[Row]) -> list[Pair]:
    return list(dict.fromkeys(pair for (document,) in documents for pair in docstring_pairs(document)))


def docstring_pairs(document: str) -> Iterator[Pair]:
    """Every function and method of a Python file without its docstring, and the docstring's first line.

    Functions that do nothing or share a line with their docstring are left out. So are docstrings that begin with an
    example, or with fewer than SHORTEST_SUMMARY words. A file that is not Python has no pairs.
    """
    lines = document.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in the strings of those files
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
    """A line of a function, without `indent` columns; a line within a string may have fewer."""
    return line[indent:] if line[:indent].isspace() else line
