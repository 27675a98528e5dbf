"""Safetensors files without torch: read with bfloat16 as uint16, and written with a checksum for each tensor."""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sparsecli.console import Failure, system_reason

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}
TYPES: dict[str, type] = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "float16": np.float16,
    "int8": np.int8,
    "uint8": np.uint8,
}
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8", "uint8": "U8"}
KINDS = {name: kind for kind, name in NAMES.items()}
PAGE = 4096  # the header is filled up to it, so that tensors keep their alignment in a mapping
LONGEST_HEADER = 100_000_000  # the format's own limit
MOST_AXES = 8
CHECKSUMS = "crc32"
HEADER_CHECKSUM = "header_crc32"


def to_json(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":"))


def from_json(text: str) -> Any:
    """The value of some JSON; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None


def header_checksum(metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> str:
    """Checksum of everything else in a header: a flipped digit there could be a model that runs, but another one."""
    return str(zlib.crc32(to_json([metadata, tensors]).encode()))


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type, its shape, and its bytes [start, start + length)."""

    kind: str
    shape: tuple[int, ...]
    start: int
    length: int


class TensorFile:
    """An open safetensors file.

    Raises:
        Failure: the file is missing, cut short or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file: BinaryIO = path.open("rb")
        except OSError as error:
            raise Failure(f"{path}: cannot be read: {system_reason(error)}") from error
        try:
            self._read_header()
        except Failure:
            self.file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _read_header(self) -> None:
        size = os.fstat(self.file.fileno()).st_size
        try:
            (length,) = struct.unpack("<Q", self.file.read(8))
            if length > min(LONGEST_HEADER, size - 8):
                raise ValueError("the header is longer than the file")
            text = self.file.read(length)
            header = json.loads(text)
            # A key that is there twice or a changed space would not change the checksum of what was parsed.
            canonical = to_json(header).encode() == text.rstrip(b" ")
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            if not all(isinstance(value, str) for value in self.metadata.values()):
                raise ValueError("metadata that is no text")
            self._check_header(header, canonical)
            self.entries = {name: self._entry(facts, 8 + length) for name, facts in header.items()}
        except UnicodeDecodeError as error:
            raise Failure(
                f"{self.path}: cut short or damaged (the header is no text); make or copy it again"
            ) from error
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Failure(f"{self.path}: cut short or damaged ({error}); make or copy it again") from error
        end = max((entry.start + entry.length for entry in self.entries.values()), default=0)
        if end > size:
            raise Failure(f"{self.path}: cut short ({size} of {end} bytes); make or copy it again")
        if self.entries and end < size:
            raise Failure(f"{self.path}: damaged ({size - end} bytes too many); make or copy it again")

    def _check_header(self, tensors: dict[str, Any], canonical: bool) -> None:
        """Compare the header with its checksum, which only files of ours have."""
        expected = self.metadata.pop(HEADER_CHECKSUM, None)
        if expected is None:
            return
        if not canonical or expected != header_checksum(self.metadata, tensors):
            raise ValueError("the header does not have its checksum")

    @staticmethod
    def _entry(facts: dict[str, Any], start: int) -> Entry:
        first, last = map(index, facts["data_offsets"])
        shape = tuple(map(index, facts["shape"]))
        kind = KINDS.get(facts["dtype"], facts["dtype"])
        if len(shape) > MOST_AXES or any(not 0 <= axis < 2**48 for axis in shape):
            raise ValueError("a tensor's shape is none")
        count = math.prod(shape)
        if first < 0 or last < first or (kind in WIDTHS and last - first != count * WIDTHS[kind]):
            raise ValueError("a tensor's size does not fit its shape")
        return Entry(kind, shape, start + first, last - first)

    def copy(self, name: str, into: np.ndarray) -> None:
        """Read a tensor's bytes into `into` (length,) and compare them with their checksum, where there is one."""
        entry = self.entries[name]
        self.file.seek(entry.start)
        if self.file.readinto(into.data) != entry.length:  # type: ignore[attr-defined]
            raise Failure(f"{self.path}: cut short in {name}; make or copy it again")
        expected = self._checksums().get(name)
        if expected is not None and zlib.crc32(into.data) != expected:
            raise Failure(
                f"{self.path}: {name} does not have its checksum; the file is damaged: make it again"
            )

    def _checksums(self) -> dict[str, int]:
        if not hasattr(self, "_known"):
            known = from_json(self.metadata.get(CHECKSUMS, "{}"))
            if not isinstance(known, dict):
                raise Failure(f"{self.path}: damaged checksums; make or copy it again")
            self._known: dict[str, int] = known
        return self._known

    def read(self, name: str) -> np.ndarray:
        """A tensor in its shape, in ordinary memory; float64 becomes float32.

        Raises:
            Failure: damaged, or of a type that is not a float.
        """
        entry = self.entries[name]
        if entry.kind not in (*WIDTHS, "F64"):
            raise Failure(
                f"{self.path}: {name} is {entry.kind}; expected float32, bfloat16 or float16 weights"
            )
        content = np.empty(entry.length, np.uint8)
        self.copy(name, content)
        if entry.kind == "F64":
            return content.view(np.float64).astype(np.float32).reshape(entry.shape)
        return content.view(TYPES[entry.kind]).reshape(entry.shape)

    def map(self, names: Collection[str]) -> dict[str, np.ndarray]:
        """Tensors as views into the file, for random access: nothing is read ahead but what is asked for."""
        mapping = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            mapping.madvise(mmap.MADV_RANDOM)
        everything = np.frombuffer(mapping, np.uint8)
        entries = ((name, self.entries[name]) for name in names)
        return {
            name: everything[entry.start : entry.start + entry.length].view(TYPES[entry.kind])
            for name, entry in entries
        }


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write flat `tensors` beside `path`, then rename.

    Raises:
        Failure: it cannot be written; nothing is left behind.
    """
    kinds = {np.dtype(array): kind for kind, array in TYPES.items()}
    checksums = {name: zlib.crc32(tensor.data.cast("B")) for name, tensor in tensors.items()}
    facts = {**metadata, CHECKSUMS: to_json(checksums)}
    entries: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        kind = kinds[tensor.dtype]
        offsets = [at, at + tensor.nbytes]
        entries[name] = {"dtype": NAMES[kind], "shape": [tensor.size], "data_offsets": offsets}
        at = offsets[1]
    facts[HEADER_CHECKSUM] = header_checksum(facts, entries)
    text = to_json({"__metadata__": facts, **entries}).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes may pack one model
    try:
        with beside.open("wb") as file:
            file.write(struct.pack("<Q", len(text)))
            file.write(text)
            for tensor in tensors.values():
                file.write(tensor.data.cast("B"))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise Failure(f"{path}: cannot be written: {system_reason(error)}") from error
    finally:
        with suppress(OSError):  # it is not there where all went well
            beside.unlink()
