"""Kills commands at random moments and resumes them; fills the disk, closes pipes, and starts two commands at once.

    make crash                              # or: PYTHONPATH=tests python -m robustness.crash --kills 50 --seed 0

A command that was killed with SIGKILL is run again until it ends. The files of its model must then be equal, byte for
byte, to those of a run that was never interrupted. Exit code 1: a promise was broken.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from robustness import processes
from robustness.processes import Command, call, run, start, undesigned, warm, workplace

from sparsecli import console

CACHE = "cache"
MEASURED = ("README.md",)
"""Files beside a model that hold measured times."""


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a model folder, but for those with measured times."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in MEASURED)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# -- what is killed ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A command that can be killed and run again.

    Attributes:
        arguments: for an output folder.
        model: the model folder in an output folder.
        kept: files whose time tells when something was last kept, as globs beside an output folder `*`.
        steps: steps of an output folder that were done and that are kept, where they are counted.
    """

    name: str
    arguments: Callable[[Path], list[object]]
    model: Callable[[Path], Path]
    kept: Callable[[Path], list[Path]]
    steps: Callable[[Path], tuple[int, int]] | None = None


def train_task(folder: Path) -> Task:
    """Training of a tiny sparse model: 60 steps, a checkpoint every 5."""
    from small_runs import write_recipe

    (folder / "train").mkdir()
    recipe = write_recipe(folder / "train")
    changes = ["train.max_steps=60", "train.save_steps=5", "train.eval_steps=20"]

    def steps(output: Path) -> tuple[int, int]:
        rows = (output / "metrics.jsonl").read_bytes().split(b"\n")[:-1] if output.exists() else []
        kept = [int(path.parent.name.rpartition("-")[2]) for path in manifests(output)]
        return max((json.loads(row)["step"] for row in rows), default=0), max(kept, default=0)

    return Task(
        "train",
        lambda output: ["train", recipe, *changes, "--output", output, "--resume", "auto"],
        lambda output: output / "model",
        manifests,
        steps,
    )


def manifests(output: Path) -> list[Path]:
    """The manifests of a run's checkpoints."""
    return [*output.glob("checkpoints/checkpoint-*/manifest.json")]


def convert_tasks(folder: Path) -> list[Task]:
    """Conversions of a small dense model: to given layers with distillation, and within a budget of loss."""
    from small_conversions import trained

    (folder / "convert").mkdir()
    call(lambda: trained(folder / "convert"), folder / "log")
    changes = {
        "convert": ["convert.distillation.tokens=4096", "convert.controller_steps=40"],
        "convert within a budget": ["convert.feed_forward=null", "convert.budget=perplexity +5 %"],
    }

    def kept(output: Path) -> list[Path]:
        work = output.with_name(f"{output.name}.converting")
        return [*work.glob("conversion.json"), *work.glob("distillation/recovery.json"),
                *work.glob("distillation/**/manifest.json")]  # fmt: skip

    def task(name: str) -> Task:
        recipe, dense = folder / "convert" / "sums.yaml", folder / "convert" / "dense"
        return Task(
            name,
            lambda output: ["sparsify-convert", recipe, *changes[name], "--model", dense, "--output", output],
            lambda output: output / "model",
            kept,
        )

    return [task(name) for name in changes]


def import_task(folder: Path) -> Task:
    """The import of a Hugging Face folder."""
    from foreign_models import LLAMA, build, save

    shape = LLAMA | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    call(lambda: save(build("llama", **shape), folder / "llama"), folder / "log")
    return Task(
        "import",
        lambda output: ["import", folder / "llama", "--output", output],
        lambda output: output,
        lambda output: [],
    )


# -- kills ---------------------------------------------------------------------------------------------------


@dataclass
class Kills:
    """What kills of a task came to."""

    runs: int = 0
    kills: int = 0
    lost_seconds: list[float] = field(default_factory=list)
    lost_steps: list[int] = field(default_factory=list)
    leftovers: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)


def kill_often(tasks: Sequence[Task], folder: Path, kills: int, minutes: float, draw: random.Random) -> Kills:
    """Kill commands `kills` times, each in turn, at moments that are uniform over an uninterrupted run's time.

    After `minutes` no further run begins.
    """
    found = Kills()
    for number, task in enumerate(tasks):
        place = folder / f"{task.name.replace(' ', '-')}-runs"
        place.mkdir()
        begun = time.monotonic()
        run(task.arguments(place / "whole"), folder / "log")
        seconds = time.monotonic() - begun
        expected = hashes(task.model(place / "whole"))
        share = kills // len(tasks) + (number < kills % len(tasks))
        left, end = share, begun + 60 * minutes / len(tasks)
        while left and time.monotonic() < end:
            output = place / f"run-{found.runs}"
            left = kill_and_resume(task, output, expected, seconds, left, found, draw)
            found.runs += 1
            if len(found.faults) > 3:
                return found
            shutil.rmtree(output, ignore_errors=True)
            found.leftovers |= {path.name for path in (place / CACHE).glob("*.tmp")}
            shutil.rmtree(place / CACHE, ignore_errors=True)  # so that each run also fills it
        found.leftovers |= {path.name for path in place.iterdir()} - {"whole", "log"}
    return found


def kill_and_resume(
    task: Task,
    output: Path,
    expected: dict[str, str],
    seconds: float,
    kills: int,
    found: Kills,
    draw: random.Random,
) -> int:
    """Run one task to its end, with kills on its way. Returns how many of the `kills` are left."""
    while True:
        begun = time.time()
        cache = {"SPARSECLI_CACHE": str(output.parent / CACHE)}
        command = start(task.arguments(output), output.parent / "log", environment=cache)
        if kills and command.wait(draw.uniform(0, seconds)) is None:
            command.kill()
            kills -= 1
            found.kills += 1
            note_losses(task, output, begun, found)
            model = task.model(output)
            if model.exists() and hashes(model) != expected:
                found.faults.append(f"{task.name}: a kill left a model folder that is not the whole one")
                return kills
            if output.exists() and task.model(output) == output:
                return kills  # nothing to resume: it was killed behind its last step
            continue
        if command.wait() is None:
            command.kill()
            found.faults.append(f"{task.name}: hung: {command.text[-300:]}")
        elif command.code != 0 and "already holds a run" not in command.text:
            found.faults.append(f"{task.name}: exit code {command.code} when resumed: {command.text[-300:]}")
        elif hashes(task.model(output)) != expected:
            ours = hashes(task.model(output))
            names = [name for name in ours | expected if ours.get(name) != expected.get(name)]
            found.faults.append(f"{task.name}: {', '.join(names)} differ from those of the uninterrupted run")
        return kills


def note_losses(task: Task, output: Path, begun: float, found: Kills) -> None:
    """Note what a kill lost: seconds since something was kept, and steps that are done again."""
    kept = [path.stat().st_mtime for path in task.kept(output)]
    found.lost_seconds.append(time.time() - max([begun, *kept]))
    if task.steps:
        done, saved = task.steps(output)
        found.lost_steps.append(max(0, done - saved))


def report_kills(name: str, found: Kills) -> list[object]:
    """A row of the table."""
    seconds = sorted(found.lost_seconds) or [0.0]
    steps = f"{sum(found.lost_steps)} (at most {max(found.lost_steps)})" if found.lost_steps else None
    return [
        name,
        found.kills,
        found.runs,
        "no: " + found.faults[0] if found.faults else "yes",
        f"{seconds[len(seconds) // 2]:.2f} (at most {seconds[-1]:.2f})",
        steps,
        len(found.leftovers),
    ]


# -- full disks, closed pipes, two at once ---------------------------------------------------------------------


def writing_commands(folder: Path, tasks: dict[str, Task]) -> dict[str, Callable[[Path], list[object]]]:
    """Commands that write a folder or file, by name."""
    dense = folder / "convert" / "dense"
    return {
        "train": tasks["train"].arguments,
        "sparsify-convert": tasks["convert within a budget"].arguments,
        "import": tasks["import"].arguments,
        "pack": lambda output: ["pack", dense, "--output", output],
        "export": lambda output: ["export", folder / "imported", "--output", output],
        "export gguf": lambda output: ["export", folder / "imported", "--format", "gguf", "--output",
                                       output.with_suffix(".gguf")],
        "bench --output": lambda output: ["bench", "--model", dense, "--rounds", 1, "--tokens", 2, "--context", 4,
                                          "--threads", 1, "--output", output],
        "recipes cp": lambda output: ["recipes", "cp", "quickstart", output],
    }  # fmt: skip


def fill_disk(folder: Path, commands: dict[str, Callable[[Path], list[object]]]) -> list[list[object]]:
    """Run each command where no file may be longer than a limit, then again without: a row for each."""
    rows = []
    place = folder / "full"
    place.mkdir()
    for name, arguments in commands.items():
        why: str | None = None
        failed = 0
        for limit in (0, 1000, 6000):
            output = place / f"{name.replace(' ', '')}-{limit}"
            cache = {"SPARSECLI_CACHE": str(folder / f"cache-{limit}")}
            command = start(arguments(output), folder / "full.log", largest_file=limit, environment=cache)
            command.wait()
            failed += command.code != 0
            why = why or undesigned(command)
            again = start(arguments(output), folder / "log")
            if again.wait() != 0 and command.code != 0:
                why = why or f"does not run again: {again.text[-300:]}"
        rows.append(["full disk", name, f"refused {failed} of 3", why or "in one line, then runs again"])
    return rows


def close_pipes(folder: Path) -> list[list[object]]:
    """`sparsecli ... | head -1` and a pipe that is closed before anything is written, for commands that print."""
    dense = str(folder / "convert" / "dense")
    commands = {
        "recipes ls": ["recipes", "ls"],
        "recipes show": ["recipes", "show", "quickstart"],
        "recipes schema": ["recipes", "schema"],
        "recipes check": ["recipes", "check", "quickstart"],
        "generate": ["generate", "--model", dense, "--prompt", "1 plus", "--max-new-tokens", "24"],
        "generate --json": ["generate", "--model", dense, "--prompt", "1", "--max-new-tokens", "4", "--json"],
        "evaluate": ["evaluate", "--model", dense, "--tokens", "256"],
        "bench": [
            "bench",
            "--model",
            dense,
            "--rounds",
            "1",
            "--tokens",
            "2",
            "--context",
            "4",
            "--threads",
            "1",
        ],
        "train --dry-run": ["train", "quickstart", "--dry-run", "--output", str(folder / "none")],
        "doctor": ["doctor"],
        "--help": ["--help"],
        "--version": ["--version"],
    }
    rows: list[list[object]] = []
    for name, arguments in commands.items():
        why, codes = None, []
        for reads_line in (True, False):
            command, code = closed_pipe(arguments, folder / "log", reads_line)
            codes.append(code)
            why = (
                why
                or undesigned(command, (0, 1))
                or (command.text.count("error: ") > 1 and "more than one line of an error")
                or None
            )
        rows.append(["closed pipe", name, f"exit codes {codes[0]}, {codes[1]}", why or "quiet"])
    return rows


def closed_pipe(arguments: Sequence[object], log: Path, reads_line: bool) -> tuple[Command, int | None]:
    """A command whose reader ends after a line, or at once. stderr is in the log."""
    reader, writer = os.pipe()

    def work() -> None:
        from sparsecli.cli import main

        os.dup2(writer, 1)
        os.close(reader)
        sys.argv = ["sparsecli", *map(str, arguments)]
        main()

    command = processes.fork(work, log)
    os.close(writer)
    if reads_line:
        with open(reader, "rb") as stream:
            stream.readline()
    else:
        os.close(reader)
    code = command.wait()
    if code is None:
        command.kill()
    return command, code


def run_two(folder: Path, commands: dict[str, Callable[[Path], list[object]]]) -> list[list[object]]:
    """Two processes with one output: a row for each command."""
    place = folder / "two"
    place.mkdir()
    rows: list[list[object]] = []
    for name, arguments in commands.items():
        alone, both = place / f"{name.replace(' ', '')}-alone", place / f"{name.replace(' ', '')}"
        run(arguments(alone), folder / "log")
        two = [start(arguments(both), folder / f"two-{number}.log") for number in range(2)]
        for command in two:
            command.wait()
        why = next(filter(None, map(undesigned, two)), None)
        codes = sorted(command.code if command.code is not None else -9 for command in two)
        if not why and codes[0] != 0:
            why = "neither has finished: " + two[0].text[-300:]
        if not why and alone.is_dir() and content(alone) != content(both):
            why = "the result differs from that of one process alone"
        rows.append(["two at once", name, f"exit codes {codes[0]}, {codes[1]}", why or "one result, whole"])
    return rows


def content(output: Path) -> dict[str, str]:
    """Hashes of what a command has written."""
    return hashes(output / "model" if (output / "model").is_dir() else output)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=50, help="kills of training, of conversion and of import"
    )
    parser.add_argument(
        "--minutes", type=float, default=600, help="the longest that each of the three is killed"
    )
    parser.add_argument("--only", choices=("train", "convert", "import", "disk", "pipes", "two"), nargs="*")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    only = given.only or ["train", "convert", "import", "disk", "pipes", "two"]
    warm()
    draw = random.Random(given.seed)
    begun = time.monotonic()
    with workplace() as folder:
        groups: dict[str, list[Task]] = {}
        if {"train", "disk", "two"} & {*only}:
            groups["train"] = [train_task(folder)]
        if {"convert", "disk", "two", "pipes"} & {*only}:
            groups["convert"] = convert_tasks(folder)
        if {"import", "disk", "two"} & {*only}:
            groups["import"] = [import_task(folder)]
        killed = {
            name: kill_often(tasks, folder, given.kills, given.minutes, draw)
            for name, tasks in groups.items()
            if name in only
        }
        rows: list[list[object]] = []
        if {"disk", "two"} & {*only}:
            tasks = {task.name: task for group in groups.values() for task in group}
            run(tasks["import"].arguments(folder / "imported"), folder / "log")
            commands = writing_commands(folder, tasks)
            rows += fill_disk(folder, commands) if "disk" in only else []
            both = {
                name: commands[name] for name in ("train", "sparsify-convert", "import", "pack", "export")
            }
            rows += run_two(folder, both) if "two" in only else []
        rows += close_pipes(folder) if "pipes" in only else []
    if killed:
        columns = [
            "command",
            "kills",
            "runs",
            "files equal",
            "seconds lost",
            "steps done again",
            "left behind",
        ]
        table = [report_kills(name, found) for name, found in killed.items()]
        console.print_table(columns, table, f"SIGKILL, seed {given.seed}")
    if rows:
        console.print_table(["trouble", "command", "ends", "so"], rows)
    faults = [fault for found in killed.values() for fault in found.faults]
    good = ("in one line, then runs again", "quiet", "one result, whole")
    faults += [f"{row[0]}, {row[1]}: {row[3]}" for row in rows if row[3] not in good]
    for fault in faults:
        console.say(fault)
    console.say(f"{len(faults)} faults, {time.monotonic() - begun:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
