"""Distillation after a conversion: trials on tuning text choose its settings, and the best state is kept."""

from __future__ import annotations

import gc
import json
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sparsecli.console import Failure, Progress, Stopped, progress, say
from sparsecli.data.packing import Windows
from sparsecli.evaluate.losses import window_losses
from sparsecli.model.bfloat16 import has_bfloat16
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.files import read_json
from sparsecli.recipe.training import RecoverySpec, Trained
from sparsecli.train.checkpoint import newest_sound, step_of
from sparsecli.train.distillation import DistillationTrainer, Teacher, check_teacher
from sparsecli.train.divergence import divergence
from sparsecli.train.run_directory import CHECKPOINTS, read_metrics, replace_text, writing
from sparsecli.train.trainer import Signals, run_steps, training_arguments

RATES: dict[Trained, tuple[float, ...]] = {
    "all": (1e-5, 3e-5, 1e-4, 3e-4),
    "fitted": (3e-5, 1e-4),
    "norms_and_biases": (3e-4, 1e-3),
}
"""Learning rates of the first trials, by the parameters that train."""
WARMUP, LONG_WARMUP = 0.1, 0.4
"""Share of the steps in which the learning rate rises: by default, and in one more trial of the last round."""
SHARE, LEAST = 96, 2
"""A first trial has one of `SHARE` steps of the distillation, at least `LEAST`: in the first step Adam moves every
weight by the whole rate, which alone does harm. All trials together have three tenths of the steps, at least 56."""
FACTS = "recovery.json"
BEST = "best.safetensors"
Network = ScalingTransformerForCausalLM


@dataclass(frozen=True)
class Settings:
    """What trials choose."""

    learning_rate: float
    trains: Trained
    warmup_fraction: float = WARMUP

    def __str__(self) -> str:
        what = {"all": "all parameters", "fitted": "fitted layers", "norms_and_biases": "norms and biases"}
        return (
            f"{what[self.trains]}, learning rate {self.learning_rate:g}, warm-up {self.warmup_fraction:.0%}"
        )


@dataclass(frozen=True)
class Trial:
    """A short distillation from the start."""

    trains: Trained
    learning_rate: float
    warmup_fraction: float
    steps: int
    kl: float | None
    """KL(dense || model) on tuning text afterwards, nats/token; None if it is not finite."""


@dataclass(frozen=True)
class Recovery:
    """A finished distillation. The state that was kept is the best on tuning text.

    Attributes:
        settings: learning rate and warm-up, and what was trained.
        steps: optimizer steps, without those of trials.
        tokens: training tokens of these steps.
        best_step: step of the state that was kept; 0 is the start.
        kl_before, kl_after: KL(dense || model) on tuning text in nats/token, of the start and of that state.
        loss_before, loss_after: cross-entropy on tuning text in nats/token, computed in float32, of both.
    """

    settings: str
    trials: list[Trial]
    steps: int
    tokens: int
    best_step: int
    kl_before: float
    kl_after: float
    loss_before: float
    loss_after: float

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Recovery:
        """The inverse of `asdict`."""
        return cls(**{**facts, "trials": [Trial(**trial) for trial in facts["trials"]]})

    def __str__(self) -> str:
        if not self.best_step:
            return f"{self.settings}: the start is kept, none of {self.steps} steps was better on tuning text"
        return (
            f"{self.settings}: the state after {self.best_step} of {self.steps} steps is kept, on tuning text KL to "
            f"the dense model {self.kl_before:.4f} -> {self.kl_after:.4f}, loss {self.loss_before:.4f} -> "
            f"{self.loss_after:.4f} nats/token"
        )


def distil(
    student: Network,
    teacher: Network,
    tokenizer: PreTrainedTokenizerFast,
    windows: Windows,
    tuning: Windows,
    spec: RecoverySpec,
    seed: int,
    folder: Path,
    hint: str,
) -> Recovery:
    """Train `student` in place towards `teacher`, and keep the best state on `tuning`, which may be the start.

    Trials, metrics, checkpoints and the best state are written under `folder`; those that exist are used. The final
    weights are the same bit for bit, however often the training is stopped and resumed.

    Args:
        windows: the training text.
        tuning: text that is not trained on. It alone decides on settings, end and state.
        hint: how to resume; the end of the message when the training is stopped or cannot write.
    Raises:
        Failure: the two models do not fit, `folder` cannot be written, or there is too little text.
        Stopped: after SIGTERM or SIGINT; a stopped trial starts again, the distillation has a checkpoint.
    """
    check_teacher(spec, student.config.spec, teacher.config.spec)
    if len(windows) < spec.batch_size:
        raise Failure(
            f"distillation: {len(windows)} training windows of {windows.sequence_length} tokens do not fill a batch "
            f"of {spec.batch_size}; add text or lower batch_size"
        )
    with writing(folder, hint):
        folder.mkdir(parents=True, exist_ok=True)
        work = _Work(student, teacher, tokenizer, windows, tuning, spec, seed, folder, hint)
        return work.run()


# -- loss on tuning text -------------------------------------------------------------------------------------


class TuningLoss:
    """The divergence of models from the teacher on `windows`. The teacher's hidden states are computed once."""

    def __init__(self, teacher: Teacher, windows: Windows, batch_size: int) -> None:
        self.teacher = teacher
        rows = torch.stack([windows[index]["input_ids"] for index in range(len(windows))])
        self.batches = rows.split(batch_size)

    @cached_property
    def hidden(self) -> list[Tensor]:
        """The teacher's final hidden states (B, T, d)."""
        return [self.teacher.hidden(ids) for ids in self.batches]

    @torch.no_grad()
    def __call__(self, student: Network) -> tuple[float, float]:
        """KL(teacher || student) and cross-entropy in nats per predicted token, with choices as in decoding.

        Logits are computed for one window at a time. No random number is drawn.
        """
        was_training = student.training
        student.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for ids, theirs in zip(self.batches, self.hidden, strict=True):
            ids = ids.to(student.device)
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.teacher.bf16):
                ours = student.model(input_ids=ids, use_cache=False).last_hidden_state
                for row, hidden, taught in zip(ids, ours, theirs, strict=True):
                    logits = student.logits(hidden[None, :-1], 0)[0]
                    kl = divergence(logits, self.teacher.logits(taught[None, :-1])[0])
                    sums += torch.tensor([kl.item(), F.cross_entropy(logits.float(), row[1:]).item()])
        student.train(was_training)
        kl, cross_entropy = (sums / sum(map(len, self.batches))).tolist()
        return kl, cross_entropy


# -- what trains ---------------------------------------------------------------------------------------------


def trained_names(student: nn.Module, teacher: nn.Module, trains: Trained) -> list[str]:
    """Names of the student's parameters that train: see `RecoverySpec.trains`. Quantized weights are buffers."""
    theirs = {name: parameter.shape for name, parameter in teacher.named_parameters()}
    names = []
    for name, parameter in student.named_parameters():
        is_fitted = theirs.get(name) != parameter.shape
        if {"all": True, "fitted": is_fitted, "norms_and_biases": parameter.ndim == 1}[trains]:
            names.append(name)
    return names


@contextmanager
def _training_only(model: nn.Module, names: list[str]) -> Iterator[None]:
    """While open, only the named parameters have gradients."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        parameter.grad = None
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None


@torch.no_grad()
def _copy(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Set parameters by name."""
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])


# -- trials and distillation ---------------------------------------------------------------------------------


@dataclass
class _Work:
    """The arguments of `distil`, and what is done so far."""

    student: Network
    dense: Network
    tokenizer: PreTrainedTokenizerFast
    windows: Windows
    tuning: Windows
    spec: RecoverySpec
    seed: int
    folder: Path
    hint: str
    facts: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        path = self.folder / FACTS
        self.facts = read_json(path) if path.exists() else {}
        self.start = {name: weight.detach().clone() for name, weight in self.student.named_parameters()}
        accelerator = torch.accelerator.current_accelerator()
        self.bf16 = has_bfloat16(accelerator.type if accelerator else "cpu")
        self.teacher = Teacher(self.dense, self.bf16)
        self.tuning_loss = TuningLoss(self.teacher, self.tuning, self.spec.batch_size)
        self.steps = self.spec.steps(self.windows.sequence_length)

    def run(self) -> Recovery:
        """Trials, distillation, and the choice of the state."""
        if "result" not in self.facts:
            if "start" not in self.facts:
                self._record("start", [*self.tuning_loss(self.student), self._loss()])
            settings, trials = self._settings()
            self._record("result", asdict(self._train(settings, trials)))
        recovery = Recovery.from_json(self.facts["result"])
        _copy(self.student, load_file(self.folder / BEST) if recovery.best_step else self.start)
        self.student.eval()
        say(f"distillation: {recovery}")
        return recovery

    def _record(self, name: str, value: Any) -> None:
        self.facts = {**self.facts, name: value}
        replace_text(self.folder / FACTS, json.dumps(self.facts, indent=1) + "\n")

    def _loss(self) -> float:
        """Cross-entropy of the student on tuning text in float32, nats/token."""
        self.student.eval()
        return float(window_losses(self.student, self.tuning, "evaluating on tuning text").mean())

    # -- trials ------------------------------------------------------------------------------------------

    def _settings(self) -> tuple[Settings, list[Trial]]:
        """The settings of the distillation, and the trials that led to them."""
        spec = self.spec
        if spec.learning_rate is not None:
            warmup = WARMUP if spec.warmup_fraction is None else spec.warmup_fraction
            return Settings(spec.learning_rate, spec.trains or "all", warmup), []
        steps = max(LEAST, -(-self.steps // SHARE))
        # At most the steps of the distillation.
        left, trials, results = self._candidates(), list[Trial](), list[Trial]()
        while not results or len(left) > 1:
            is_last = len(left) <= 2
            if is_last and spec.warmup_fraction is None:
                left.append(replace(left[0], warmup_fraction=LONG_WARMUP))
            results = [
                self._trial(len(trials) + index, each, min(steps, self.steps))
                for index, each in enumerate(left)
            ]
            trials += results
            order = sorted(range(len(left)), key=lambda index: _finite(results[index].kl))
            left = [left[index] for index in order[: 1 if is_last else -(-len(left) // 2)]]
            steps *= 2
        before, after = self.facts["start"][0], min(_finite(each.kl) for each in results)
        say(
            f"distillation: {left[0]}: the best of {len(trials)} trials; the last brought KL to the dense model on "
            f"tuning text from {before:.4f} to {after:.4f}"
        )
        return left[0], trials

    def _candidates(self) -> list[Settings]:
        """The settings that trials begin with. Of two that train the same parameters, one is enough."""
        known: list[list[str]] = []
        found = []
        for trains, rates in RATES.items():
            names = trained_names(self.student, self.dense, trains)
            if self.spec.trains in (None, trains) and names and names not in known:
                known.append(names)
                warmup = WARMUP if self.spec.warmup_fraction is None else self.spec.warmup_fraction
                found += [Settings(rate, trains, warmup) for rate in rates]
        return found

    def _trial(self, number: int, settings: Settings, steps: int) -> Trial:
        """The trial of this number, as recorded or else run now."""
        recorded = self.facts.get("trials", [])
        if number < len(recorded):
            return Trial(**recorded[number])
        trainer = self._trainer(_TrialTrainer, settings, steps)
        names = trained_names(self.student, self.dense, settings.trains)
        what = f"trial {number + 1}: {settings}"
        with _training_only(self.student, names), trainer.signals, progress(what, steps) as bar:
            trainer.add_callback(_Advances(bar))
            trainer.train()
        received, is_done = (
            trainer.signals.received,
            trainer.state.global_step == steps or trainer.ended_early,
        )
        del trainer
        gc.collect()  # a Trainer and its callbacks refer to one another, and its optimizer is twice the model's size
        if is_done:
            kl = self.tuning_loss(self.student)[0]
            trial = Trial(**asdict(settings), steps=steps, kl=kl if math.isfinite(kl) else None)
            self._record("trials", [*recorded, asdict(trial)])
        if received is not None:
            code = 130 if received == signal.SIGINT else None
            raise Stopped(f"stopped in trial {number + 1} of the distillation; {self.hint}", exit_code=code)
        _copy(self.student, self.start)
        return trial

    # -- distillation ------------------------------------------------------------------------------------

    def _train(self, settings: Settings, trials: list[Trial]) -> Recovery:
        """The distillation. Leaves the student in an unknown state."""
        checkpoint, _ = newest_sound(self.folder / CHECKPOINTS)
        trainer = self._trainer(_RecoveryTrainer, settings, self.steps)
        trainer.best, trainer.patience = self.folder / BEST, self.spec.patience
        trainer.tuning_loss = self.tuning_loss
        step = step_of(checkpoint) if checkpoint else 0
        rows = read_metrics(self.folder, step)
        trainer.kl = {0: self.facts["start"][0]}
        trainer.kl |= {row["step"]: row["tuning_kl"] for row in rows if "tuning_kl" in row}
        if not trainer.is_exhausted:
            names = trained_names(self.student, self.dense, settings.trains)
            with _training_only(self.student, names):
                run_steps(trainer, self.folder, checkpoint, description="distilling", hint=self.hint)
            step = trainer.state.global_step
        kl, _, loss = self.facts["start"]
        best, kl_after, loss_after = trainer.best_step, kl, loss
        if best:
            _copy(self.student, self.start | load_file(self.folder / BEST))
            kl_after, loss_after = trainer.kl[best], self._loss()
        if not loss_after <= loss:
            best, kl_after, loss_after = 0, kl, loss
        tokens = step * self.spec.batch_size * self.windows.sequence_length
        return Recovery(str(settings), trials, step, tokens, best, kl, kl_after, loss, loss_after)

    def _trainer(self, kind: type[Any], settings: Settings, steps: int) -> Any:
        train = self.spec.training(steps, settings.learning_rate, settings.warmup_fraction)
        checkpoints = self.folder / CHECKPOINTS
        return kind(
            self.student,
            training_arguments(train, self.seed, checkpoints, evaluations=kind is _RecoveryTrainer),
            self.tokenizer,
            self.windows,
            self.tuning,
            1.0,
            bf16=self.bf16,
            checkpoints=checkpoints,
            keep=train.save_total_limit,
            signals=Signals(),
            teacher=self.teacher,
            objective=self.spec,
        )


def _finite(kl: float | None) -> float:
    """A divergence to compare: infinite where it is not a finite number."""
    return kl if kl is not None and math.isfinite(kl) else math.inf


class _FiniteTrainer(DistillationTrainer):
    """Ends when the loss is not finite."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Pass on the figures of a step, unless the loss is not finite."""
        if math.isfinite(logs.get("loss", 0.0)):
            super().log(logs, *args, **kwargs)
        else:
            self.ended_early = self.control.should_training_stop = True


class _TrialTrainer(_FiniteTrainer):
    """Keeps nothing: a stopped trial starts again."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        pass


class _RecoveryTrainer(_FiniteTrainer):
    """Keeps the best state on tuning text, and ends when it has not improved for a while.

    Attributes:
        best: the file of that state; written before the first checkpoint that counts it.
        kl: by step.
    """

    best: Path
    patience: int
    tuning_loss: TuningLoss
    kl: dict[int, float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_EvaluatesBeforeStop())

    @property
    def best_step(self) -> int:
        """The step of the least divergence; the earliest of several."""
        return min(self.kl, key=lambda step: (_finite(self.kl[step]), step))

    @property
    def is_exhausted(self) -> bool:
        """Whether the last `patience` evaluations were no better than one before."""
        return sum(step > self.best_step for step in self.kl) >= self.patience

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Figures on tuning text, which are also logged."""
        kl, loss = self.tuning_loss(cast(Network, self.model))
        step = self.state.global_step
        self.kl[step] = kl
        if self.best_step == step:
            weights = {
                name: weight.detach()
                for name, weight in self.model.named_parameters()
                if weight.requires_grad
            }
            beside = self.best.with_name(f"{BEST}.tmp")
            save_file(weights, beside)
            beside.replace(self.best)
        figures = {"tuning_kl": kl, "tuning_loss": loss}
        self.log(dict(figures))
        self.control.should_evaluate = False
        if self.is_exhausted:
            self.ended_early = self.control.should_training_stop = True
        return figures


class _EvaluatesBeforeStop(TrainerCallback):
    """Evaluates at every step that is due, even if a signal has arrived: a resumed run would miss that evaluation."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % state.eval_steps == 0:
            control.should_evaluate = True


class _Advances(TrainerCallback):
    """Shows the progress of a trial."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.advance()
