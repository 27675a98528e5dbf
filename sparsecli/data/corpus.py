"""Documents of a corpus, split into training and held-out text."""

from __future__ import annotations

import hashlib
import itertools
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from sparsecli.console import Failure
from sparsecli.recipe.schema import DataSpec, FilesCorpus, HubCorpus

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Files of rows, and the `datasets` loader that reads them; every other file is one document of text."""


@dataclass(frozen=True)
class Splits:
    """The two halves of a corpus; no document is in both."""

    train: list[str]
    held_out: list[str]


def read_documents(data: DataSpec) -> Splits:
    """All documents of `data`, in a fixed order, without empty ones and without repetitions.

    A document is held out when the hash of its text falls below `held_out_fraction`, so the split does not
    depend on names, order or neighbours. A lone document is cut in two. Raises `Failure` when the text cannot
    be read or when one split has no document.
    """
    if data.source == "stdlib":
        documents = _distinct(_standard_library())
    elif data.source == "files":
        documents = _distinct(_files(data, "paths", data.paths))
    else:
        documents = _distinct(_hub(data))

    if not documents:
        raise Failure("data: the source holds no text")
    if data.source == "files" and data.held_out_paths is not None:
        held_out = _distinct(_files(data, "held_out_paths", data.held_out_paths))
        kept_apart = set(held_out)
        splits = Splits([text for text in documents if text not in kept_apart], held_out)
    else:
        splits = _split(documents, data.held_out_fraction)

    if not splits.held_out:
        raise Failure("data: no text is left to evaluate on; add documents or change data.held_out_fraction")
    if not splits.train:
        raise Failure("data: no text is left to train on; add documents that are not held out")
    return splits


def _distinct(documents: Iterable[str]) -> list[str]:
    return [text for text in dict.fromkeys(documents) if text.strip()]


def _split(documents: list[str], fraction: float) -> Splits:
    if len(documents) == 1:
        text = documents[0]
        line_end = text.find("\n", int(len(text) * (1 - fraction)))
        cut = line_end + 1 if 0 <= line_end < len(text) - 1 else int(len(text) * (1 - fraction))
        return Splits([text[:cut]] if cut else [], [text[cut:]])
    places = [_place(text) for text in documents]
    # A handful of documents may all lie above the fraction; then the lowest one is held out.
    limit = max(fraction, min(places))
    train = [text for text, place in zip(documents, places, strict=True) if place > limit]
    return Splits(train, [text for text, place in zip(documents, places, strict=True) if place <= limit])


def _place(text: str) -> float:
    """Where a document falls between 0 and 1."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def _standard_library() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts or "dist-packages" in path.parts:
            continue
        try:
            yield path.read_bytes().decode()
        except UnicodeDecodeError:
            continue  # a few of the library's own tests are in other encodings on purpose


def _files(data: FilesCorpus, key: str, patterns: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        names = sorted(glob(os.path.expanduser(pattern), recursive=True))
        paths = [Path(name) for name in names if Path(name).is_file()]
        if not paths:
            hint = f"; for the files of this folder write {pattern}/**" if Path(pattern).is_dir() else ""
            raise Failure(f"data.{key}: no file matches {pattern} (looked from {Path.cwd()}){hint}")
        for path in paths:
            loader = LOADERS.get(path.suffix.lower())
            if loader:
                yield from _column(
                    _load(str(path), loader, data_files=str(path)), data.text_field, f"{path}", None
                )
            else:
                yield _text(path)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise Failure(
            f"{path}: not UTF-8 text (byte {error.start}); convert it, or leave it out of data.paths"
        ) from None
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None


def _hub(data: HubCorpus) -> Iterator[str]:
    rows = _load(
        f"dataset {data.name}",
        data.name,
        name=data.subset,
        revision=data.revision,
        split=data.split,
        streaming=data.streaming,
    )
    return _column(rows, data.text_field, f"dataset {data.name}", data.max_documents)


def _load(label: str, loader: str, **arguments: Any) -> Iterable[dict[str, Any]]:
    """Rows of a dataset; local files are streamed, so that nothing stale comes from a cache of theirs."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return datasets.load_dataset(loader, **{"split": "train", "streaming": True, **arguments})
    except Exception as error:  # the library raises whatever its many readers raise
        raise _unreadable(label, error) from None


def _column(rows: Iterable[dict[str, Any]], field: str, label: str, limit: int | None) -> Iterator[str]:
    """The texts of one column; rows without a text are left out."""
    taken = itertools.islice(iter(rows), limit)
    while True:
        try:
            row = next(taken, None)
        except Exception as error:  # see _load
            raise _unreadable(label, error) from None
        if row is None:
            return
        if field not in row:
            raise Failure(
                f"{label}: no column {field!r}; it has {', '.join(sorted(row))} (set data.text_field)"
            )
        value = row[field]
        if value is None:
            continue
        if not isinstance(value, str):
            raise Failure(f"{label}: column {field!r} holds {type(value).__name__}, not text")
        yield value


def _unreadable(label: str, error: BaseException) -> Failure:
    while error.__cause__ is not None:  # the library's outermost message only says that something failed
        error = error.__cause__
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return Failure(f"{label}: cannot be read: {reason}")
