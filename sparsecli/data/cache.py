"""The cache: folders whose names are hashes of their inputs, and which appear only when they are complete."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from sparsecli.console import Failure


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
            f"{folder}: the cache cannot be written ({error.strerror}); set SPARSECLI_CACHE to another folder"
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
        reason = why_unwritten(error)
        if reason is None:
            raise
        if not folder.exists():
            raise Failure(f"{folder}: cannot be written: {reason}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def why_unwritten(error: Exception) -> str | None:
    """The system's reason why a file could not be written or read; None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors and tokenizers raise Rust's messages, in exceptions without a common type.
    if found := re.search(r"([^:]+) \(os error \d+\)", str(error)):
        return found[1].strip()
    # torch.save does not give the reason.
    if isinstance(error, RuntimeError) and re.search("inline_container|iostream error", str(error)):
        return "not all data could be written (disk full?)"
    return None
