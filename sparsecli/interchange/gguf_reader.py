"""A GGUF file's metadata and tensors, from a memory map. Nothing is allocated before its size is checked."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsecli.console import Failure
from sparsecli.model.gguf_types import TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_VALUES, MOST_TENSORS, MOST_AXES, MOST_ALIGNMENT = 1 << 16, 1 << 20, 4, 1 << 16
LONGEST_KEY = 1 << 16
STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Formats of the metadata's number types."""
FLOATS = {0: "<f4", 1: "<f2", 28: "<f8"}
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 30


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file.

    Attributes:
        kind: the number of its type; names are in `TYPES`.
        shape: as in PyTorch; GGUF counts axes from the last.
        raw: its bytes (rows, bytes of a row), a view of the file.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    raw: np.ndarray


class GgufReader:
    """`metadata` by key, `tensors` by name, and `header`: a file of the metadata alone.

    `kinds` has the numbers of the metadata's types by key: that of the value, and that of a list's elements.

    Raises:
        Failure: the file is missing, cut short or damaged, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._at = path, 0
        try:
            with path.open("rb") as file:
                self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise Failure(f"{path}: does not open: {error}") from error
        self._end = len(self._memory)
        try:
            self._read()
        except UnicodeDecodeError as error:
            raise self._damaged(f"a text is not UTF-8 at byte {self._at}") from error

    def _read(self) -> None:
        if self._take(4) != MAGIC:
            raise Failure(f"{self.path}: not a GGUF file: it does not begin with GGUF")
        (version,) = self._numbers("I", 1)
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise Failure(
                f"{self.path}: is of GGUF version {version}; versions {known} in little-endian order can be read"
            )
        tensors, values = (int(number) for number in self._numbers("Q", 2))
        if tensors > MOST_TENSORS or values > MOST_VALUES:
            raise self._damaged(f"it counts {tensors} tensors and {values} values")
        self.metadata: dict[str, Any] = {}
        self.kinds: dict[str, tuple[int, int | None]] = {}
        first = self._at
        for _ in range(values):
            key = self._string(LONGEST_KEY)
            (kind,) = self._numbers("I", 1)
            self.metadata[key] = self._value(int(kind), key)
        self.header = struct.pack("<4sIQQ", MAGIC, version, 0, values) + self._memory[first : self._at]
        entries = [self._entry() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}")
        data = -(-self._at // alignment) * alignment
        self.tensors = {entry[0]: self._tensor(*entry, data) for entry in entries}
        if len(self.tensors) != len(entries):
            raise self._damaged("two tensors have one name")

    def _damaged(self, reason: str) -> Failure:
        return Failure(f"{self.path}: not a whole GGUF file: {reason}; copy it again")

    def _take(self, size: int) -> bytes:
        if size > self._end - self._at:
            raise self._damaged(f"it ends within what byte {self._at} begins")
        self._at += size
        return self._memory[self._at - size : self._at]

    def _numbers(self, format: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{format}", self._take(count * struct.calcsize(format)))

    def _string(self, most: int | None = None) -> str:
        (size,) = self._numbers("Q", 1)
        if most is not None and size > most:
            raise self._damaged(f"a name has {size} bytes")
        return self._take(size).decode()

    def _value(self, kind: int, key: str) -> Any:
        self.kinds[key] = kind, None
        if kind in NUMBERS:
            return self._numbers(NUMBERS[kind], 1)[0]
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise self._damaged(f"{key[:60]!a} is of the unknown type {kind}")
        (element,), (count,) = self._numbers("I", 1), self._numbers("Q", 1)
        self.kinds[key] = kind, element
        if element == STRING:
            return self._strings(count)
        if element not in NUMBERS:
            raise self._damaged(f"{key[:60]!a} is a list of the unknown type {element}")
        size = np.dtype(NUMBERS[element]).itemsize
        return np.frombuffer(self._take(count * size), NUMBERS[element]).tolist()

    def _strings(self, count: int) -> list[str]:
        """Many short texts: without a call for each."""
        if count > (self._end - self._at) // 8:
            raise self._damaged(f"it counts {count} texts at byte {self._at}")
        memory, at, end, found = self._memory, self._at, self._end, []
        length = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > end or (stop := at + 8 + length(memory, at)[0]) > end:
                raise self._damaged(f"it ends within what byte {at} begins")
            found.append(memory[at + 8 : stop].decode())
            at = stop
        self._at = at
        return found

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(LONGEST_KEY)
        (axes,) = self._numbers("I", 1)
        if not 0 < axes <= MOST_AXES:
            raise self._damaged(f"tensor {name[:60]!a} has {axes} axes")
        shape = tuple(int(size) for size in reversed(self._numbers("Q", axes)))
        (kind,), (offset,) = self._numbers("I", 1), self._numbers("Q", 1)
        return name, shape, int(kind), int(offset)

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int, data: int) -> GgufTensor:
        try:
            block, size = _block(kind) or (0, 0)
        except Failure as failure:
            raise Failure(f"{self.path}: {failure.message}") from None
        if not block:
            raise Failure(
                f"{self.path}: tensor {name[:60]!a} is of GGUF's type {kind}, which is not known here"
            )
        rows, cols = math.prod(shape[:-1]), shape[-1]
        if not rows or not cols or cols % block:
            raise self._damaged(f"tensor {name[:60]!a} has the shape {shape}")
        row = cols // block * size
        if data + offset + rows * row > self._end:
            raise self._damaged(f"tensor {name[:60]!a} lies behind its end")
        raw = np.frombuffer(self._memory, np.uint8, rows * row, data + offset)
        return GgufTensor(name, kind, shape, raw.reshape(rows, row))


def _block(kind: int) -> tuple[int, int] | None:
    """Weights and bytes of a block of a type; None where nobody knows it."""
    if kind in FLOATS or kind == BFLOAT16:
        return 1, 2 if kind == BFLOAT16 else np.dtype(FLOATS[kind]).itemsize
    for known in TYPES.values():
        if known.number == kind:
            return known.block, known.block_bytes
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise Failure("its types need the package gguf: pip install 'sparsecli[gguf]'") from None
    try:
        return GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (KeyError, ValueError):
        return None
