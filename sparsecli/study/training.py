"""Trains the runs of a study that are missing, and chooses each variant's learning rate by the loss on tuning text."""

from __future__ import annotations

import gc
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sparsecli.console import Failure, Stopped, say
from sparsecli.data.examples import Prepared
from sparsecli.model.files import RECIPE
from sparsecli.spec.vision import VisionSpec
from sparsecli.study.plan import Plan, Run, Variant
from sparsecli.train import run_directory
from sparsecli.train.command import train
from sparsecli.train.journal import Diverged
from sparsecli.train.result import known_result
from sparsecli.train.trainer import Signals, training_arguments

HINT = "the same command continues the study"
WORSE_THAN_CHANCE = 1.0
"""Nats/token above the loss of even guesses, from which a finished run counts as diverged."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: with losses in nats/token or nats/image, or with a reason why it has none."""

    tuning_loss: float | None = None
    held_out_loss: float | None = None
    accuracy: float | None = None
    """Share of held-out images whose likeliest class is theirs; None for text."""
    failure: str | None = None
    """Such as `diverged: the loss is nan at step 10`."""


@dataclass
class Trained:
    """A variant's trials by learning rate, the rate that they chose, and its runs by seed."""

    variant: Variant
    trials: dict[float, Outcome] = field(default_factory=dict)
    learning_rate: float | None = None
    """None if all trials diverged."""
    runs: dict[int, tuple[Run, Outcome]] = field(default_factory=dict)

    def model_of(self, seed: int) -> Path | None:
        """The run of a seed, if it has a model."""
        run, outcome = self.runs.get(seed, (None, None))
        return run.folder if run and outcome and not outcome.failure else None

    @property
    def first_model(self) -> Path | None:
        """The run of the first seed that has a model."""
        return next(filter(None, map(self.model_of, self.runs)), None)


def choose(trials: Mapping[float, Outcome]) -> float | None:
    """The learning rate with the lowest tuning loss; None if every trial diverged."""
    losses = {rate: each.tuning_loss for rate, each in trials.items() if each.tuning_loss is not None}
    return min(losses, key=lambda rate: losses[rate]) if losses else None


class StudyTrainer:
    """Trains variant after variant, teachers first. Runs that a folder already holds are not trained again.

    Args:
        stop_after: seconds from now after which the study stops as at SIGTERM; None: never.
    """

    def __init__(self, plan: Plan, prepared: Prepared, stop_after: float | None = None) -> None:
        self.plan, self.prepared = plan, prepared
        self.deadline = None if stop_after is None else time.monotonic() + stop_after
        self.reached: set[Path] = set()

    def train(self) -> list[Trained]:
        """All variants, in the order of the recipe.

        Raises:
            Failure: a folder holds a run of another recipe, or a run cannot be trained.
            Stopped: a signal; the next call goes on from the checkpoint that it left.
        """
        done: dict[str, Trained] = {}
        for variant in self.plan.teachers_first:
            done[variant.name] = self._variant(variant, done.get(variant.teacher or ""))
        return [done[variant.name] for variant in self.plan.variants]

    def _variant(self, variant: Variant, teacher: Trained | None) -> Trained:
        plan, study, trained = self.plan, self.plan.study, Trained(variant)
        trained.learning_rate = study.learning_rates[0]
        trials: dict[float, Run] = {}
        if plan.trials:
            first = teacher.model_of(study.seeds[0]) if teacher else None
            if teacher and first is None:
                trained.trials = {rate: _untaught(variant) for rate in study.learning_rates}
            else:
                trials = {rate: plan.trial(variant, rate, first) for rate in study.learning_rates}
                trained.trials = {rate: self._outcome(run, keep=False) for rate, run in trials.items()}
            trained.learning_rate = choose(trained.trials)
        if trained.learning_rate is None:
            say(f"{variant.name}: no learning rate of the grid can be used")
            return trained
        for seed in study.seeds:
            source = teacher.model_of(seed) if teacher else None
            run = plan.run(variant, trained.learning_rate, seed, source)
            untaught = teacher is not None and source is None
            trained.runs[seed] = run, _untaught(variant) if untaught else self._outcome(run, keep=True)
        kept = {run.folder for run, _ in trained.runs.values()}
        for run in trials.values():
            if run.folder not in kept:
                shutil.rmtree(run.folder / "model", ignore_errors=True)
        return trained

    def _outcome(self, run: Run, keep: bool) -> Outcome:
        """The outcome of a run, which is trained, or trained further, unless it is finished.

        Args:
            keep: its weights are needed.
        """
        self.reached.add(run.folder)
        found = self._known(run)
        if found and not found.failure and keep and not (run.folder / "model").is_dir():
            shutil.rmtree(run.folder)  # a trial that another grid did not choose
            found = None
        if found is None:
            total = len(self.plan.variants) * self.plan.runs_of_variant
            say(f"run {len(self.reached)} of {total}: {run}")
            self._train(run)
            found = self._known(run)
            assert found
            if found.failure:
                say(f"{run}: {found.failure}")
        shutil.rmtree(run.folder / run_directory.CHECKPOINTS, ignore_errors=True)
        return found

    def _known(self, run: Run) -> Outcome | None:
        """The outcome of a run that is finished or has diverged; None if it is missing or unfinished."""
        facts = run_directory.read_facts(run.folder)
        if not facts:
            return None
        if facts.get("corpus", self.prepared.fingerprint) != self.prepared.fingerprint:
            raise Failure(
                f"{run.folder}: the text or its tokenizer has changed since this study was started; "
                f"choose another --output"
            )
        if reason := facts.get("diverged"):
            self._check_recipe(run)
            return Outcome(failure=f"diverged: {reason}")
        result = known_result(run.folder)
        if result is None or result.steps < run.steps or result.tuning_loss is None:
            return None
        self._check_recipe(run)
        tuning, held_out = result.tuning_loss, result.held_out_loss
        model = run.recipe.model
        assert model
        choices = model.classes if isinstance(model, VisionSpec) else model.vocabulary.size
        limit = math.log(choices) + WORSE_THAN_CHANCE
        if not (math.isfinite(tuning + held_out) and tuning <= limit):
            return Outcome(failure=f"diverged: the loss is {tuning:.4g} at the end")
        return Outcome(tuning, held_out, result.accuracy)

    def _check_recipe(self, run: Run) -> None:
        """Raise Failure if the folder holds a run of another recipe."""
        run_directory.claim(run.folder, run.recipe, resume=True, hint="")

    def _train(self, run: Run) -> None:
        """Train a run from its newest checkpoint, or from the start. A loss that is not finite ends it."""
        assert run.recipe.train
        if run.folder.is_dir() and not (run.folder / RECIPE).exists():
            shutil.rmtree(run.folder)  # a kill before its first file
        checkpoint = run_directory.claim(run.folder, run.recipe, resume=True, hint="")
        if checkpoint:
            say(f"resuming from {checkpoint}")
        checkpoints = run.folder / run_directory.CHECKPOINTS
        arguments = training_arguments(run.recipe.train, run.seed, checkpoints)
        left = None if self.deadline is None else self.deadline - time.monotonic()
        try:
            train(run.recipe, self.prepared, arguments, run.folder, checkpoint, HINT, Signals(left))
        except Diverged as error:
            facts = run_directory.read_facts(run.folder)
            reason = error.message.partition(";")[0]
            run_directory.write_facts(run.folder, {**facts, "diverged": reason})
        except Stopped as stopped:
            raise Stopped(f"{run}: {stopped.message}", exit_code=stopped.exit_code) from None
        gc.collect()  # the Trainer and its model refer to each other


def _untaught(variant: Variant) -> Outcome:
    return Outcome(failure=f"left out, because its teacher {variant.teacher} diverged")
