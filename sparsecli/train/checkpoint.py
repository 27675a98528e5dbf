"""Checkpoints: written to a temporary folder, sealed with a manifest, then renamed. Damaged ones are not used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"


def seal(written: Path, checkpoints: Path) -> Path:
    """Move a finished checkpoint folder to its place under `checkpoints`.

    The manifest lists every file's size and SHA-256 and is the last file written.
    """
    manifest = {
        str(path.relative_to(written)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(written.rglob("*"))
        if path.is_file()
    }
    beside = written / f"{MANIFEST}.tmp"
    beside.write_text(_written(manifest))
    beside.rename(written / MANIFEST)
    place = checkpoints / written.name
    if place.exists():
        shutil.rmtree(place)  # only a damaged one can exist here: the run would have resumed from a sound one
    written.rename(place)
    return place


def prune(checkpoints: Path, newest: Path, keep: int) -> None:
    """Delete all checkpoints but the last `keep` up to `newest`, which is kept; later ones stay."""
    older = [folder for folder in _newest_first(checkpoints) if step_of(folder) <= step_of(newest)]
    for folder in older[keep:]:
        shutil.rmtree(folder)


def newest_sound(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that matches its manifest, and a message for each newer one that does not."""
    skipped: list[str] = []
    for folder in _newest_first(checkpoints):
        damage = _damage(folder)
        if damage is None:
            return folder, skipped
        skipped.append(f"{folder.name}: {damage}")
    return None, skipped


def step_of(checkpoint: Path) -> int:
    """Number of optimizer steps at a checkpoint, from its folder's name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def _newest_first(checkpoints: Path) -> list[Path]:
    found = [path for path in checkpoints.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def _damage(folder: Path) -> str | None:
    try:
        text = (folder / MANIFEST).read_text()
        manifest = json.loads(text)
        if text != _written(manifest):  # it names a file twice, for instance
            return f"{MANIFEST} has changed since it was written"
        present = {os.path.relpath(path, folder): path for path in folder.rglob("*") if path.is_file()}
        for name, entry in manifest.items():
            if name not in present:
                return f"{name} is missing"
            size = present[name].stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size:,} bytes, not {entry['bytes']:,}"
            if _sha256(present[name]) != entry["sha256"]:
                return f"{name} has changed since it was written (SHA-256 differs)"
    except FileNotFoundError:
        return f"no {MANIFEST}: it was not written completely"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be used ({type(error).__name__})"
    return None


def _written(manifest: Any) -> str:
    """A manifest as it is written."""
    return json.dumps(manifest, indent=1)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
