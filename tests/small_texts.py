"""The `data:` blocks of the tests of pairs."""

from __future__ import annotations

from pydantic import TypeAdapter

from sparsecli.recipe.data import DataSpec, TextSpec

BPE = {"kind": "bpe", "vocabulary_size": 320}


def spec(source: str, pairs: dict[str, object], **fields: object) -> TextSpec:
    """Text from there and the pairs made of it, with a small tokenizer."""
    given = {"source": source, "tokenizer": BPE, "pairs": pairs, **fields}
    return TypeAdapter(DataSpec).validate_python(given)
