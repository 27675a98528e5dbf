"""Imports of foreign checkpoints in the cache folder: a command that reads one imports it once."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from sparsecli import __version__, console
from sparsecli.console import Failure
from sparsecli.interchange.hub import DESCRIPTIONS
from sparsecli.interchange.importing import write_model
from sparsecli.interchange.sources import ForeignModel
from sparsecli.model.files import (
    KEEP_AFTER,
    cache_place,
    check_weights,
    fingerprint,
    read_description,
    weight_files,
)
from sparsecli.model.outputs import written_beside


def imported(source: ForeignModel, temporary: Path, keep: bool = True) -> Path:
    """A model folder of ours for `source`: one that was kept, or a new one in the folder `temporary`.

    With `keep`, a new one that took longer than `KEEP_AFTER` is copied to the cache folder. It replaces
    those of earlier versions of the same checkpoint.

    Raises:
        Failure: as `write_model`.
    """
    described = [source.path / name for name in DESCRIPTIONS if (source.path / name).is_file()]
    files = [source.path] if source.gguf else [*weight_files(source.path), *described]
    place = cache_place(source.path, f"import-{__version__}-{fingerprint(files)[:16]}")
    if place.is_dir():
        try:
            check_weights(place, read_description(place).spec)
            return place
        except Failure as failure:
            console.warn(f"{failure.message}; the model is imported again")
    folder = temporary / "model"
    started = time.perf_counter()
    write_model(source, folder)  # a GGUF file with its own codes
    if keep and time.perf_counter() - started > KEEP_AFTER:
        return _keep(folder, place) or folder
    return folder


def _keep(folder: Path, place: Path) -> Path | None:
    """Copy `folder` to `place`; None where that cannot be written."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for old in place.parent.glob(f"{place.name.partition('-')[0]}-import-*"):
            shutil.rmtree(old)
        with written_beside(place) as beside:
            shutil.copytree(folder, beside, dirs_exist_ok=True)
    except (Failure, OSError):
        return None
    size = sum(path.stat().st_size for path in place.iterdir()) / 1e9
    console.say(f"the imported model is kept in {place} ({size:.1f} GB); --no-keep does not keep it")
    return place
