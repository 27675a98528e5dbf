"""Documents of a corpus, split into training and held-out text."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from glob import glob
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

from sparsecli.console import Failure, say, system_reason
from sparsecli.recipe.data import HubCorpus, TextSpec
from sparsecli.recipe.messages import found_as

LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), ("json", {})),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
"""Files of rows by their endings, and the `datasets` loader that reads them with its options."""

TEXT = {".txt", ".md", ".py"}
"""Endings of plain text, one document a file. Files with other endings are read so too, with a message, except:"""

NO_TEXT = {
    *(".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4", ".zstd", ".lzma"),
    *(".jsonlines", ".jl", ".ipynb", ".warc", ".avro", ".orc", ".feather", ".h5", ".hdf5", ".lance"),
    *(".xls", ".xlsx", ".ods", ".db", ".sqlite", ".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub"),
    *(".pkl", ".pickle", ".npy", ".npz", ".pt", ".pth", ".safetensors", ".gguf"),
}
"""Endings of archives, tables and documents that cannot be read as plain text. They are refused."""

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "zstandard"}
"""Endings that may follow those of text, JSON and CSV files, and the modules that decompress them."""

Document = TypeVar("Document")
Row = tuple[str, ...]


@dataclass(frozen=True)
class Splits(Generic[Document]):
    """The two halves of a corpus; no document is in both."""

    train: list[Document]
    held_out: list[Document]


class Column(NamedTuple):
    """A column of texts, and the recipe's key for its name."""

    name: str
    key: str


def read_documents(data: TextSpec) -> Splits[str]:
    """The documents of `data`, one column of its rows. Raises `Failure` as `read_rows` does."""
    name = "text" if data.source == "stdlib" else data.text_field
    splits = read_rows(data, [Column(name, "data.text_field")])
    return Splits([text for (text,) in splits.train], [text for (text,) in splits.held_out])


def read_files(patterns: Sequence[str], text_field: str, key: str) -> list[str]:
    """The documents of files, without repetitions.

    Args:
        patterns: paths or globs.
        text_field: column that holds the text, in files of rows.
        key: the option that names the files, for messages.
    Raises:
        Failure: no file matches, one cannot be read, or none holds text.
    """
    gaps = Gaps([Column(text_field, f"{key}-field")])
    documents = [text for (text,) in _distinct(_files(patterns, key, gaps))]
    if not documents:
        raise Failure(gaps.reason() or f"{key}: {', '.join(patterns)} holds no text")
    gaps.tell()
    return documents


def read_rows(data: TextSpec, columns: Sequence[Column]) -> Splits[Row]:
    """All rows of `data`, in a fixed order, without repetitions and without rows that have an empty text.

    A row is held out when the hash of its first text falls below `held_out_fraction`, so the split does not
    depend on names, order or neighbours. A single document is cut in two. Files of `packages` are for
    training only. Raises `Failure` when the text cannot be read or when one split has no row.
    """
    gaps = Gaps(columns)
    if data.source == "stdlib":
        rows = _distinct((text,) for text in _python_files(Path(sysconfig.get_path("stdlib"))))
    elif data.source == "files":
        rows = _distinct(_files(data.paths, "data.paths", gaps))
    else:
        rows = _distinct(_hub(data, data.split, gaps))
    if not rows:
        raise Failure(gaps.reason() or "data: the source holds no text")

    if data.source == "files" and data.held_out_paths is not None:
        apart = _distinct(_files(data.held_out_paths, "data.held_out_paths", gaps))
    elif data.source == "hub" and data.held_out_split is not None:
        apart = _distinct(_hub(data, data.held_out_split, gaps))
    else:
        apart = None
    gaps.tell()
    if apart is None:
        splits = _split(rows, data.held_out_fraction)
    else:
        kept_apart = {row[0] for row in apart}
        splits = Splits([row for row in rows if row[0] not in kept_apart], apart)
    if data.source == "stdlib" and data.packages:
        known = {*splits.train, *splits.held_out}
        more = ((text,) for name in data.packages for text in _python_files(_package(name)))
        splits.train.extend(row for row in _distinct(more) if row not in known)

    if not splits.held_out:
        raise Failure("data: the held-out split has no text; add documents or change data.held_out_fraction")
    if not splits.train:
        raise Failure("data: the training split has no text; add documents that are not held out")
    return splits


def _distinct(rows: Iterable[Row]) -> list[Row]:
    return [row for row in dict.fromkeys(rows) if all(text.strip() for text in row)]


def _split(rows: list[Row], fraction: float) -> Splits[Row]:
    if len(rows) == 1 and len(rows[0]) == 1:
        ((text,),) = rows
        line_end = text.find("\n", int(len(text) * (1 - fraction)))
        cut = line_end + 1 if 0 <= line_end < len(text) - 1 else int(len(text) * (1 - fraction))
        return Splits([(text[:cut],)] if cut else [], [(text[cut:],)])
    places = [_place(row[0]) for row in rows]
    # A handful of documents may all lie above the fraction; then the lowest one is held out.
    limit = max(fraction, min(places))
    train = [row for row, place in zip(rows, places, strict=True) if place > limit]
    return Splits(train, [row for row, place in zip(rows, places, strict=True) if place <= limit])


def _place(text: str) -> float:
    """A hash of a document, as a number from 0 to 1."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def _python_files(root: Path) -> Iterator[str]:
    """The Python files below `root`, without those of packages that were installed there."""
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(path.relative_to(root).parts):
            continue
        try:
            yield path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            continue  # some of the library's tests use other encodings on purpose


def _package(name: str) -> Path:
    """Folder of an installed package, by its import name. Raises `Failure` if it is not installed."""
    if name in sys.stdlib_module_names:
        raise Failure(
            f"data.packages: {name} is part of the standard library, which is always read; leave it out"
        )
    try:
        found = find_spec(name) if name.isidentifier() else None
    except ValueError:  # a module without an import spec, such as __main__
        found = None
    if found is None or not found.submodule_search_locations:
        raise Failure(
            f"data.packages: no package {name} is installed (use the import name); "
            f"install it, or leave it out"
        )
    return Path(found.submodule_search_locations[0])


def _files(patterns: Sequence[str], key: str, gaps: Gaps) -> Iterator[Row]:
    assumed: Counter[str] = Counter()
    for pattern in patterns:
        for path in matching(pattern, key):
            ending, _ = _endings(path)
            if ending in LOADERS:
                loader, options = LOADERS[ending]
                rows = _load(str(path), loader, data_files=str(path), **options)
                yield from _texts(rows, gaps, str(path), None)
            elif len(gaps.columns) > 1:
                raise Failure(f"{path}: has no columns; pairs need {', '.join(LOADERS)} files")
            else:
                if ending not in TEXT:
                    assumed[ending or "no ending"] += 1
                yield (_text(path),)
    if assumed:
        kinds = ", ".join(f"{ending} ({count:,})" for ending, count in assumed.items())
        say(f"{key}: reading as plain text, one document per file: {kinds}")


def matching(pattern: str, key: str) -> list[Path]:
    """The files that match a pattern, in order. Raises `Failure` if there are none."""
    names = sorted(glob(os.path.expanduser(pattern), recursive=True))
    paths = [Path(name) for name in names if Path(name).is_file()]
    if not paths:
        hint = f"; for the files of this folder write {pattern}/**" if Path(pattern).is_dir() else ""
        raise Failure(f"{key}: no file matches {pattern} (looked from {Path.cwd()}){hint}")
    return paths


def _endings(path: Path) -> tuple[str, str]:
    """The ending of a file's format, and the ending of its compression or nothing, in lower case.

    Raises `Failure` for formats that are not supported.
    """
    suffix = path.suffix.lower()
    compression = suffix if suffix in COMPRESSIONS else ""
    ending = Path(path.stem).suffix.lower() if compression else suffix
    if ending in NO_TEXT or (compression and ending in (".parquet", ".arrow")):
        kinds = f"text, {', '.join(LOADERS)}; text, JSON and CSV also as {', '.join(COMPRESSIONS)}"
        raise Failure(
            f"{path}: {ending}{compression} files are not supported; convert it, or leave it out (supported: {kinds})"
        )
    if compression and find_spec(COMPRESSIONS[compression]) is None:
        package = COMPRESSIONS[compression]
        raise Failure(f"{path}: {compression} files need the package {package}: pip install {package}")
    return ending, compression


def _open(path: Path) -> BinaryIO:
    """The content of a file that may be compressed."""
    _, compression = _endings(path)
    if compression:
        opened: BinaryIO = import_module(COMPRESSIONS[compression]).open(path, "rb")
        return opened
    return path.open("rb")


def _text(path: Path) -> str:
    try:
        with _open(path) as file:
            return file.read().decode("utf-8-sig")  # without a byte-order mark
    except UnicodeDecodeError as error:
        raise Failure(
            f"{path}: not UTF-8 text (byte {error.start}); convert it, or leave it out of data.paths"
        ) from None
    except Failure:
        raise
    except Exception as error:  # every compression has exceptions of its own
        reason = system_reason(error) or str(error) or type(error).__name__
        raise Failure(f"{path}: {reason}") from None


def _hub(data: HubCorpus, split: str, gaps: Gaps) -> Iterator[Row]:
    rows = _load(
        f"dataset {data.name}",
        data.name,
        name=data.subset,
        revision=data.revision,
        split=split,
        streaming=data.streaming,
    )
    return _texts(rows, gaps, f"dataset {data.name}", data.max_documents)


def _load(label: str, loader: str, **arguments: Any) -> Iterable[dict[str, Any]]:
    """Rows of a dataset. Local files are streamed, because the library's cache of them may be outdated."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # errors that it logs are also raised
    try:
        return datasets.load_dataset(loader, **{"split": "train", "streaming": True, **arguments})
    except Exception as error:  # the library's readers raise many types
        raise _unreadable(label, error) from None


def _texts(rows: Iterable[dict[str, Any]], gaps: Gaps, label: str, limit: int | None) -> Iterator[Row]:
    """The texts of some columns. Rows without one of the texts are left out and counted."""
    taken = itertools.islice(iter(rows), limit)
    for number in itertools.count():
        try:
            row = next(taken, None)
        except Exception as error:  # see _load
            raise _unreadable(label, error) from None
        if row is None:
            if not number:
                raise Failure(f"{label}: holds no rows")
            return
        for name, key in gaps.columns:
            if name not in row:
                raise Failure(f"{label}: no column {name!r}; it has {', '.join(sorted(row))} (set {key})")
            if not isinstance(row[name], str | None):
                raise Failure(f"{label}: column {name!r} holds {type(row[name]).__name__}, not text")
        texts = tuple(row[name] or "" for name, _ in gaps.columns)
        if gaps.check(texts, label):
            yield texts


@dataclass
class Gaps:
    """Counts of rows without text in one of `columns`, by column, and the files they are in."""

    columns: Sequence[Column]
    rows: int = 0
    left_out: int = 0
    empty: Counter[Column] = field(default_factory=Counter)
    """Rows without text in a column."""
    places: dict[str, None] = field(default_factory=dict)
    """Labels of the files, or of the dataset, with such rows, in order."""

    def check(self, texts: Row, label: str) -> bool:
        """Count a row; returns whether it has all its texts."""
        empty = [column for column, text in zip(self.columns, texts, strict=True) if not text.strip()]
        self.rows += 1
        if empty:
            self.left_out += 1
            self.empty.update(empty)
            self.places[label] = None
        return not empty

    def tell(self) -> None:
        """Report the rows that were left out, if there are any."""
        if self.left_out:
            counts = ", ".join(f"{column.name!r} ({count:,})" for column, count in self.empty.items())
            say(
                f"{self._places()}: {self.left_out:,} of {self.rows:,} rows are left out: they have no text in {counts}"
            )

    def reason(self) -> str | None:
        """The reason why no row is left; None if no row was left out."""
        if not self.left_out:
            return None
        without = [column for column, count in self.empty.items() if count == self.rows] or list(self.empty)
        names, keys = ([str(part) for part in each] for each in zip(*without, strict=True))
        columns = f"column{'s' * (len(names) > 1)} {' or '.join(map(repr, names))}"
        return f"{self._places()}: no row has text in {columns} (set {' and '.join(keys)})"

    def _places(self) -> str:
        first, *others = self.places
        return f"{first} and {len(others)} more" if others else first


def _unreadable(label: str, error: BaseException) -> Failure:
    while error.__cause__ is not None:  # the library's outermost message does not give the reason
        error = error.__cause__
    path = Path(label)
    if isinstance(error, StopIteration) or type(error).__name__ == "EmptyDataError" or _is_empty(path):
        return Failure(f"{label}: holds no rows")
    if path.is_file() and _endings(path)[0] in (".jsonl", ".ndjson") and (found := _not_json(path)):
        return Failure(found)
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return Failure(f"{label}: cannot be read: {reason}")


def _is_empty(path: Path) -> bool:
    """Whether it is a sound parquet file without rows, for which the library has no message."""
    import pyarrow.parquet

    if path.suffix.lower() != ".parquet":
        return False
    try:
        return pyarrow.parquet.read_metadata(path).num_rows == 0
    except (OSError, pyarrow.ArrowException):
        return False


def _not_json(path: Path) -> str | None:
    """The error of the first line of `path` that is not a JSON object; None if all lines are."""
    with suppress(OSError, EOFError), _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}:{number}"
            try:
                value = json.loads(line) if line.strip() else {}
            except UnicodeDecodeError as error:
                return f"{place}: byte {error.start} of the line is not UTF-8 text"
            except (ValueError, RecursionError) as error:
                return (
                    f'{place}: is not JSON: {error}; every line must be an object such as {{"text": "..."}}'
                )
            if not isinstance(value, dict):
                return f'{place}: is {found_as(value)}, not an object such as {{"text": "..."}}'
    return None
