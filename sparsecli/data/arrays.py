"""Memory-mapped arrays on disk. A folder of arrays is written once, and appears only when it is complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sparsecli.console import warn
from sparsecli.data.cache import write_folder

INDEX = "index.json"


class ArrayWriter:
    """Appends to arrays whose length is not known in advance. The last file that it writes is their index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: dict[str, dict[str, Any]] = {}
        self._files: dict[str, BinaryIO] = {}
        self._open = ExitStack()

    def append(self, name: str, values: np.ndarray) -> None:
        """Append `values`, of one axis, to the array `name`."""
        if name not in self._files:
            self._files[name] = self._open.enter_context((self.folder / f"{name}.bin").open("wb"))
            self.index[name] = {"dtype": values.dtype.name, "length": 0}
        self._files[name].write(values.tobytes())
        self.index[name]["length"] += len(values)

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._open.close()
        if kind is None:
            (self.folder / INDEX).write_text(json.dumps(self.index))


def stored_arrays(folder: Path, fill: Callable[[ArrayWriter], None]) -> dict[str, np.ndarray]:
    """The arrays in `folder`, memory-mapped. `fill` writes them if they are missing or damaged.

    Raises `Failure` when they cannot be written.
    """
    if folder.exists() and (damage := _damage(folder)):
        warn(f"{folder}: {damage}; packing again")
        shutil.rmtree(folder)
    if not folder.exists():

        def write(beside: Path) -> None:
            with ArrayWriter(beside) as writer:
                fill(writer)

        write_folder(folder, write)
    index = json.loads((folder / INDEX).read_text())
    return {
        name: np.memmap(folder / f"{name}.bin", dtype=entry["dtype"], mode="r")
        for name, entry in index.items()
    }


def _damage(folder: Path) -> str | None:
    """The damage of the arrays in a folder, in words; None if they are sound."""
    try:
        for name, entry in json.loads((folder / INDEX).read_text()).items():
            expected = entry["length"] * np.dtype(entry["dtype"]).itemsize
            size = (folder / f"{name}.bin").stat().st_size
            if size != expected:
                return f"{name}.bin has {size} bytes, not {expected}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return f"not a packed corpus ({type(error).__name__}: {error})"
    return None
