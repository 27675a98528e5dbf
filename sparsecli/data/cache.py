"""The cache: folders whose names are hashes of their inputs, and which appear only when they are complete."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from sparsecli.console import Failure, system_reason


def cache_folder(given: Path | None = None) -> Path:
    """The cache folder: `given`, else `$SPARSECLI_CACHE`, else `~/.cache/sparsecli`. It is created if missing.

    Raises `Failure` when it cannot be written to.
    """
    folder = given or Path(os.environ.get("SPARSECLI_CACHE") or "~/.cache/sparsecli").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise Failure(
            f"{folder}: the cache cannot be written ({system_reason(error)}); set SPARSECLI_CACHE to another folder"
        ) from None


def digest(*parts: str) -> str:
    """Hash of a list of texts and their lengths, so that texts that are split differently have different hashes."""
    state = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        state.update(len(encoded).to_bytes(8))
        state.update(encoded)
    return state.hexdigest()[:32]


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a temporary folder, then rename it to `folder`. Another process may do so first."""
    beside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        fill(beside)
        if not folder.exists():
            beside.rename(folder)
    except Exception as error:
        reason = system_reason(error)
        if reason is None:
            raise
        if not folder.exists():
            raise Failure(f"{folder}: cannot be written: {reason}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
