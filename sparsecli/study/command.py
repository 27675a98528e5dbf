"""`sparsecli train` of a recipe with a `study:` block: trains what is missing, measures decoding, writes the result."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sparsecli.bench import compare
from sparsecli.bench.command import check_measurable, measure_runs
from sparsecli.bench.render import as_json
from sparsecli.bench.result import BenchResult
from sparsecli.console import Failure, say
from sparsecli.data.examples import Prepared
from sparsecli.data.images import prepare_images
from sparsecli.data.preparation import prepare_with_tuning
from sparsecli.model.files import RECIPE
from sparsecli.model.outputs import check_output
from sparsecli.recipe.data import ImagesSpec
from sparsecli.recipe.loader import LoadedRecipe, dump, load
from sparsecli.spec.vision import VisionSpec
from sparsecli.study.pictures import draw
from sparsecli.study.plan import Plan, make_plan, print_plan
from sparsecli.study.quantizing import engine_type
from sparsecli.study.result import StudyResult, make_result
from sparsecli.study.training import HINT, StudyTrainer, Trained
from sparsecli.train import run_directory
from sparsecli.train.command import check_vocabulary_size
from sparsecli.train.plan import check_reporters

BENCH = "bench.json"
"""File of a study: the measurement of decoding, as `bench` writes it."""


def run(
    loaded: LoadedRecipe,
    *,
    output: Path,
    resume: Literal["auto"] | None = None,
    dry_run: bool = False,
    stop_after: float | None = None,
) -> StudyResult | None:
    """Train the variants of the recipe's study into `output` and compare them; a dry run prints the plan instead.

    After `stop_after` seconds of training the study stops as it would at SIGTERM.

    The same call continues a study that was stopped, with or without `resume="auto"`. Finished runs are not trained
    again, and what was measured is not measured again.

    Raises:
        RecipeError: the recipe has no study, or its variants do not fit together.
        Failure: `output` holds something else or cannot be written, or something cannot be trained or measured.
        Stopped: after SIGTERM or SIGINT, with a checkpoint.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise Failure("a study trains in one process; leave out torchrun", exit_code=2)
    plan = make_plan(loaded, output)
    check_reporters(plan.train)
    check_measurable(loaded, {variant.name: variant.model for variant in plan.variants})
    if dry_run:
        _claim(output)
        print_plan(plan)
        return None
    with run_directory.alone(output), run_directory.interruptible(output, HINT):
        _claim(output)
        return _run(loaded, plan, output, stop_after)


def _run(loaded: LoadedRecipe, plan: Plan, output: Path, stop_after: float | None) -> StudyResult:
    prepared = _prepared(plan)
    with run_directory.writing(output, HINT):
        output.mkdir(parents=True, exist_ok=True)
        resolved = loaded.recipe.model_copy(update={"output": str(output)})
        run_directory.replace_text(output / RECIPE, dump(resolved))
        trained = StudyTrainer(plan, prepared, stop_after).train()
        result = make_result(plan, trained, _measured(plan, trained))
        _write(result, trained, output)
    result.show()
    say(f"wrote study.md, study.csv, study.json and pictures to {output}")
    return result


def _prepared(plan: Plan) -> Prepared:
    """The examples, with those that choose learning rates.

    Raises:
        RecipeError: a variant has no row for a token of the text.
        Failure: text or images cannot be read, or there are too few.
    """
    loaded, data = plan.loaded, plan.data
    if isinstance(data, ImagesSpec):
        model = loaded.recipe.model
        assert isinstance(model, VisionSpec)
        return prepare_images(data, model.image_size, model.classes, tuning=True)
    prepared = prepare_with_tuning(data, plan.study.tuning_tokens)
    for variant in plan.variants:
        recipe = loaded.recipe.model_copy(update={"model": variant.model})
        check_vocabulary_size(recipe, prepared.tokenizer, loaded.path.name)
    return prepared


def _claim(output: Path) -> None:
    """Raise Failure if `output` cannot be written or holds something other than a study."""
    if not output.is_dir() or not any(output.iterdir()):
        check_output(output)
        return
    stored = output / RECIPE
    if not stored.exists() or load(str(stored)).recipe.study is None:
        raise Failure(f"{output}: is not empty and holds no study; choose another --output")
    check_output(output)


def _measured(plan: Plan, trained: Sequence[Trained]) -> BenchResult | None:
    """Decoding of each variant's first model, measured now, or before in the same way; None without a model."""
    models = {each.variant.name: each.first_model for each in trained}
    named = {name: folder for name, folder in models.items() if folder}
    if not named:
        return None
    path = plan.output / BENCH
    quantized = {each.name: each.spec.quantize for each in plan.variants}
    dtypes = {name: kind for name, spec in quantized.items() if spec and (kind := engine_type(spec))}
    measured = measure_runs(plan.loaded, named, compare.read(path) if path.exists() else None, dtypes)
    run_directory.replace_text(path, as_json(measured) + "\n")
    return measured


def _write(result: StudyResult, trained: Sequence[Trained], output: Path) -> None:
    """Write the table in each format, and the pictures."""
    run_directory.replace_text(output / "study.md", result.markdown())
    run_directory.replace_text(output / "study.csv", result.csv())
    run_directory.replace_text(output / "study.json", json.dumps(result.as_json(), indent=2) + "\n")
    draw(result, trained, output)
