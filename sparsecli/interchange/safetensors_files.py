"""Weight files in safetensors: read one tensor at a time, and written in shards."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsecli.console import Failure, progress
from sparsecli.model.files import INDEX, WEIGHTS, last_line
from sparsecli.model.tensors import Shape

SHARD_BYTES = 2_000_000_000
"""Largest size of a weight file, unless one tensor is larger; writing needs that much memory."""

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

EXPERT = re.compile(r"\.experts\.(\d+)\.")

Item = TypeVar("Item")


class TensorReader(Protocol):
    """The tensors of a checkpoint; each is read on request."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shapes by name."""

    @property
    def types(self) -> Mapping[str, torch.dtype]:
        """Types by name."""

    def read(self, name: str) -> Tensor:
        """One tensor."""


class SafetensorsReader:
    """The tensors of safetensors files.

    Args:
        types: those that tensors may have, by their names in the files.
    Raises:
        Failure: a file is cut short or damaged, or a tensor is of a type that is not one of `types`.
    """

    def __init__(self, files: Sequence[Path], types: Mapping[str, torch.dtype] = TYPES) -> None:
        self.files = {}
        self.shapes: dict[str, Shape] = {}
        self.types: dict[str, torch.dtype] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise Failure(f"{path}: cut short or damaged ({last_line(error)}); copy it again") from error
            for name, piece in slices.items():
                if piece.get_dtype() not in types:
                    raise Failure(
                        f"{path}: tensor {name} is {piece.get_dtype()}, not one of {', '.join(types)}"
                    )
                self.files[name] = file
                self.shapes[name] = tuple(piece.get_shape())
                self.types[name] = types[piece.get_dtype()]

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored."""
        return self.files[name].get_tensor(name)


class StackedReader:
    """The tensors of another reader; those of experts, which files hold one by one, as one tensor for all of them.

    Its name has a `*` in place of the expert's number, and its first axis counts experts. Where numbers, shapes or
    types do not fit each other, the tensors keep their own names.
    """

    def __init__(self, reader: TensorReader) -> None:
        self.reader = reader
        numbers: dict[str, list[int]] = {}
        for name in reader.shapes:
            if match := EXPERT.search(name):
                stack = f"{name[: match.start(1)]}*{name[match.end(1) :]}"
                numbers.setdefault(stack, []).append(int(match[1]))
        self.stacks: dict[str, list[str]] = {}
        for stack, found in numbers.items():
            names = [stack.replace("*", str(number)) for number in range(len(found))]
            kinds = {(reader.shapes.get(name), reader.types.get(name)) for name in names}
            if len(kinds) == 1 and None not in next(iter(kinds)):
                self.stacks[stack] = names
        stacked = {name for names in self.stacks.values() for name in names}
        self.shapes: dict[str, Shape] = {k: shape for k, shape in reader.shapes.items() if k not in stacked}
        self.types: dict[str, torch.dtype] = {k: kind for k, kind in reader.types.items() if k not in stacked}
        for stack, names in self.stacks.items():
            self.shapes[stack] = (len(names), *reader.shapes[names[0]])
            self.types[stack] = reader.types[names[0]]

    def read(self, name: str) -> Tensor:
        """One tensor, or a stack."""
        if name not in self.stacks:
            return self.reader.read(name)
        return torch.stack([self.reader.read(each) for each in self.stacks[name]])


def unstacked(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors of single experts in a stack, see `StackedReader`; any other tensor as it is."""
    if "*" not in name:
        return {name: tensor}
    return {name.replace("*", str(number)): each for number, each in enumerate(tensor)}


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise Failure if a tensor holds a NaN or an infinity."""
    if not torch.isfinite(tensor).all():
        raise Failure(f"tensor {name} holds a NaN or an infinity; the checkpoint is damaged")


def write_shards(
    folder: Path,
    items: Iterable[Item],
    size: Callable[[Item], int],
    make: Callable[[Item], Mapping[str, Tensor]],
    description: str,
) -> list[Path]:
    """Write the tensors that `make` gives for each item, at most a shard in memory.

    Args:
        size: bytes of an item's tensors.
    Returns:
        The files: one, or several beside an index, named as in transformers.
    Raises:
        SafetensorError: a file cannot be written; see `console.system_reason`.
    """
    shards = _divide(items, size)
    files: list[Path] = []
    weight_map: dict[str, str] = {}
    total = 0
    with progress(description, sum(map(len, shards))) as bar:
        for number, shard in enumerate(shards, 1):
            tensors: dict[str, Tensor] = {}
            for item in shard:
                tensors |= {name: tensor.contiguous() for name, tensor in make(item).items()}
                bar.advance()
            stem, _, ending = WEIGHTS.partition(".")
            name = WEIGHTS if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.{ending}"
            save_file(tensors, folder / name, metadata={"format": "pt"})
            files.append(folder / name)
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _divide(items: Iterable[Item], size: Callable[[Item], int]) -> list[list[Item]]:
    """The items of each shard."""
    shards: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        if shards[-1] and filled + size(item) > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size(item)
    return shards
