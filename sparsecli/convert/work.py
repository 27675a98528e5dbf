"""Where a conversion keeps what it has reached until it is done, so that a stopped one goes on from there."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from sparsecli.console import Failure
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.checkpoint import load_network
from sparsecli.model.folder import CONFIG, share, weight_files
from sparsecli.recipe.schema import Recipe
from sparsecli.train import run_directory

FACTS = "conversion.json"
DECISIVE = {"data", "convert", "seed"}


class Work:
    """A folder beside the output, `<output>.converting`, that is deleted when the output is complete."""

    def __init__(self, output: Path, recipe: Recipe, source: str) -> None:
        """Open the folder of an earlier attempt, or make one.

        Raises:
            Failure: what is there was started with another recipe or model, or nothing can be written.
        """
        self.folder = place_of(output)
        self.hint = "convert again, and it goes on from there"
        # Another budget may take what was built for the first: see Conversion._check_budget. Peers change nothing.
        free = {"convert": {"budget", "peers"}}
        decisive = recipe.model_dump(mode="json", include=DECISIVE, exclude=free)
        mine = {"source": source, "recipe": decisive}
        if self.folder.exists():
            try:
                theirs = json.loads((self.folder / FACTS).read_text())
            except (OSError, ValueError):
                theirs = None
            if theirs is None or {key: theirs.get(key) for key in mine} != mine:
                raise Failure(
                    f"{self.folder}: holds the beginning of another conversion; delete it, or choose another --output"
                )
            self.facts: dict[str, Any] = theirs
        else:
            self.facts = mine
            with run_directory.writing(self.folder, self.hint):
                self.folder.mkdir(parents=True)
                self._write()

    def recall(self, name: str) -> Any:
        """What was noted under `name`, None where nothing was."""
        return self.facts.get(name)

    def note(self, name: str, value: Any) -> None:
        """Keep `value`, which JSON can hold."""
        self.facts[name] = value
        with run_directory.writing(self.folder, self.hint):
            self._write()

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
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self) -> None:
        run_directory.replace_text(self.folder / FACTS, json.dumps(self.facts, indent=1) + "\n")


def place_of(output: Path) -> Path:
    """Where the work for `output` lies."""
    return output.with_name(f"{output.name}.converting")


def fingerprint(model: Path) -> str:
    """SHA-256 over the sizes and beginnings of a model's files, in hexadecimal: its folder's, or the one that it is."""
    found = hashlib.sha256()
    for path in [model] if model.is_file() else [model / CONFIG, *weight_files(model)]:
        with path.open("rb") as file:
            found.update(f"{path.name} {path.stat().st_size}".encode())
            found.update(file.read(2**20))
    return found.hexdigest()
