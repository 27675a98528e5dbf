"""The plan of a study: its variants, their sizes, and the recipe and folder of each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsecli.console import print_table
from sparsecli.model.sizes import Sizes, count_parameters
from sparsecli.recipe.commands import check_sizes
from sparsecli.recipe.data import CopyTask, ImagesSpec, TextSpec
from sparsecli.recipe.loader import LoadedRecipe, complete, require
from sparsecli.recipe.schema import Recipe, StudySpec, StudyVariantSpec
from sparsecli.recipe.training import DistillationSpec, TrainSpec
from sparsecli.spec.model import ModelSpec
from sparsecli.spec.vision import AnySpec
from sparsecli.study.estimate import step_seconds
from sparsecli.train import run_directory
from sparsecli.train.distillation import check_teacher

RUNS = "runs"
"""Folder of a study that holds its runs, in one folder for each variant."""


@dataclass(frozen=True)
class Variant:
    """A variant with its architecture."""

    spec: StudyVariantSpec
    model: AnySpec
    sizes: Sizes

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def teacher(self) -> str | None:
        """Name of the variant that teaches this one."""
        return self.spec.distil_from


@dataclass(frozen=True)
class Run:
    """One training run: its recipe, which is complete, and its folder."""

    variant: str
    learning_rate: float
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def steps(self) -> int:
        assert self.recipe.train
        return self.recipe.train.max_steps

    def __str__(self) -> str:
        return f"{self.variant}, learning rate {self.learning_rate:g}, seed {self.seed}, {self.steps:,} steps"


@dataclass(frozen=True)
class Plan:
    """What a study trains. Runs of a student need the folder of their teacher, so they are made one by one."""

    loaded: LoadedRecipe
    output: Path
    variants: Sequence[Variant]

    @property
    def study(self) -> StudySpec:
        assert self.loaded.recipe.study
        return self.loaded.recipe.study

    @property
    def data(self) -> TextSpec | ImagesSpec:
        data = self.loaded.recipe.data
        assert data
        assert not isinstance(data, CopyTask)
        return data

    @property
    def train(self) -> TrainSpec:
        assert self.loaded.recipe.train
        return self.loaded.recipe.train

    @property
    def tokens_per_step(self) -> int:
        windows = self.train.per_device_train_batch_size * self.train.gradient_accumulation_steps
        return windows if isinstance(self.data, ImagesSpec) else windows * self.data.sequence_length

    @property
    def unit(self) -> str:
        """What is counted where this says tokens: `token` or `image`."""
        return "image" if isinstance(self.data, ImagesSpec) else "token"

    @property
    def tokens(self) -> int:
        """Training tokens, or images, of a whole run."""
        return self.train.max_steps * self.tokens_per_step

    @property
    def trial_steps(self) -> int | None:
        """Steps of a trial of a learning rate; None if trials are as long as whole runs, and are the first of these."""
        if self.study.trial_tokens is None or self.study.trial_tokens >= self.tokens:
            return None
        return max(1, round(self.study.trial_tokens / self.tokens_per_step))

    @property
    def trials(self) -> int:
        """Trials of each variant: none if there is nothing to choose."""
        rates = len(self.study.learning_rates)
        return rates if rates > 1 else 0

    @property
    def runs_of_variant(self) -> int:
        """Runs of each variant, trials included."""
        shared = 1 if self.trials and self.trial_steps is None else 0
        return self.trials + len(self.study.seeds) - shared

    @property
    def steps_of_variant(self) -> int:
        """Steps of all these runs."""
        if self.trials and self.trial_steps:
            return self.trials * self.trial_steps + len(self.study.seeds) * self.train.max_steps
        return self.runs_of_variant * self.train.max_steps

    @cached_property
    def teachers_first(self) -> list[Variant]:
        """The variants in the order of the recipe, but each behind its teacher."""
        named = {variant.name: variant for variant in self.variants}
        ordered: dict[str, Variant] = {}

        def add(variant: Variant) -> None:
            if variant.teacher:
                add(named[variant.teacher])
            ordered.setdefault(variant.name, variant)

        for variant in self.variants:
            add(variant)
        return list(ordered.values())

    def trial(self, variant: Variant, learning_rate: float, teacher: Path | None = None) -> Run:
        """The run that tries a learning rate, with the first seed."""
        seed, steps = self.study.seeds[0], self.trial_steps
        if steps is None:
            return self.run(variant, learning_rate, seed, teacher)
        return self._run(variant, learning_rate, seed, steps, "trial", teacher)

    def run(self, variant: Variant, learning_rate: float, seed: int, teacher: Path | None = None) -> Run:
        """A whole run."""
        return self._run(variant, learning_rate, seed, self.train.max_steps, f"seed-{seed}", teacher)

    def _run(
        self, variant: Variant, rate: float, seed: int, steps: int, label: str, teacher: Path | None
    ) -> Run:
        changes: dict[str, Any] = {name: value for name, value in variant.spec.train if value is not None}
        warmup = changes.get("warmup_steps", self.train.warmup_steps)
        changes |= {
            "learning_rate": rate,
            "max_steps": steps,
            "warmup_steps": round(warmup * steps / self.train.max_steps),
            "eval_steps": min(self.train.eval_steps, steps),
        }
        if teacher:
            objective = variant.spec.distillation.model_dump()
            changes["distillation"] = DistillationSpec(**objective, teacher=str(teacher))
        blocks = {
            "model": variant.model,
            "train": TrainSpec(**{**dict(self.train), **changes}),
            "seed": seed,
            **{"output": None, "bench": None, "convert": None, "study": None},
        }
        folder = self.output / RUNS / variant.spec.folder / f"rate-{rate:g}-{label}"
        return Run(variant.name, rate, seed, complete(self.loaded, blocks), folder)


def make_plan(loaded: LoadedRecipe, output: Path) -> Plan:
    """The plan of the recipe's study.

    Raises:
        RecipeError: a block is missing, a variant does not fit the data, or sizes differ by more than allowed.
        Failure: a variant cannot teach another.
    """
    require(loaded, "model", "data", "train", "study")
    recipe = loaded.recipe
    assert recipe.model
    assert recipe.study
    variants = []
    for spec in recipe.study.variants:
        model = spec.model.apply(recipe.model)
        complete(loaded, {"model": model})
        variants.append(Variant(spec, model, count_parameters(model)))
    check_sizes(recipe.study, {variant.name: variant.sizes for variant in variants}, loaded.path)
    models = {variant.name: variant.model for variant in variants}
    for variant in variants:
        if variant.teacher:
            student, teacher = variant.model, models[variant.teacher]
            assert isinstance(student, ModelSpec)
            assert isinstance(teacher, ModelSpec)
            check_teacher(variant.spec.distillation, student, teacher)
    return Plan(loaded, output, variants)


def print_plan(plan: Plan) -> None:
    """Print the variants, their runs, tokens, and the time by a short measurement of each variant's step."""
    steps, seconds = plan.steps_of_variant, {}
    for variant in plan.variants:
        rate = plan.study.learning_rates[0]
        seconds[variant.name] = step_seconds(plan.run(variant, rate, plan.study.seeds[0]).recipe)
    rows = []
    for variant in plan.variants:
        step = seconds[variant.name]
        if step is not None and variant.teacher:
            read = seconds[variant.teacher]
            step = None if read is None else step + read / 3  # a forward pass of the teacher
        seconds[variant.name] = step
        rows.append(
            (
                variant.name,
                f"{variant.sizes.total:,}",
                f"{variant.sizes.active:,}",
                plan.runs_of_variant,
                f"{steps * plan.tokens_per_step:,}",
                None if step is None else f"{step:.3f}",
                None if step is None else _duration(step * steps),
            )
        )
    unit = f"{plan.unit}s"
    columns = ("variant", "parameters", "active", "runs", unit, "s / step", "time")
    print_table(columns, rows, title="dry run: nothing is trained")
    count = len(plan.variants)
    known = [step for step in seconds.values() if step is not None]
    time = "no estimate: a variant needs more memory than there is"
    if len(known) == count:
        time = f"about {_duration(sum(known) * steps)}, without evaluations"
    done = sum(bool(run_directory.read_facts(path.parent).get("result")) for path in _records(plan.output))
    trials = "none: one learning rate"
    if plan.trials:
        length = plan.tokens if plan.trial_steps is None else plan.trial_steps * plan.tokens_per_step
        trials = f"{plan.trials} learning rates a variant, {length:,} {unit} each"
    facts = [
        ("trials", trials),
        ("runs", f"{count * plan.runs_of_variant}, {done} of them finished"),
        (unit, f"{plan.tokens:,} a whole run, {count * steps * plan.tokens_per_step:,} in all"),
        ("time", time),
        ("folder", str(plan.output)),
    ]
    print_table(["study", ""], facts)


def _records(output: Path) -> list[Path]:
    return sorted((output / RUNS).glob(f"*/*/{run_directory.FACTS}"))


def _duration(seconds: float) -> str:
    for limit, unit in ((3600 * 48, "days"), (3600, "h"), (60, "min")):
        if seconds >= limit:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.1f} {unit}"
    return f"{seconds:.0f} s"
