"""Files and folders that a recipe's `data:` names: checked without the libraries that read them, which load slowly."""

from __future__ import annotations

from pathlib import Path

from sparsecli.console import Failure
from sparsecli.data.corpus import matching
from sparsecli.recipe.data import CopyTask, DataSpec, ImagesSpec, SavedTokenizer, StoredImages


def check_places(data: DataSpec | None, tokenizer: bool = True) -> None:
    """Raise Failure unless the files and folders are there that `data` names; its tokenizer's only if it is used."""
    if data is None or isinstance(data, CopyTask):
        return
    if isinstance(data, ImagesSpec):
        if isinstance(data, StoredImages):
            images_place(data)
        return
    if data.source == "files":
        for key, patterns in (("data.paths", data.paths), ("data.held_out_paths", data.held_out_paths)):
            for pattern in patterns or ():
                matching(pattern, key)
    if tokenizer and isinstance(data.tokenizer, SavedTokenizer):
        tokenizer_folder(data.tokenizer)


def images_place(data: StoredImages) -> Path:
    """The folder or the .npz file of images. Raises Failure if it is not there."""
    path = Path(data.path)
    if not (path.is_dir() or (path.is_file() and path.suffix == ".npz")):
        raise Failure(f"data.path: {path}: no such folder or .npz file")
    return path


def tokenizer_folder(spec: SavedTokenizer) -> Path:
    """The folder of a saved tokenizer, or of the model of a run. Raises Failure if it is not there."""
    folder = Path(spec.path)
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not folder.is_dir():
        raise Failure(f"data.tokenizer.path: {spec.path} is not a folder")
    return folder
