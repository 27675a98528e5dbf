"""The weights of a model folder for the native engine: packed before, or now and then kept for the next start."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.decode.packed.file import open_packed, packed_of, save
from sparsecli.decode.packed.folder import pack_folder
from sparsecli.decode.packed.pack import PackedModel
from sparsecli.decode.packed.precision import Precision
from sparsecli.model.files import (
    CONFIG,
    INDEX,
    KEEP_AFTER,
    PACKED,
    WEIGHTS,
    Description,
    cache_place,
    fingerprint,
    weight_files,
)


def packed_weights(folder: Path, model: Description, dtype: str | None, keep: bool = True) -> PackedModel:
    """The weights in `folder` for the native engine: the packed file, unless `dtype` asks for another type.

    Weights that were converted to another type, which took longer than `KEEP_AFTER`, are kept with `keep`: beside the
    model, or in the cache folder where that cannot be written. Others are only copied, as fast as a kept file is read.

    Raises:
        Failure: the weights do not load, or they are packed as another type without the original files.
    """
    if (folder / PACKED).is_file():
        packed = open_packed(folder / PACKED)
        if packed.spec != model.spec:
            raise Failure(f"{folder}: {PACKED} and {CONFIG} do not belong together; pack the model again")
        held = packed.precision.units
        if dtype in (None, held):
            return packed
        if not has_weights(folder):
            raise Failure(
                f"{folder / PACKED}: was packed as {held}; leave out --dtype {dtype}, or pack the model again with it"
            )
    precision = precision_of(model, dtype)
    if dtype in (None, model.dtype) or model.spec.quantization.gguf:
        return pack_folder(folder, model.spec, precision)
    made_of = _fingerprint(folder)
    places = _places(folder, dtype)
    if kept := _open_kept(places, made_of):
        return kept
    started = time.perf_counter()
    packed = pack_folder(folder, model.spec, precision)
    if keep and time.perf_counter() - started > KEEP_AFTER:
        _keep(packed, places, made_of)
    return packed


def precision_of(model: Description, dtype: str | None) -> Precision:
    """The types for `dtype`; for None those in which the weights are stored.

    Codes of a GGUF file stay as they are, with a warning; keys and values are then bfloat16.
    """
    if kinds := model.spec.quantization.gguf:
        if dtype is not None:
            names = ", ".join(sorted({*kinds.values()}))
            console.warn(f"--dtype {dtype}: the weights keep the codes of their GGUF file ({names})")
        return Precision.of(model.dtype, cache="bfloat16")
    return Precision.of(dtype or model.dtype)


def weight_type(packed: PackedModel) -> str:
    """The type of the weights in words: that of the units, or the types of a GGUF file, the most frequent first."""
    return packed.spec.quantization.gguf_types or packed.precision.units


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds safetensors files, not only packed weights."""
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def _fingerprint(folder: Path) -> str:
    """A fingerprint of the weight files and config.json, which changes when they change."""
    description = (folder / CONFIG).read_bytes()
    return hashlib.sha256(fingerprint(weight_files(folder)).encode() + description).hexdigest()


def _places(folder: Path, dtype: str) -> list[Path]:
    """Where packed weights are kept: beside the model, else in the user's cache folder."""
    return [folder / f"kept-{dtype}.spk", cache_place(folder, f"{dtype}.spk")]


def _open_kept(places: list[Path], made_of: str) -> PackedModel | None:
    for path in places:
        if packed_of(path) == made_of:
            try:
                return open_packed(path)
            except Failure as failure:
                console.warn(f"{failure.message}; the weights are packed again")
    return None


def _keep(packed: PackedModel, places: list[Path], made_of: str) -> None:
    for path in places:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save(packed, path, made_of)
        except (Failure, OSError):
            continue
        size = f"{packed.nbytes / 1e9:.1f} GB"
        console.say(
            f"the packed weights are kept in {path} ({size}) for the next start; --no-keep does not keep them"
        )
        return
