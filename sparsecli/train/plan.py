"""The plan of a run: the recipe, completed from its initial model, and the table that a dry run prints."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from sparsecli.console import Failure, RecipeError, print_table
from sparsecli.model.files import RECIPE, read_description
from sparsecli.model.sizes import count_parameters
from sparsecli.recipe.data import CopyTask, CorruptedPairs, DataSpec, ImagesSpec, SavedTokenizer
from sparsecli.recipe.loader import LoadedRecipe, complete, require
from sparsecli.recipe.schema import Recipe
from sparsecli.recipe.training import TrainSpec
from sparsecli.spec.model import ModelSpec
from sparsecli.spec.vision import VisionSpec
from sparsecli.train import run_directory
from sparsecli.train.distillation import check_teacher
from sparsecli.train.samples import SAMPLES
from sparsecli.train.sources import initial_model, teacher_model
from sparsecli.train.stages import check_start_units


def resolved(loaded: LoadedRecipe) -> Recipe:
    """The recipe, completed with the architecture and the tokenizer of its initial model.

    Raises:
        RecipeError: a block is missing, or the two do not agree.
        Failure: the initial model does not exist, or the teacher does not fit it.
    """
    recipe = loaded.recipe
    start = recipe.train and recipe.train.init_from
    require(loaded, *(() if start else ("model",)), "data", "train")
    if isinstance(recipe.model, VisionSpec) or isinstance(recipe.data, ImagesSpec):
        _check_stages(recipe)
        return recipe
    assert recipe.data
    assert recipe.train
    if folder := initial_model(recipe):
        spec = read_description(folder).spec
        model = recipe.model or spec
        differ = run_directory.differences(spec.unhashed, model.unhashed)
        if differ:
            listed = ", ".join(
                f"model.{key}: {there} in the model, {here} in the recipe" for key, there, here in differ
            )
            raise RecipeError(
                f"{loaded.path.name}: model: differs from the model of train.init_from {start}: {listed}; "
                f"leave the block out to use that model's architecture"
            )
        data = recipe.data
        if not isinstance(data, CopyTask) and data.tokenizer is None:
            saved = SavedTokenizer(kind="saved", path=str(folder))
            data = data.model_copy(update={"tokenizer": saved})
        recipe = complete(loaded, {"model": model, "data": data})
    assert isinstance(recipe.model, ModelSpec)
    _check_stages(recipe)
    objective, teacher = recipe.train and recipe.train.distillation, teacher_model(recipe)
    if objective and teacher:
        check_teacher(objective, recipe.model, read_description(teacher).spec)
    return recipe


def _check_stages(recipe: Recipe) -> None:
    if recipe.train and recipe.train.start_units_per_block and recipe.model:
        check_start_units("train", recipe.train.start_units_per_block, recipe.model.feed_forward)


def check_reporters(train: TrainSpec) -> None:
    """Raise Failure if the package of a `train.report_to` is not installed."""
    for name in train.report_to:
        if find_spec(name) is None:
            raise Failure(
                f"train.report_to: {name} is not installed; pip install {name}, or leave it out of the list"
            )


def print_plan(recipe: Recipe, output: Path) -> None:
    """Print the plan of a run, from the recipe alone."""
    assert recipe.model
    assert recipe.data
    assert recipe.train
    train, sizes = recipe.train, count_parameters(recipe.model)
    copies = 4 if train.optim == "adamw_torch" else 3  # weights, gradients, the optimizer's averages
    step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    logits, unit, part = [], "images", "patch"
    if isinstance(recipe.model, ModelSpec):
        read, predicted = longest_example(recipe.data)
        step, unit, part = step * read, "tokens", "token"
        batch = train.per_device_train_batch_size * predicted
        needed = 3 * batch * recipe.model.vocabulary.size  # the logits, their softmax and their gradient
        logits = [("logits of a batch", f"about {needed * 4 / 2**20:,.0f} MiB")]
    written: tuple[str, ...] = (RECIPE, run_directory.FACTS, run_directory.METRICS, "loss.png")
    if "tensorboard" in train.report_to:
        written = (*written, "tensorboard/")
    at_most = "at most " if recipe.data.pair_lengths else ""
    if judge_of(recipe):
        written = (*written, SAMPLES)
    starts = [("starts from", train.init_from)] if train.init_from else []
    teachers = [("teacher", train.distillation.teacher)] if train.distillation else []
    rows = [
        *starts,
        *teachers,
        ("parameters", f"{sizes.total:,}, {sizes.active:,} active per {part}"),
        ("weights, gradients, optimizer", f"about {sizes.total * copies * 4 / 2**20:,.0f} MiB"),
        *logits,
        ("steps", f"{train.max_steps:,}"),
        (unit, f"{at_most}{train.max_steps * step:,}, {step:,} per step and process"),
        ("files", f"{', '.join(written)}, checkpoints/, model/ in {output}"),
    ]
    print_table(["plan", ""], rows)


def longest_example(data: DataSpec) -> tuple[int, int]:
    """The most tokens of an example that are read, and the most that are predicted."""
    if data.pair_lengths:
        source, target = data.pair_lengths
        return source + target, target
    assert not isinstance(data, CopyTask | ImagesSpec)
    return data.sequence_length, data.sequence_length


def judge_of(recipe: Recipe) -> Literal["rouge", "exact"] | None:
    """The measure of generated targets: ROUGE or exact matches; None if no targets are generated."""
    assert recipe.data
    assert recipe.train
    if not recipe.train.eval_samples or not recipe.data.pair_lengths:
        return None
    if recipe.data.copies:
        return "exact"
    assert not isinstance(recipe.data, CopyTask | ImagesSpec)
    return None if isinstance(recipe.data.pairs, CorruptedPairs) else "rouge"
