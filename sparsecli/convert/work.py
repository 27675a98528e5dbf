"""Where a conversion keeps what it has finished until all is done, so that a stopped one goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sparsecli.console import Failure
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.files import CONFIG, read_json, share, weight_files
from sparsecli.model.loading import load_network
from sparsecli.recipe.schema import Recipe
from sparsecli.train import run_directory

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two conversions apart
    fcntl = None  # type: ignore[assignment]

FACTS = "conversion.json"
RESULT = "result"
"""Folder in which the output is made."""
COMPLETE = "complete"
"""Noted when the result is only to be put in its place."""
LOCK = "lock"
DECISIVE = {"data", "convert", "seed"}
HINT = "convert again, and it goes on from there"


@contextmanager
def work_folder(output: Path, recipe: Recipe, source: str) -> Iterator[Work]:
    """The folder of an earlier attempt at `output`, or a new one, which no other process can open meanwhile.

    It is left for the next attempt where something in it is finished.

    Args:
        source: see `fingerprint`.
    Raises:
        Failure: another process is at work there, what is there belongs to another recipe or model, or nothing can
            be written.
    """
    folder = place_of(output)
    with _locked(folder):
        work = Work(folder, recipe, source)
        try:
            yield work
        finally:
            if not work.finished:
                _delete(folder)


class Work:
    """A folder beside the output, `<output>.converting`."""

    def __init__(self, folder: Path, recipe: Recipe, source: str) -> None:
        self.folder, self.hint = folder, HINT
        # Another budget may take what was built for the first: see Conversion._check_budget. Peers change nothing.
        free = {"convert": {"budget", "peers"}}
        decisive = recipe.model_dump(mode="json", include=DECISIVE, exclude=free)
        self.mine = {"source": source, "recipe": decisive}
        self.facts: dict[str, Any] = self._earlier() or self.mine
        if not self.finished:
            self._clear()

    @property
    def finished(self) -> bool:
        """Whether anything is."""
        return self.facts.keys() > self.mine.keys()

    def recall(self, name: str) -> Any:
        """What was noted under `name`, None where nothing was."""
        return self.facts.get(name)

    def note(self, name: str, value: Any) -> None:
        """Keep `value`, which JSON can hold."""
        self.facts = {**self.facts, name: value}
        with run_directory.writing(self.folder, self.hint):
            self._write()

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What was noted under `name`; where nothing was, what `find` gives, which is noted."""
        if name not in self.facts:
            self.note(name, find())
        return self.facts[name]

    def keep_model(self, name: str, model: ScalingTransformerForCausalLM) -> Path:
        """Write a model as a folder; it is there as a whole or not at all."""
        place = self.folder / name
        beside = self.folder / f"{name}.tmp"
        with run_directory.writing(place, self.hint):
            shutil.rmtree(beside, ignore_errors=True)
            shutil.rmtree(place, ignore_errors=True)
            model.save_pretrained(beside)
            share(beside)
            beside.rename(place)
        return place

    def model(self, name: str) -> ScalingTransformerForCausalLM | None:
        """The model that was kept under `name`, None where none was."""
        place = self.folder / name
        return load_network(place) if (place / CONFIG).is_file() else None

    def close(self) -> None:
        """Nothing of this is needed any more."""
        self.facts = self.mine

    def _earlier(self) -> dict[str, Any] | None:
        """What an earlier attempt noted, None where it finished nothing.

        Raises:
            Failure: the folder is another conversion's, or none's.
        """
        if {path.name for path in self.folder.iterdir()} <= {LOCK, f"{FACTS}.tmp"}:
            return None
        try:
            theirs = read_json(self.folder / FACTS)
        except Failure:
            theirs = {}
        theirs = theirs if isinstance(theirs, dict) else {}
        if theirs.keys() == self.mine.keys():
            return None
        if {key: theirs.get(key) for key in self.mine} != self.mine:
            raise Failure(
                f"{self.folder}: holds the beginning of another conversion; delete it, or choose another --output"
            )
        return theirs

    def _clear(self) -> None:
        """Start anew."""
        with run_directory.writing(self.folder, self.hint):
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
            self._write()

    def _write(self) -> None:
        run_directory.replace_text(self.folder / FACTS, json.dumps(self.facts, indent=1) + "\n")


def place_of(output: Path) -> Path:
    """Where the work for `output` lies."""
    return output.with_name(f"{output.name}.converting")


def tidy(output: Path) -> None:
    """Delete what a conversion left that was killed when its output was in place already.

    Raises:
        Failure: another process is at work there.
    """
    folder = place_of(output)
    try:
        facts = json.loads((folder / FACTS).read_bytes())
    except (OSError, ValueError):
        return
    if isinstance(facts, dict) and facts.get(COMPLETE) and not (folder / RESULT).exists():
        with _locked(folder):
            _delete(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make `folder` where it is missing, and keep other processes out of it while open.

    Raises:
        Failure: another one is in there, or nothing can be written.
    """
    lock = folder / LOCK
    with run_directory.writing(folder, HINT):
        folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it may have finished, and deleted the folder, just now.
            mine = os.path.samestat(os.fstat(file.fileno()), lock.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise Failure(
                f"{folder}: another conversion is at work here; wait for it, or choose another --output"
            )
        yield


def _delete(folder: Path) -> None:
    """Delete `folder`, which is out of the way at once for whoever comes next."""
    with suppress(OSError):
        doomed = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
        folder.rename(doomed / folder.name)
        shutil.rmtree(doomed)


def fingerprint(model: Path) -> str:
    """SHA-256 over the sizes and beginnings of a model's files, in hexadecimal: its folder's, or the one that it is."""
    found = hashlib.sha256()
    for path in [model] if model.is_file() else [model / CONFIG, *weight_files(model)]:
        with path.open("rb") as file:
            found.update(f"{path.name} {path.stat().st_size}".encode())
            found.update(file.read(2**20))
    return found.hexdigest()
