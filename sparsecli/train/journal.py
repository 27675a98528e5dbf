"""The journal of a run: metrics in a file, TensorBoard events, a plot of the loss, and a progress bar."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsecli.console import Failure, Progress, say
from sparsecli.train.run_directory import METRICS, read_metrics, replace_text

RECENT = 50
"""Steps whose times tell the time left."""
FIGURES = (
    *(
        "tuning_kl",
        "tuning_loss",
        "held_out_loss",
        "accuracy",
        "bits_per_byte",
        "never_chosen",
        "balance",
        "kl_to_teacher",
    ),
    *("exact_match", "rouge_1", "rouge_2", "rouge_lsum"),
)
"""Names of the figures of an evaluation."""


class Unit(NamedTuple):
    """What a run counts."""

    name: str
    """`tokens` or `images`."""
    inputs: int = 1
    """Numbers of the model's input that are one of them."""


TOKENS = Unit("tokens")


class Diverged(Failure):
    """The training loss is not a finite number."""


class Journal(TrainerCallback):
    """Writes `metrics.jsonl`, TensorBoard events and `loss.png`, and shows the progress.

    A resumed run deletes the rows after its checkpoint, so that every step has one row.
    """

    def __init__(
        self,
        output: Path,
        start_step: int,
        progress: Progress,
        unit: Unit = TOKENS,
        tensorboard: bool = True,
    ) -> None:
        self.output, self.progress, self.unit = output, progress, unit
        self.rows = read_metrics(output, start_step)
        replace_text(output / METRICS, "".join(f"{json.dumps(row)}\n" for row in self.rows))
        self.board = Board(output / "tensorboard", start_step + 1) if tensorboard else None
        self.seconds = self.step_start = 0.0  # spent in training steps, without evaluation and saving
        self.shown: dict[str, float] = {}
        self.tokens_start = self.tokens_logged = self.seconds_logged = 0.0
        self.recent: deque[float] = deque(maxlen=RECENT)  # seconds of steps
        self.evaluation_seconds = 0.0  # of the last evaluation
        self.step_end = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Training speed since this process started; of images their number."""
        return (self.tokens_logged - self.tokens_start) / self.seconds if self.seconds else None

    def held_out_at(self, step: int) -> dict[str, Any] | None:
        """The row of the evaluation at `step`."""
        return next(
            (row for row in reversed(self.rows) if row["step"] == step and "held_out_loss" in row), None
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tokens_start = self.tokens_logged = self._seen(state)
        self.step_end = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step_start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step_end = time.perf_counter()
        self.seconds += self.step_end - self.step_start
        self.recent.append(self.step_end - self.step_start)
        self.progress.advance(1, self._seconds_left(args, state), **self.shown)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.evaluation_seconds = time.perf_counter() - self.step_end

    def _seconds_left(self, args: TrainingArguments, state: TrainerState) -> float:
        """Time until the last step: median of recent steps, and as many evaluations as will be."""
        steps = state.max_steps - state.global_step
        every = state.eval_steps if args.eval_strategy == "steps" else 0
        evaluations = state.max_steps // every - state.global_step // every if every else 0
        return steps * statistics.median(self.recent) + evaluations * self.evaluation_seconds

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        step, tokens = state.global_step, self._seen(state)
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise Diverged(
                    f"the loss is {logs['loss']} at step {step}; lower train.learning_rate or train longer "
                    f"on train.warmup_steps, with another --output"
                )
            speed = (tokens - self.tokens_logged) / max(self.seconds - self.seconds_logged, 1e-9)
            self.tokens_logged, self.seconds_logged = tokens, self.seconds
            row = {
                "loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                f"{self.unit.name}_per_second": round(speed, 1),
            }
            if "load_balancing" in logs:
                row["load_balancing"] = logs["load_balancing"]
            self.shown = {"loss": logs["loss"], f"{self.unit.name}_per_second": round(speed)}
        elif "held_out_loss" in logs or "tuning_loss" in logs:
            row = {name: logs[name] for name in FIGURES if logs.get(name) is not None}
            figures = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in row.items())
            say(f"step {step}: {figures}")
        else:
            return  # the summary at the end of training
        self._write({"step": step, self.unit.name: tokens, **row})

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        draw_loss(self.rows, self.output / "loss.png", self.unit.name.removesuffix("s"))

    def _seen(self, state: TrainerState) -> int:
        """Tokens or images up to now."""
        return int(state.num_input_tokens_seen) // self.unit.inputs

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with (self.output / METRICS).open("a") as file:
            file.write(f"{json.dumps(row)}\n")
        if self.board:
            self.board.write({name: value for name, value in row.items() if name != "step"}, row["step"])


class Board:
    """A file of TensorBoard events, written without a thread, so that a full disk raises an error at the call.

    Args:
        folder: folder of the file; created if missing.
        first_step: TensorBoard ignores events of this step and later ones in the folder's older files.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard finds files by the beginning of their names and reads them in the order of their names.
        self.path = folder / f"events.out.tfevents.{time.time_ns():020d}.{os.getpid()}"
        self._add(file_version="brain.Event:2")
        self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, values: dict[str, float], step: int) -> None:
        """Write a point of each named curve."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=Summary(value=points))

    def _add(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        with self.path.open("ab") as file:
            RecordWriter(file).write(Event(wall_time=time.time(), **fields).SerializeToString())


def draw_loss(rows: Iterable[dict[str, Any]], path: Path, unit: str = "token") -> None:
    """Training and held-out loss over the steps, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    curves = (
        ("loss", "training", "-"),
        ("held_out_loss", "held out", "o-"),
        ("tuning_kl", "tuning text, KL to the dense model", "o-"),
    )
    for key, label, style in curves:
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("optimizer steps")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.set_ylabel(f"loss (nats per {unit})")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    beside = path.with_name(f"{path.name}.tmp")
    figure.savefig(beside, format="png")
    beside.replace(path)
