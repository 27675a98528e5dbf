"""The run directory: who may write there, and the small files it holds."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sparsecli.console import Failure, warn
from sparsecli.data.cache import why_unwritten
from sparsecli.model.files import RECIPE, read_json
from sparsecli.recipe.loader import load
from sparsecli.recipe.messages import found_as
from sparsecli.recipe.schema import Recipe
from sparsecli.spec.base import Spec
from sparsecli.train.checkpoint import newest_sound

FACTS = "run.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
FREE = {
    *("train.per_device_eval_batch_size", "train.logging_steps", "train.eval_steps", "train.eval_samples"),
    *("train.save_steps", "train.save_total_limit"),
}
"""Keys of a recipe that change no step of the training."""


def claim(output: Path, recipe: Recipe, *, resume: bool, hint: str) -> Path | None:
    """Make sure that a run may go to `output`; the checkpoint to resume from, or None to start at step 0.

    `hint` says what to do about a run that is there already. Raises `Failure` when `output` cannot be written,
    holds something else, or holds a run that is not to be resumed, was started with another recipe, or has no
    whole checkpoint left.
    """
    if not output.is_dir() or not any(output.iterdir()):
        _probe(output)
        return None
    stored = output / RECIPE
    if not stored.exists():
        raise Failure(f"{output}: is not empty and holds no run; choose another --output")
    if not resume:
        raise Failure(f"{output}: already holds a run; {hint}")
    _compare(stored, recipe)
    _probe(output)
    checkpoint, skipped = newest_sound(output / CHECKPOINTS)
    for line in skipped:
        warn(f"skipped {line}")
    if checkpoint is None and skipped:
        raise Failure(f"{output}: none of its checkpoints is whole; delete the folder to start again")
    return checkpoint


def resume_hint(output: Path) -> str:
    """How to resume the run in `output`."""
    return f"resume with: sparsecli train {output / RECIPE} --resume auto"


@contextmanager
def writing(place: Path, hint: str) -> Iterator[None]:
    """Turn a write that fails (a full disk) into a `Failure`, in whichever library it fails.

    The message names the file, or `place` where the library does not, and says what `hint` says to do then.
    """
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        reason = why_unwritten(error)
        if reason is None:
            raise
        file = getattr(error, "filename", None) or place
        raise Failure(f"{file}: {reason}; once that is mended, {hint}") from None


def _probe(output: Path) -> None:
    """Raise `Failure` unless a file can be written where `output` is or will be."""
    place = output.absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise Failure(f"{output}: cannot be written: {place}: {error.strerror}") from None


def _compare(stored: Path, recipe: Recipe) -> None:
    """Raise `Failure` unless the run at `stored` was started with the same model, data, training and seed.

    What only decides when something is logged, evaluated or saved may change, and there may be more steps where none
    depends on how many there are. The penalty for repetitions counts, too: it is saved with the model, and what
    evaluations write depends on it.
    """
    decisive = {
        "model": True,
        "data": True,
        "train": True,
        "seed": True,
        "generate": {"repetition_penalty": True},
    }
    earlier = load(str(stored)).recipe
    found = {
        key: values for key, *values in differences(earlier, recipe, include=decisive) if key not in FREE
    }
    why = ""
    if "train.max_steps" in found and earlier.train and recipe.train:
        longer = recipe.train.max_steps > earlier.train.max_steps
        why = recipe.train.bound_to_max_steps or ""
        if longer and not why:
            del found["train.max_steps"]
    differ = [f"{key} ({then} then, {now} now)" for key, (then, now) in found.items()]
    if why:
        differ[list(found).index("train.max_steps")] += f", on which {why} of all steps depends"
    if differ:
        raise Failure(
            f"{stored.parent}: cannot be resumed with another recipe: {', '.join(differ)}; "
            f"resume with {stored}, or choose another --output"
        )


def differences(one: Spec, other: Spec, include: dict[str, Any] | None = None) -> list[tuple[str, str, str]]:
    """The keys in which two blocks of recipes differ, and both values in plain words.

    Of a block that is there once, or is of two kinds, it is the block's own key or its kind.
    """

    def compare(path: str, left: Any, right: Any) -> Iterator[tuple[str, str, str]]:
        if not isinstance(left, dict) or not isinstance(right, dict):
            if left != right:
                yield path, _written(left), _written(right)
            return
        kinds = [{"kind": block.get("kind")} for block in (left, right)]
        for name in (left | right) if kinds[0] == kinds[1] else kinds[0]:
            yield from compare(f"{path}.{name}".lstrip("."), left.get(name), right.get(name))

    return list(compare("", one.model_dump(include=include), other.model_dump(include=include)))


def _written(value: Any) -> str:
    if isinstance(value, list) and value:
        return f"[{', '.join(map(_written, value))}]"
    return value if isinstance(value, str) else found_as(value)


def replace_text(path: Path, text: str) -> None:
    """Write a file beside and rename it, so that it is never half-written."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(text)
    beside.replace(path)


def environment() -> dict[str, Any]:
    """What the figures of a run depend on besides its recipe."""
    packages = ("sparsecli", "torch", "transformers", "accelerate", "tokenizers")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": platform.machine(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def read_facts(output: Path) -> dict[str, Any]:
    """`run.json` of a run, empty where there is none. Raises `Failure` for one that is damaged."""
    path = output / FACTS
    if not path.exists():
        return {}
    try:
        facts = read_json(path)
    except Failure as failure:
        raise Failure(f"{failure}; delete it to go on without it") from None
    if not isinstance(facts.get("result") or {}, dict):
        raise Failure(f"{path}: is not what a run writes there; delete it to go on without it")
    return facts


def write_facts(output: Path, facts: dict[str, Any]) -> None:
    """Replace `run.json`."""
    replace_text(output / FACTS, json.dumps(facts, indent=2) + "\n")


def read_metrics(output: Path, up_to_step: int | None = None) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl`, those after `up_to_step` and a torn last one left out.

    Raises `Failure` when another line is no row: a step, and numbers by their names.
    """
    path = output / METRICS
    rows = []
    *lines, _torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not _is_row(row):
            raise Failure(f"{path}:{number}: is no row of metrics; delete the line to go on without it")
        if up_to_step is None or row["step"] <= up_to_step:
            rows.append(row)
    return rows


def _is_row(row: dict[str, Any]) -> bool:
    numbers = all(isinstance(value, int | float) for value in row.values())
    return numbers and type(row.get("step")) is int
