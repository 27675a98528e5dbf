"""Resuming: the work folder keeps the finished steps of a conversion until it is complete; signals stop it cleanly."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sparsecli.console import Failure, Stopped
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.files import CONFIG, read_json, weight_files
from sparsecli.model.loading import load_network
from sparsecli.model.outputs import held, share
from sparsecli.recipe.schema import Recipe
from sparsecli.train import run_directory

FACTS = "conversion.json"
RESULT = "result"
"""Folder in which the output is written."""
COMPLETE = "complete"
"""Recorded when the result only has to be moved into place."""
DECISIVE = {"data", "convert", "seed"}
HINT = "run the same command again to resume"


@contextmanager
def open_work_folder(output: Path, recipe: Recipe, source: str) -> Iterator[WorkFolder]:
    """The work folder of an earlier attempt at `output`, or a new one. No other process can open it while it is open.

    It stays for the next attempt if a step in it is finished.

    Args:
        source: see `fingerprint`.
    Raises:
        Failure: another process uses it, it belongs to another recipe or model, or it cannot be written.
    """
    folder = work_path(output)
    with _locked(folder):
        work = WorkFolder(folder, recipe, source)
        try:
            yield work
        finally:
            if not work.finished:
                _delete(folder)


class WorkFolder:
    """The folder `<output>.converting`: finished steps as facts in JSON, and models."""

    def __init__(self, folder: Path, recipe: Recipe, source: str) -> None:
        self.folder, self.hint = folder, HINT
        # Another budget can use the fits of the first: see Conversion._check_budget. Peers change no fit.
        ignored = {"convert": {"budget", "peers"}}
        decisive = recipe.model_dump(mode="json", include=DECISIVE, exclude=ignored)
        self.identity = {"source": source, "recipe": decisive}
        self.facts: dict[str, Any] = self._earlier() or self.identity
        if not self.finished:
            self._clear()

    @property
    def finished(self) -> bool:
        """Whether any step is."""
        return self.facts.keys() > self.identity.keys()

    def recall(self, name: str) -> Any:
        """The value recorded under `name`; None if there is none."""
        return self.facts.get(name)

    def record(self, name: str, value: Any) -> None:
        """Keep `value`, JSON data, under `name`."""
        self.facts = {**self.facts, name: value}
        with run_directory.writing(self.folder, self.hint):
            self._write()

    def compute_once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The value recorded under `name`; if there is none, the result of `compute`, which is recorded."""
        if name not in self.facts:
            self.record(name, compute())
        return self.facts[name]

    def keep_model(self, name: str, model: ScalingTransformerForCausalLM) -> Path:
        """Write a model as a folder, which is complete or absent."""
        target = self.folder / name
        temporary = self.folder / f"{name}.tmp"
        with run_directory.writing(target, self.hint):
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)
            model.save_pretrained(temporary)
            share(temporary)
            temporary.rename(target)
        return target

    def keep_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Write a file of tensors in the folder, which is complete or absent."""
        temporary = path.with_name(f"{path.name}.tmp")
        with run_directory.writing(path, self.hint):
            path.parent.mkdir(exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
            temporary.rename(path)

    def load_model(self, name: str) -> ScalingTransformerForCausalLM | None:
        """The model kept under `name`; None if there is none."""
        path = self.folder / name
        return load_network(path) if (path / CONFIG).is_file() else None

    def close(self) -> None:
        """Forget all steps: the conversion is complete."""
        self.facts = self.identity

    def _earlier(self) -> dict[str, Any] | None:
        """The facts of an earlier attempt; None if it finished no step.

        Raises:
            Failure: the folder belongs to another conversion, or to something else.
        """
        if {path.name for path in self.folder.iterdir()} <= {f"{FACTS}.tmp"}:
            return None
        try:
            earlier = read_json(self.folder / FACTS)
        except Failure:
            earlier = {}
        earlier = earlier if isinstance(earlier, dict) else {}
        if earlier.keys() == self.identity.keys():
            return None
        if {key: earlier.get(key) for key in self.identity} != self.identity:
            raise Failure(
                f"{self.folder}: holds an unfinished conversion of another recipe or model; delete it, or choose "
                f"another --output"
            )
        return earlier

    def _clear(self) -> None:
        """Start over."""
        with run_directory.writing(self.folder, self.hint):
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            self._write()

    def _write(self) -> None:
        run_directory.replace_text(self.folder / FACTS, json.dumps(self.facts, indent=1) + "\n")


def work_path(output: Path) -> Path:
    """The work folder of `output`."""
    return output.with_name(f"{output.name}.converting")


def delete_leftover(output: Path) -> None:
    """Delete the work folder of a conversion that was killed after its output was in place.

    Raises:
        Failure: another process uses it.
    """
    folder = work_path(output)
    try:
        facts = json.loads((folder / FACTS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(facts, dict) and facts.get(COMPLETE) and not (folder / RESULT).exists():
        with _locked(folder):
            _delete(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create `folder` if it is missing, and keep other processes out of it while open.

    Raises:
        Failure: another process uses it, or it cannot be written.
    """
    with run_directory.writing(folder, HINT):
        folder.mkdir(parents=True, exist_ok=True)
    with held(folder) as free:
        if not free:
            raise Failure(
                f"{folder}: another conversion uses this folder; wait for it, or choose another --output"
            )
        yield


def _delete(folder: Path) -> None:
    """Delete `folder`; it is renamed first, so that the path is free at once."""
    with suppress(OSError):
        doomed = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
        folder.rename(doomed / folder.name)
        shutil.rmtree(doomed)


def fingerprint(model: Path) -> str:
    """SHA-256 in hexadecimal over the sizes and beginnings of a model's files: a folder's, or a single file."""
    found = hashlib.sha256()
    for path in [model] if model.is_file() else [model / CONFIG, *weight_files(model)]:
        with path.open("rb") as file:
            found.update(f"{path.name} {path.stat().st_size}".encode())
            found.update(file.read(2**20))
    return found.hexdigest()


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into `Stopped` while open, at once.

    Inside they are a KeyboardInterrupt, which no handler of errors catches.
    """
    received = [signal.SIGINT]

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        code = 130 if received[-1] == signal.SIGINT else None
        raise Stopped("stopped; run the same command again to resume", exit_code=code) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
