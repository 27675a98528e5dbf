"""Numbers that Python and C++ both state are equal, and the tensor plan names what the engine knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sparsecli.decode.native
from sparsecli.decode.native import gguf, shape
from sparsecli.decode.packed import layouts
from sparsecli.decode.reference import ops
from sparsecli.model import gguf_types, quantization

NATIVE = Path(next(iter(sparsecli.decode.native.__path__)))
SOURCES = {
    path.name: path.read_text() for path in NATIVE.rglob("*.*") if path.suffix in (".h", ".inl", ".cpp")
}


def constant(name: str) -> int:
    """The only `constexpr int64_t NAME = value` of that name, but for those of a class."""
    found = re.findall(
        rf"^constexpr int64_t {name} = ([\d <()]+);", "\n".join(SOURCES.values()), re.MULTILINE
    )
    (value,) = set(found)
    return eval(value)


def enumeration(name: str) -> dict[str, int]:
    """Members and values of the only enum called `name`."""
    (body,) = re.findall(rf"^enum {name}\b[^{{]*{{([^}}]*)}}", "\n".join(SOURCES.values()), re.MULTILINE)
    return {member: int(value) for member, value in re.findall(r"(\w+) = (\d+)", body)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LANES", layouts.LANES),
        ("PAD", layouts.PAD),
        ("PANEL", layouts.PANEL),
        ("SPAN", layouts.SPAN),
        ("GROUP", ops.GROUP),
        ("QUANT_GROUP", quantization.GROUP),
        ("HEAD_LANES", gguf_types.HEAD_LANES),
    ],
)
def test_constants(name: str, value: int) -> None:
    assert constant(name) == value


def test_type_codes() -> None:
    types = enumeration("Type")
    codes = shape.TYPE_CODES | {f"int{bits}": code for bits, code in shape.QUANTIZED_TYPES.items()}
    codes |= {name.lower(): code for name, code in gguf.TYPE_CODES.items()}
    assert codes == {name.lower(): code for name, code in types.items()}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Activation", shape.ACTIVATIONS),
        ("FeedForwardKind", shape.FEED_FORWARDS),
        ("Projection", shape.PROJECTIONS),
        ("Output", shape.OUTPUTS),
        ("Positions", shape.POSITIONS),
        ("ValueConcat", shape.CONCATENATIONS),
        ("QueryKeyNorm", shape.NORMS),
        ("RotaryTable", shape.ROTARY_TABLES),
    ],
)
def test_enumerations(name: str, words: tuple[str, ...]) -> None:
    """Members are called as the words are, but for what tells them from those of other enumerations."""
    kind = re.compile("_units|_output|_concat|concat_|_norm|_rotary")
    codes = {kind.sub("", member.lower()): code for member, code in enumeration(name).items()}
    if "no" in codes:
        codes["none"] = codes.pop("no")
    assert codes == {word: code for code, word in enumerate(words)}
