"""Packed models as `.spk` files: safetensors with the layout's version, the architecture and checksums."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sparsecli.console import Failure
from sparsecli.decode.packed import tensor_file
from sparsecli.decode.packed.pack import PackedModel, huge_pages
from sparsecli.decode.packed.precision import Precision, plan
from sparsecli.decode.packed.tensor_file import TYPES
from sparsecli.spec.model import ModelSpec

LAYOUT_VERSION = 2


def save(model: PackedModel, path: Path, made_of: str = "") -> None:
    """Write an `.spk` file: safetensors, with the layout's version, the architecture and checksums beside it.

    Args:
        made_of: says which weights were packed, see `packed_of`.
    Raises:
        Failure: it cannot be written; nothing is left behind.
    """
    facts = {
        "sparsecli_layout": str(LAYOUT_VERSION),
        "spec": model.spec.model_dump_json(),
        "precision": tensor_file.to_json(vars(model.precision)),
        **({"made_of": made_of} if made_of else {}),
    }
    tensor_file.write(path, model.tensors, facts)


def packed_of(path: Path) -> str | None:
    """What `save` was told of the weights in an `.spk` file; None if there is no such file, or a damaged one."""
    try:
        with tensor_file.TensorFile(path) as file:
            current = file.metadata.get("sparsecli_layout") == str(LAYOUT_VERSION)
            return file.metadata.get("made_of") if current else None
    except Failure:
        return None


def open_packed(path: Path, from_disk: bool = False) -> PackedModel:
    """Read an `.spk` file.

    With `from_disk` the units of sparse layers stay in the file and are read as they are chosen, unchecked; all
    else is checked and copied into memory.

    Raises:
        Failure: the file is missing, cut short, damaged, or of another layout version.
    """
    with tensor_file.TensorFile(path) as file:
        version = file.metadata.get("sparsecli_layout")
        if version != str(LAYOUT_VERSION):
            kind = "not a packed model" if version is None else f"layout version {version}"
            raise Failure(
                f"{path}: {kind}; this sparsecli reads version {LAYOUT_VERSION}: pack the model again"
            )
        try:
            spec = ModelSpec.model_validate_json(file.metadata["spec"])
            precision = Precision(**tensor_file.from_json(file.metadata["precision"]))
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise Failure(f"{path}: its description is damaged; pack the model again") from error
        planned = plan(spec, precision)
        known = {name for slot, _ in planned for name in (slot.key, f"{slot.key}.scale")}
        if strange := file.entries.keys() - known:
            raise Failure(f"{path}: has an unknown tensor {min(strange)}; pack the model again")
        stays = {slot.key for slot, _ in planned if from_disk and slot.layout == "units"}
        if lacking := stays - file.entries.keys():
            raise Failure(f"{path}: lacks the tensor {min(lacking)}; pack the model again")
        wanted = [name for name in file.entries if name not in stays]
        memory = huge_pages(sum(file.entries[name].length for name in wanted))
        arrays: dict[str, np.ndarray] = {}
        at = 0
        for name, entry in file.entries.items():
            if entry.kind not in TYPES:
                raise Failure(
                    f"{path}: {name} is {entry.kind}, which no packed tensor is; pack the model again"
                )
        for name in wanted:
            entry = file.entries[name]
            into = memory[at : at + entry.length]
            file.copy(name, into)
            arrays[name] = into.view(TYPES[entry.kind])
            at += entry.length
        mapped = file.map(stays) if stays else {}
    return PackedModel(spec, precision, arrays | mapped, from_disk=bool(stays))
