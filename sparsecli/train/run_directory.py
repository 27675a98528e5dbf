"""The run directory: checks before a run writes there, and its small files."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sparsecli.console import Failure, Stopped, processes, system_reason, warn
from sparsecli.model.files import RECIPE, parse_json, read_json
from sparsecli.model.outputs import check_output, held
from sparsecli.recipe.loader import load
from sparsecli.recipe.messages import found_as
from sparsecli.recipe.schema import Recipe
from sparsecli.spec.base import Spec
from sparsecli.train.checkpoint import newest_sound

FACTS = "run.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
BATCH = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
"""Keys of a recipe whose product, times the number of processes, is the number of examples in a step."""
FREE = {
    *("train.per_device_eval_batch_size", "train.logging_steps", "train.eval_steps", "train.eval_samples"),
    *("train.save_steps", "train.save_total_limit", "train.report_to"),
}
"""Keys of a recipe that do not affect any training step."""


def claim(
    output: Path, recipe: Recipe, *, resume: bool, hint: str, changed: str | None = None
) -> Path | None:
    """Check that a run may write to `output`. Returns the checkpoint to resume from, or None to start at step 0.

    `hint` ends the message about an existing run, `changed` the one about a run of another recipe. Raises `Failure` if
    `output` cannot be written, holds something else, or holds a run that is not to be resumed, was started with
    another recipe, or has no undamaged checkpoint.
    """
    if not output.is_dir() or {path.name for path in output.iterdir()} <= {f"{RECIPE}.tmp"}:  # left by a kill
        check_output(output)
        return None
    stored = output / RECIPE
    if not stored.exists():
        raise Failure(f"{output}: is not empty and holds no run; choose another --output")
    if not resume:
        raise Failure(f"{output}: already holds a run; {hint}")
    _compare(stored, recipe, changed or f"resume with {stored}, or choose another --output")
    check_output(output)
    checkpoint, skipped = newest_sound(output / CHECKPOINTS)
    for line in skipped:
        warn(f"skipped {line}")
    if checkpoint is None and skipped:
        raise Failure(f"{output}: all of its checkpoints are damaged; delete the folder to start again")
    return checkpoint


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Keep other processes from training in `output` while open.

    A folder that is created for this and stays empty is deleted. Raises `Failure` if another process trains there, or
    if the folder cannot be created.
    """
    created = not output.is_dir()
    if created:
        check_output(output)
        with writing(output, "run the same command again"):
            output.mkdir(parents=True, exist_ok=True)
    with held(output) as free:
        if not free:
            raise Failure(
                f"{output}: another process trains in this folder; wait for it, or choose another --output"
            )
        try:
            yield
        finally:
            if created:
                with suppress(OSError):
                    output.rmdir()


def resume_hint(output: Path) -> str:
    """How to resume the run in `output`."""
    return f"resume with: sparsecli train {output / RECIPE} --resume auto"


@contextmanager
def interruptible(output: Path, hint: str) -> Iterator[None]:
    """Turn an interrupt into `Stopped`, whose message ends with `hint` if a run was begun in `output`.

    This is for interrupts before the first step and after the last one; between them the trainer writes a checkpoint.
    """
    try:
        yield
    except KeyboardInterrupt:
        kept = hint if (output / RECIPE).exists() else "nothing was written"
        raise Stopped(f"interrupted; {kept}", exit_code=130) from None


@contextmanager
def writing(place: Path, hint: str) -> Iterator[None]:
    """Turn a failed write (a full disk) of any library into a `Failure`.

    The message names the file, or `place` if the library does not name it, and ends with `hint`.
    """
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        reason = system_reason(error)
        if reason is None:
            raise
        file = getattr(error, "filename", None) or place
        raise Failure(f"{file}: {reason}; fix this, then {hint}") from None


def _compare(stored: Path, recipe: Recipe, hint: str) -> None:
    """Raise `Failure` unless the run at `stored` was started with the same model, data, training and seed.

    Keys that only determine when the run logs, evaluates or saves may change. `max_steps` may increase if no step
    depends on it. The repetition penalty must be the same: it is saved with the model, and generated targets depend on
    it. `hint` ends the message.
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
    differ = [f"{key} ({then} then, {now} now)" for key, (then, now) in found.items() if key not in BATCH]
    if why:
        index = next(index for index, key in enumerate(differ) if key.startswith("train.max_steps "))
        differ[index] += f", which determines {why} of every step"
    if differ:
        raise Failure(f"{stored.parent}: cannot be resumed with another recipe: {', '.join(differ)}; {hint}")
    _compare_batches(stored, earlier, recipe)


def _compare_batches(stored: Path, earlier: Recipe, recipe: Recipe) -> None:
    """Raise `Failure` unless a step has as many examples as before, however processes and batches share them."""
    assert earlier.train
    assert recipe.train
    before = read_facts(stored.parent).get("processes", processes())
    sizes = [
        (train.per_device_train_batch_size, train.gradient_accumulation_steps, count)
        for train, count in ((earlier.train, before), (recipe.train, processes()))
    ]
    then, now = map(math.prod, sizes)
    if then == now:
        return
    each, rest = divmod(then, now // recipe.train.per_device_train_batch_size)
    advice = "" if rest or not each else f" (train.per_device_train_batch_size={each} gives as many)"
    written = [f"{batch} x {steps} x {count} processes" for batch, steps, count in sizes]
    raise Failure(
        f"{stored.parent}: cannot be resumed with another number of examples in a step: {then} then ({written[0]}), "
        f"{now} now ({written[1]}); change {' or '.join(BATCH)}{advice}"
    )


def differences(one: Spec, other: Spec, include: dict[str, Any] | None = None) -> list[tuple[str, str, str]]:
    """The keys in which two blocks of recipes differ, with both values as text.

    If only one has a block, the key is the block's. If the kinds of a block differ, the key is its `kind`.
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
    """Write a temporary file and rename it, so that the file is never incomplete."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(text)
    beside.replace(path)


def environment() -> dict[str, Any]:
    """The software and machine that the figures of a run depend on."""
    packages = ("sparsecli", "torch", "transformers", "accelerate", "tokenizers")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": platform.machine(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def read_facts(output: Path) -> dict[str, Any]:
    """`run.json` of a run; empty if it does not exist. Raises `Failure` if it is damaged."""
    path = output / FACTS
    if not path.exists():
        return {}
    try:
        facts = read_json(path)
    except Failure as failure:
        raise Failure(f"{failure}; delete it to continue without it") from None
    if not isinstance(facts.get("result") or {}, dict) or type(facts.get("processes", 1)) is not int:
        raise Failure(f"{path}: does not hold the facts of a run; delete it to continue without it")
    return facts


def write_facts(output: Path, facts: dict[str, Any]) -> None:
    """Replace `run.json`."""
    replace_text(output / FACTS, json.dumps(facts, indent=2) + "\n")


def read_metrics(output: Path, up_to_step: int | None = None) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` up to `up_to_step`, without an incomplete last row.

    Raises `Failure` if another line is not a row: a step, and numbers by name.
    """
    path = output / METRICS
    rows = []
    *lines, _torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not _is_row(row):
            raise Failure(f"{path}:{number}: is not a row of metrics; delete the line to continue without it")
        if up_to_step is None or row["step"] <= up_to_step:
            rows.append(row)
    return rows


def _is_row(row: dict[str, Any]) -> bool:
    numbers = all(isinstance(value, int | float) for value in row.values())
    return numbers and type(row.get("step")) is int
