"""The weights of a model folder without torch: tensor by tensor, and packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from sparsecli.console import Failure
from sparsecli.decode.packed.pack import PackedModel, pack
from sparsecli.decode.packed.precision import Precision
from sparsecli.decode.packed.tensor_file import TensorFile
from sparsecli.model.files import check_weights, weight_files
from sparsecli.spec.model import ModelSpec


class Weights(Mapping[str, np.ndarray]):
    """Tensors by their names in the state dict, bfloat16 as uint16; each is read when it is asked for.

    So packing needs the memory of the packed model and of one tensor, not of both models.
    """

    def __init__(self, files: list[TensorFile]) -> None:
        self.places = {name: file for file in files for name in file.entries}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.places[name].read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def read_weights(folder: Path) -> Weights:
    """The weights in `folder`.

    Raises:
        Failure: a file is missing, cut short or damaged; a tensor that cannot be read, when it is asked for.
    """
    return Weights([TensorFile(path) for path in weight_files(folder)])


def pack_folder(folder: Path, spec: ModelSpec, precision: Precision) -> PackedModel:
    """The weights in `folder`, packed.

    Raises:
        Failure: they do not load, are not those of `spec`, hold a NaN or an infinity, or memory does not suffice.
    """
    check_weights(folder, spec)
    try:
        return pack(spec, read_weights(folder), precision)
    except Failure as failure:
        raise Failure(f"{folder}: {failure.message}") from failure
