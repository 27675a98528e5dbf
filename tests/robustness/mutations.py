"""Changes to files, as damage makes them and as an attacker would: bytes, JSON, and headers whose checksum is right."""

from __future__ import annotations

import copy
import json
import random
import struct
from contextlib import suppress
from typing import Any

from sparsecli.decode.packed.tensor_file import HEADER_CHECKSUM, header_checksum

STRANGE: list[
    Any
] = [  # half a character is left to the tests of tokenizers: what is logged of it stops xdist
    *(None, True, "", "x", "\x1b[2J", [], {}, [[]], {"kind": "x"}),
    *(0, -1, 1, 3, 7, 1.5, -0.0, 2**31, 10**9, 10**15, 10**30, 1e300, float("nan"), float("inf")),
]
STRANGER: list[Any] = [
    *STRANGE,
    *(2**32 - 1, 2**53 + 1, 2**63 - 1, -(2**63), 2**64, 10**400, -float("inf"), 1e-300, 1e308),
    *(
        "\ud800",
        "\x00",
        "\u202etxt.exe",
        "é" * 300,
        "../../etc/passwd",
        "/dev/zero",
        "%s%n{0}",
        "a" * 100_000,
    ),
    *([0] * 10_000, {"a": {"b": {"c": []}}}, ["x", None, 1]),
]
"""Also values that only a fuzzer's own process needs to bear."""
BYTES = (b"\xff", b"\0", b"[" * 5000, b"{", b'"', b"9" * 5000)
WORDS = (
    b"\xff" * 8,
    b"\0" * 8,
    struct.pack("<Q", 2**63),
    struct.pack("<Q", 2**32),
    struct.pack("<Q", 2**40 + 1),
)


def strange(draw: random.Random, values: list[Any] = STRANGE) -> Any:
    """One of the strange values."""
    return copy.deepcopy(draw.choice(values))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [(value, key) for key, _ in items]
    return found + [place for container, key in list(found) for place in places(container[key])]


def changed(value: Any, draw: random.Random, values: list[Any] = STRANGE) -> Any:
    """A copy of some JSON with one or two places changed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice([1, 1, 2])):
        container, key = draw.choice(places(value))
        match draw.randrange(5):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[draw.choice(["x", "kind", "layers", "\x1b", ""])] = strange(draw, values)
            case 2 if isinstance(container, list):
                container += [container[key]] * draw.choice([1, 1000])
            case _:
                container[key] = strange(draw, values)
        if not places(value):
            break
    return value


def changed_text(content: bytes, draw: random.Random) -> bytes:
    """A JSON document with some of its values changed, a key twice, or deep nesting."""
    value = json.loads(content)
    match draw.randrange(8):
        case 0 if isinstance(value, dict) and value:
            key = draw.choice(list(value))
            twice = f"{{{json.dumps(key)}: {json.dumps(strange(draw, STRANGER))}, "
            return (twice + json.dumps(value)[1:]).encode()
        case 1:
            container, key = draw.choice(places(value))
            container[key] = "DEEP"
            deep = draw.choice([50, 900, 5000])
            return json.dumps(value).replace('"DEEP"', "[" * deep + "]" * deep).encode()
    return json.dumps(changed(value, draw, STRANGER), ensure_ascii=draw.random() < 0.8).encode(
        errors="replace"
    )


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Some bytes of `content` changed, left out, doubled, or put in."""
    at = draw.randrange(len(content))
    some = content[at : at + draw.choice([1, 8, 100])]
    return {
        0: lambda: content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :],
        1: lambda: content[:at] + content[at + len(some) :],
        2: lambda: content[:at] + some * draw.choice([2, 50]) + content[at:],
        3: lambda: content[:at] + draw.choice(BYTES) + content[at:],
        4: lambda: content[:at],
    }[draw.randrange(5)]()


def rewritten(content: bytes, draw: random.Random, within: int | None = None) -> bytes:
    """`damaged` in the first `within` bytes, or a number there replaced by a huge one."""
    head, tail = content[:within], content[within:] if within is not None else b""
    if draw.random() < 0.5:
        return damaged(head, draw) + tail
    at = draw.randrange(len(head))
    word = draw.choice(WORDS)[: draw.choice([1, 2, 4, 8])]
    return head[:at] + word + head[at + len(word) :] + tail


def with_header(content: bytes, header: bytes) -> bytes:
    """A safetensors file with another header."""
    (length,) = struct.unpack("<Q", content[:8])
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def header_of(content: bytes) -> Any:
    """The header of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


def changed_header(content: bytes, draw: random.Random, sealed: bool = False) -> bytes:
    """A safetensors file with changes in its header.

    Args:
        sealed: the header of a packed file gets the checksum that suits it, as whoever writes such a file can do.
            What metadata holds as JSON text is changed inside too.
    """
    header = header_of(content)
    metadata = header.get("__metadata__")
    if sealed and metadata and draw.random() < 0.6:
        nested = [name for name, text in metadata.items() if text[:1] == "{"]
        name = draw.choice(nested)
        metadata[name] = json.dumps(changed(json.loads(metadata[name]), draw, STRANGER))
    else:
        header = changed(header, draw, STRANGER)
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if sealed and isinstance(metadata, dict):
        metadata.pop(HEADER_CHECKSUM, None)
        tensors = {name: facts for name, facts in header.items() if name != "__metadata__"}
        with suppress(TypeError, ValueError):  # what is no JSON any more
            metadata[HEADER_CHECKSUM] = header_checksum(metadata, tensors)
    return with_header(content, json.dumps(header).encode())


def variants(content: bytes, seed: int, count: int) -> list[bytes]:
    """Some JSON, or a safetensors file with its header, in `count` damaged ways."""
    found = []
    for number in range(count):
        draw = random.Random(seed + number)
        if number % 3 == 0:
            found.append(damaged(content, draw))
        elif content[:1] == b"{":
            found.append(json.dumps(changed(json.loads(content), draw)).encode())
        else:
            found.append(with_header(content, json.dumps(changed(header_of(content), draw)).encode()))
    return found
