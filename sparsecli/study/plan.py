"""The plan of a study: its variants, their sizes, and the recipe and folder of each run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsecli.console import Failure, print_table
from sparsecli.decode.native import binding
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
FURTHER = 4
"""A variant that starts from another is trained on a whole run's tokens divided by this, unless it says otherwise."""
NONE: Mapping[str, Path | None] = {}


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
    def trains(self) -> bool:
        """Whether it has training runs of its own."""
        return self.spec.quantize is None

    @property
    def label(self) -> str:
        """What is done to the model that it starts from, as part of a folder's name; empty for nothing."""
        prune, quantize = self.spec.prune, self.spec.quantize
        if quantize:
            return f"{quantize.bits}-bits-{quantize.rounding}"
        named = [(name, share) for name, share in prune or () if share]
        return "-".join(f"{name}-{share.strip(' %')}" for name, share in named)


Models = Mapping[str, Path | None]
"""The models of one seed that a run needs, by the field of the variant that names them: `init_from`, `distil_from`."""


@dataclass(frozen=True)
class Run:
    """One training run: its recipe, which is complete, and its folder."""

    variant: str
    learning_rate: float
    seed: int
    recipe: Recipe
    folder: Path
    source: Path | None = None
    """The run of the variant that this one starts from."""

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

    def learning_rates(self, variant: Variant) -> list[float]:
        """The grid of a variant."""
        return variant.spec.learning_rates or self.study.learning_rates

    def steps(self, variant: Variant) -> int:
        """Steps of one of its runs."""
        if not variant.trains:
            return 0
        if variant.spec.init_from is None:
            return self.train.max_steps
        tokens = variant.spec.tokens or self.tokens // FURTHER
        return max(1, round(tokens / self.tokens_per_step))

    def tokens_before(self, variant: Variant) -> int:
        """Training tokens of the model that a run of it starts from."""
        named = {each.name: each for each in self.variants}
        earlier = self.study.chain(variant.spec)[:-1]
        return sum(self.steps(named[each.name]) for each in earlier) * self.tokens_per_step

    def trial_steps(self, variant: Variant) -> int | None:
        """Steps of a trial of a learning rate; None if trials are as long as whole runs, and are the first of these."""
        whole = self.steps(variant) * self.tokens_per_step
        if self.study.trial_tokens is None or self.study.trial_tokens >= whole:
            return None
        return max(1, round(self.study.trial_tokens / self.tokens_per_step))

    def trials(self, variant: Variant) -> int:
        """Trials of a variant: none if there is nothing to choose."""
        rates = len(self.learning_rates(variant))
        return rates if rates > 1 and variant.trains else 0

    def runs_of(self, variant: Variant) -> int:
        """Runs of a variant, trials included."""
        trials = self.trials(variant)
        return trials + len(self.study.seeds) - (1 if trials and self.trial_steps(variant) is None else 0)

    def steps_of(self, variant: Variant) -> int:
        """Steps of all these runs."""
        trials, short = self.trials(variant), self.trial_steps(variant)
        if trials and short:
            return trials * short + len(self.study.seeds) * self.steps(variant)
        return self.runs_of(variant) * self.steps(variant)

    def ended(self, variant: Variant) -> list[int]:
        """Steps of each of its runs that is finished or has diverged."""
        whole, folder = self.steps(variant), self.output / RUNS / variant.spec.folder
        labels = {"trial": self.trial_steps(variant) or whole}
        labels |= {f"seed-{seed}": whole for seed in self.study.seeds}
        planned = {
            f"rate-{rate:g}-{label}": steps
            for rate in self.learning_rates(variant)
            for label, steps in labels.items()
        }
        found = []
        for path in sorted(folder.glob(f"*/{run_directory.FACTS}")):
            facts = run_directory.read_facts(path.parent)
            if (path.parent.name in planned or not variant.trains) and {"result", "diverged"} & facts.keys():
                found.append(planned.get(path.parent.name, 0))
        return found

    @property
    def runs(self) -> int:
        """Runs of all variants."""
        return sum(map(self.runs_of, self.variants))

    @cached_property
    def sources_first(self) -> list[Variant]:
        """The variants in the order of the recipe, but each behind its teacher and the one that it starts from."""
        named = {variant.name: variant for variant in self.variants}
        ordered: dict[str, Variant] = {}

        def add(variant: Variant) -> None:
            for name in variant.spec.sources.values():
                add(named[name])
            ordered.setdefault(variant.name, variant)

        for variant in self.variants:
            add(variant)
        return list(ordered.values())

    def trial(self, variant: Variant, learning_rate: float, models: Models = NONE) -> Run:
        """The run that tries a learning rate, with the first seed."""
        seed, steps = self.study.seeds[0], self.trial_steps(variant)
        if steps is None:
            return self.run(variant, learning_rate, seed, models)
        return self._run(variant, learning_rate, seed, steps, "trial", models)

    def run(self, variant: Variant, learning_rate: float, seed: int, models: Models = NONE) -> Run:
        """A whole run."""
        return self._run(variant, learning_rate, seed, self.steps(variant), f"seed-{seed}", models)

    def quantized(self, variant: Variant, learning_rate: float, seed: int, source: Path | None) -> Run:
        """The run of a variant that is not trained: the recipe is that of a training which it does not have."""
        run = self._run(variant, learning_rate, seed, self.train.max_steps, f"seed-{seed}", NONE)
        name = f"{variant.label}-{source.name}" if source else run.folder.name
        return replace(run, folder=run.folder.with_name(name), source=source)

    def _run(self, variant: Variant, rate: float, seed: int, steps: int, label: str, models: Models) -> Run:
        changes: dict[str, Any] = {name: value for name, value in variant.spec.train if value is not None}
        warmup = changes.get("warmup_steps", self.train.warmup_steps)
        changes |= {
            "learning_rate": rate,
            "max_steps": steps,
            "warmup_steps": round(warmup * steps / self.train.max_steps),
            "eval_steps": min(self.train.eval_steps, steps),
        }
        folder, prune = self.output / RUNS / variant.spec.folder, variant.spec.prune
        if teacher := models.get("distil_from"):
            objective = variant.spec.distillation.model_dump()
            changes["distillation"] = DistillationSpec(**objective, teacher=str(teacher))
        if source := models.get("init_from"):
            start = folder / f"{variant.label}-{source.name}" if prune else source
            changes |= {"init_from": str(start), "keep_zeros": bool(prune and prune.weights)}
        blocks = {
            "model": variant.model,
            "train": TrainSpec(**{**dict(self.train), **changes}),
            "seed": seed,
            **{"output": None, "bench": None, "convert": None, "study": None},
        }
        recipe = complete(self.loaded, blocks)
        return Run(variant.name, rate, seed, recipe, folder / f"rate-{rate:g}-{label}", source)


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
    specs = recipe.study.models(recipe.model)
    for spec in recipe.study.variants:
        model = specs[spec.name]
        complete(loaded, {"model": model, "study": None})
        variants.append(Variant(spec, model, count_parameters(model)))
    check_sizes(recipe.study, {variant.name: variant.sizes for variant in variants}, loaded.path)
    models = {variant.name: variant.model for variant in variants}
    for variant in variants:
        if variant.spec.distil_from:
            student, teacher = variant.model, models[variant.spec.distil_from]
            assert isinstance(student, ModelSpec)
            assert isinstance(teacher, ModelSpec)
            check_teacher(variant.spec.distillation, student, teacher)
        if variant.spec.quantize and (reason := binding.available()):
            raise Failure(f"{variant.name}: quantized weights are measured in the engine: {reason}")
    return Plan(loaded, output, variants)


def print_plan(plan: Plan) -> None:
    """Print the variants, their runs, tokens, and the time by a short measurement of each variant's step."""
    seconds: dict[str, float | None] = {}
    known: dict[str, float | None] = {}  # by architecture
    for variant in plan.variants:
        key = variant.model.model_dump_json()
        if variant.trains and key not in known:
            rate, seed = plan.learning_rates(variant)[0], plan.study.seeds[0]
            known[key] = step_seconds(plan.run(variant, rate, seed).recipe)
        seconds[variant.name] = known[key] if variant.trains else 0.0
    rows, total, left, done = [], 0.0, 0, 0
    for variant in plan.variants:
        step, steps = seconds[variant.name], plan.steps_of(variant)
        if step is not None and variant.spec.distil_from:
            read = seconds[variant.spec.distil_from]
            step = None if read is None else step + read / 3  # a forward pass of the teacher
        ended = plan.ended(variant)
        remaining = max(steps - sum(ended), 0)
        left, done = left + remaining, done + len(ended)
        total = math.inf if step is None else total + step * remaining
        rows.append(
            (
                variant.name,
                f"{variant.sizes.total:,}",
                f"{variant.sizes.active:,}",
                plan.runs_of(variant),
                f"{steps * plan.tokens_per_step:,}",
                None if step is None else f"{step:.3f}",
                None if step is None else _duration(step * steps),
            )
        )
    unit = f"{plan.unit}s"
    columns = ("variant", "parameters", "active", "runs", unit, "s / step", "time")
    print_table(columns, rows, title="dry run: nothing is trained")
    time = "no estimate: a variant needs more memory than there is"
    if math.isfinite(total):
        time = f"about {_duration(total)} for what is left, without evaluations"
    steps = sum(map(plan.steps_of, plan.variants))
    facts = [
        ("trials", _trial_words(plan)),
        ("runs", f"{plan.runs}, {done} of them finished"),
        (
            unit,
            f"{plan.tokens:,} a whole run, {steps * plan.tokens_per_step:,} in all, "
            f"{left * plan.tokens_per_step:,} left",
        ),
        ("time", time),
        ("folder", str(plan.output)),
    ]
    print_table(["study", ""], facts)


def _trial_words(plan: Plan) -> str:
    tried = [variant for variant in plan.variants if plan.trials(variant)]
    if not tried:
        return "none: one learning rate"
    rates = " or ".join(str(count) for count in sorted({plan.trials(each) for each in tried}))
    lengths = sorted({(plan.trial_steps(each) or plan.steps(each)) * plan.tokens_per_step for each in tried})
    return f"{rates} learning rates a variant, {' or '.join(f'{length:,}' for length in lengths)} tokens each"


def _duration(seconds: float) -> str:
    for limit, unit in ((3600 * 48, "days"), (3600, "h"), (60, "min")):
        if seconds >= limit:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.1f} {unit}"
    return f"{seconds:.0f} s"
