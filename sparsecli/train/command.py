"""`sparsecli train`: trains a recipe's model into a run directory with checkpoints, metrics and the model."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import transformers
from transformers import PreTrainedTokenizerFast, TrainingArguments, set_seed

from sparsecli.console import Failure, RecipeError, first_process, processes, say
from sparsecli.data.examples import Prepared
from sparsecli.data.images import prepare_images
from sparsecli.data.preparation import prepare
from sparsecli.model.auto import Network, build_classifier, build_network
from sparsecli.model.bfloat16 import has_bfloat16
from sparsecli.model.files import RECIPE, find_model
from sparsecli.model.loading import load_classifier, load_network, load_tokenizer
from sparsecli.model.outputs import share
from sparsecli.model.tokenizer import beyond
from sparsecli.model.vision import ScalingTransformerForImageClassification
from sparsecli.recipe.data import ImagesSpec
from sparsecli.recipe.loader import LoadedRecipe, dump
from sparsecli.recipe.schema import Recipe
from sparsecli.recipe.training import TrainSpec
from sparsecli.spec.model import ModelSpec
from sparsecli.spec.vision import VisionSpec
from sparsecli.train import run_directory
from sparsecli.train.checkpoint import newest_sound
from sparsecli.train.distillation import DistillationTrainer, Teacher, check_vocabulary
from sparsecli.train.plan import check_reporters, judge_of, longest_example, print_plan, resolved
from sparsecli.train.profile import profiled
from sparsecli.train.result import Result, card_of, known_result, print_result, print_samples
from sparsecli.train.samples import Samples
from sparsecli.train.sharding import is_of_deepspeed, uses_deepspeed, uses_fsdp
from sparsecli.train.threads import choose_threads
from sparsecli.train.trainer import KeepZeros, LanguageModelTrainer, Signals, run_steps, training_arguments

Trainable = Network | ScalingTransformerForImageClassification


def run(
    loaded: LoadedRecipe,
    *,
    output: Path,
    resume: Literal["auto"] | None = None,
    dry_run: bool = False,
    stop_after: float | None = None,
    profile: bool = False,
) -> Result | None:
    """Train the recipe's model into `output` and print the final figures; a dry run prints the plan instead.

    After `stop_after` seconds the run stops as it would at SIGTERM. `profile` prints where a step's time goes.

    Under `torchrun` every process calls this. Only the first process prints, writes and returns the figures.

    Raises:
        RecipeError: the recipe cannot be trained.
        Failure: `output` holds something else, another process trains there, or it cannot be written (also later, as
            on a full disk), the text cannot be read, or the run cannot be resumed.
        Stopped: after SIGTERM or SIGINT before the last step. A later signal has no effect.
    """
    signals = Signals(stop_after)
    recipe = resolved(loaded)
    assert recipe.train
    check_reporters(recipe.train)
    _check_sharded(recipe)
    first = first_process()
    claimed = run_directory.alone(output) if first and not dry_run else nullcontext()
    with claimed, run_directory.interruptible(output, run_directory.resume_hint(output)):
        return _run(loaded, recipe, output, resume, dry_run, signals, profile, first)


def _run(
    loaded: LoadedRecipe,
    recipe: Recipe,
    output: Path,
    resume: Literal["auto"] | None,
    dry_run: bool,
    signals: Signals,
    profile: bool,
    first: bool,
) -> Result | None:
    assert recipe.data
    assert recipe.train
    if first:
        hint = "resume with --resume auto, or choose another --output"
        checkpoint = run_directory.claim(output, recipe, resume=resume == "auto", hint=hint)
    else:
        checkpoint = newest_sound(output / run_directory.CHECKPOINTS)[0] if resume else None
    if dry_run:
        if first:
            print_plan(recipe, output)
        return None

    known = known_result(output) if resume else None
    if known and known.steps >= recipe.train.max_steps and (output / "model").is_dir():
        if not first:
            return None
        say(f"{output}: this run is finished; nothing to do")
        print_result(known, recipe, output)
        return known
    if resume:
        say(
            f"resuming from {checkpoint}"
            if checkpoint
            else f"{output}: no checkpoint yet, starting at step 0"
        )

    if first:
        _report_accelerate_options(os.environ)
    arguments = training_arguments(recipe.train, recipe.seed, output / run_directory.CHECKPOINTS)
    with arguments.main_process_first(desc="preparing the text"):  # the others then find it in the cache
        prepared = _prepared(recipe)
    if prepared.labels is None:
        _check_vocabularies(recipe.train, prepared.tokenizer)
        check_vocabulary_size(recipe, prepared.tokenizer, loaded.path.name)
    hint = run_directory.resume_hint(output)
    result = train(recipe, prepared, arguments, output, checkpoint, hint, signals, profile)
    if result:
        print_result(result, recipe, output)
        if result.rouge:
            print_samples(output)
    return result


def _check_sharded(recipe: Recipe) -> None:
    """Raise Failure for what a model that is sharded over processes cannot do."""
    assert recipe.train
    if not (uses_fsdp() or uses_deepspeed()):
        return
    if recipe.train.distillation:
        raise Failure("train.distillation: works with torchrun, not with FSDP or DeepSpeed")
    if judge_of(recipe):
        raise Failure(
            "train.eval_samples: the first process generates the samples alone, which it cannot with FSDP or "
            "DeepSpeed; set it to 0, or use torchrun"
        )


def _prepared(recipe: Recipe) -> Prepared:
    """The recipe's examples, of text or of images."""
    assert recipe.data
    if isinstance(recipe.data, ImagesSpec):
        assert isinstance(recipe.model, VisionSpec)
        return prepare_images(recipe.data, recipe.model.image_size, recipe.model.classes)
    return prepare(recipe.data)


def _report_accelerate_options(environment: Mapping[str, str]) -> None:
    """Report options of `accelerate launch`, which it sets in the environment and which override the recipe's."""
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        say(
            f"accelerate launch --mixed_precision {precision} overrides train.bf16; leave it out to use train.bf16"
        )
    several = "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment
    if several and environment.get("ACCELERATE_USE_CPU", "").lower() == "true":
        say(
            "accelerate launch --cpu ignores --num_processes and starts one process; use torchrun to start several"
        )


def check_vocabulary_size(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, file: str) -> None:
    """Raise RecipeError unless the model has a row for every token of the text."""
    assert isinstance(recipe.model, ModelSpec)
    assert recipe.data
    assert recipe.train
    size = recipe.model.vocabulary.size
    ordinary, special = beyond(tokenizer.backend_tokenizer, size)
    # A model may lack special tokens that were added to its tokenizer later. Running text has only the end token.
    lenient = recipe.train.init_from and not recipe.data.pair_lengths and tokenizer.eos_token_id < size
    if ordinary or (special and not lenient):
        raise RecipeError(
            f"{file}: model.vocabulary.size: {size} is less than the {len(tokenizer)} tokens of data.tokenizer"
        )


def _check_vocabularies(train: TrainSpec, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise Failure unless the initial model and the teacher have the same vocabulary as the text."""
    models = {"train.init_from": train.init_from}
    if train.distillation:
        models["train.distillation.teacher"] = train.distillation.teacher
    for key, reference in models.items():
        if reference is not None:
            folder = find_model(reference)
            check_vocabulary(tokenizer, load_tokenizer(folder), key, folder)


def train(
    recipe: Recipe,
    prepared: Prepared,
    arguments: TrainingArguments,
    output: Path,
    checkpoint: Path | None,
    hint: str,
    signals: Signals,
    profile: bool = False,
) -> Result | None:
    """Train a resolved recipe from `checkpoint`, or from the start, into `output`, and print nothing to stdout.

    Returns the final figures in the first process. `hint` ends the message of a run that is stopped or cannot write.
    `profile` prints where a step's time goes.

    Raises:
        Diverged: the training loss is not finite.
        Failure, Stopped: as `run` does.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with run_directory.writing(output, hint):
        return _train(
            recipe, prepared, arguments, output, checkpoint, hint, first_process(), signals, profile
        )


def _train(
    recipe: Recipe,
    prepared: Prepared,
    arguments: TrainingArguments,
    output: Path,
    checkpoint: Path | None,
    hint: str,
    first: bool,
    signals: Signals,
    profile: bool,
) -> Result | None:
    assert recipe.model
    assert recipe.train
    facts = run_directory.read_facts(output)
    _check_resumable(facts, prepared, arguments, output, checkpoint)
    if arguments.device.type == "cpu":
        choose_threads(facts if checkpoint else {})
    _check_batch(recipe, prepared)
    set_seed(recipe.seed)
    if isinstance(recipe.model, VisionSpec):
        model: Trainable = _classifier(recipe.model, prepared, checkpoint)
    else:
        model = _language_model(recipe, recipe.model, prepared, checkpoint)
    if first:
        facts |= _started(recipe, prepared, arguments, output, facts, model)
        run_directory.write_facts(output, facts)
    samples = _samples(recipe, prepared, output) if first else None
    trainer = _trainer(recipe, prepared, arguments, output, model, samples, signals)
    with profiled(trainer, model) if profile and first else nullcontext():
        journal = run_steps(
            trainer,
            output,
            checkpoint,
            description="training",
            hint=hint,
            tensorboard="tensorboard" in recipe.train.report_to,
        )
    _save_model(trainer, output, first)
    row = journal.held_out_at(recipe.train.max_steps) if journal else None
    if (
        row and prepared.tuning and "tuning_loss" not in row
    ):  # a run of a study that `train` alone has finished
        row = None
    if trainer.anywhere(first and row is None):
        row = trainer.evaluate()
    if journal is None or row is None:
        return None
    lead = samples.lead() if samples and judge_of(recipe) == "rouge" else None
    result = Result.of(row, recipe.train.max_steps, journal.tokens_per_second, lead)
    run_directory.write_facts(output, {**facts, "finished": _now(), "result": asdict(result)})
    card_of(result, recipe).write(output / "model", output.name)
    return result


def _check_resumable(
    facts: Mapping[str, Any],
    prepared: Prepared,
    arguments: TrainingArguments,
    output: Path,
    checkpoint: Path | None,
) -> None:
    """Raise Failure if the run in `output` was started with another text, or DeepSpeed cannot use its checkpoint."""
    if facts.get("corpus", prepared.fingerprint) != prepared.fingerprint:
        raise Failure(f"{output}: the text or its tokenizer has changed since this run was started")
    if checkpoint is None:
        return
    if is_of_deepspeed(checkpoint) != uses_deepspeed():
        wrote, reads = ("DeepSpeed", "others") if is_of_deepspeed(checkpoint) else ("others", "DeepSpeed")
        raise Failure(
            f"{checkpoint}: a checkpoint of {wrote} cannot be read by {reads}; resume as the run was started"
        )
    then, now = facts.get("processes", arguments.world_size), arguments.world_size
    if then == now:
        return
    if uses_deepspeed():
        raise Failure(
            f"{checkpoint}: holds DeepSpeed's shards of {then} processes, not of {now}; use the same number"
        )
    say(
        f"{now} processes instead of {then}: the same batches, but other random numbers for dropout and noise"
    )


def _check_batch(recipe: Recipe, prepared: Prepared) -> None:
    """Raise Failure if the training examples do not fill a batch."""
    assert recipe.data
    assert recipe.train
    batch = recipe.train.per_device_train_batch_size * processes()
    if len(prepared.train) < batch:
        pairs = recipe.data.pair_lengths
        what = "training pairs"
        if prepared.labels:
            what = "training images"
        elif not pairs:
            what = f"training windows of {longest_example(recipe.data)[0]} tokens"
        raise Failure(
            f"data: {len(prepared.train)} {what} do not fill a batch of {batch}; add data or lower "
            f"train.per_device_train_batch_size"
        )


def _started(
    recipe: Recipe,
    prepared: Prepared,
    arguments: TrainingArguments,
    output: Path,
    facts: Mapping[str, Any],
    model: Trainable,
) -> dict[str, Any]:
    """Write the recipe into the run directory; return the facts of the run that begins or continues."""
    output.mkdir(parents=True, exist_ok=True)
    run_directory.replace_text(output / RECIPE, dump(recipe.model_copy(update={"output": str(output)})))
    return run_directory.environment() | {
        "started": facts.get("started", _now()),
        "finished": None,
        "seed": recipe.seed,
        "corpus": prepared.fingerprint,
        "processes": arguments.world_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _samples(recipe: Recipe, prepared: Prepared, output: Path) -> Samples | None:
    """Held-out sources whose targets the model generates; None if they are not measured."""
    assert recipe.data
    assert recipe.train
    judge = judge_of(recipe)
    if judge is None:
        return None
    return Samples(
        prepared.held_out,
        prepared.tokenizer,
        recipe.train.eval_samples,
        judge=judge,
        longest=longest_example(recipe.data)[1],
        batch_size=recipe.train.per_device_eval_batch_size,
        folder=output,
    )


def _trainer(
    recipe: Recipe,
    prepared: Prepared,
    arguments: TrainingArguments,
    output: Path,
    model: Trainable,
    samples: Samples | None,
    signals: Signals,
) -> LanguageModelTrainer:
    """The recipe's trainer. Options that have no effect are reported."""
    assert recipe.train
    train = recipe.train
    if arguments.activation_checkpointing and not model.supports_gradient_checkpointing:
        say(
            "train.gradient_checkpointing: no effect, because reversible blocks store no activations; leave it out"
        )
        arguments.activation_checkpointing = False
    bf16 = train.bf16 and has_bfloat16(arguments.device.type)
    if train.bf16 and not bf16:
        say("train.bf16: this processor has no bfloat16 products; float32 is used, which is faster here")
    parts: dict[str, Any] = {
        "model": model,
        "arguments": arguments,
        "processor": prepared.processor,
        "examples": prepared.train,
        "held_out": prepared.held_out,
        "bytes_per_token": prepared.held_out.bytes_per_token(prepared.tokenizer),
        "bf16": bf16,
        "checkpoints": output / run_directory.CHECKPOINTS,
        "keep": train.save_total_limit,
        "signals": signals,
        "samples": samples,
        "tuning": prepared.tuning,
    }
    if train.distillation is None:
        trainer = LanguageModelTrainer(**parts, start_units=train.start_units_per_block)
    else:
        teacher = Teacher(load_network(find_model(train.distillation.teacher)), bf16)
        trainer = DistillationTrainer(**parts, teacher=teacher, objective=train.distillation)
    if train.keep_zeros:
        trainer.add_callback(KeepZeros(model))
    return trainer


def _save_model(trainer: LanguageModelTrainer, output: Path, first: bool) -> None:
    """Write the model to a temporary folder, then rename it to `output/model`. All processes take part."""
    beside, place = output / "model.tmp", output / "model"
    if first:
        shutil.rmtree(beside, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(beside))
    if first:
        (beside / "training_args.bin").unlink(missing_ok=True)  # a pickle, which must not be loaded
        share(beside)
        shutil.rmtree(place, ignore_errors=True)
        beside.rename(place)


def _classifier(
    spec: VisionSpec, prepared: Prepared, checkpoint: Path | None
) -> ScalingTransformerForImageClassification:
    """The model of images with random weights, or with those of a checkpoint."""
    return load_classifier(checkpoint) if checkpoint else build_classifier(spec, prepared.labels)


def _language_model(recipe: Recipe, spec: ModelSpec, prepared: Prepared, checkpoint: Path | None) -> Network:
    """The model of text, and what it says of generation and of its tokenizer."""
    longest = spec.encoder.max_positions if spec.encoder else spec.max_positions
    prepared.tokenizer.model_max_length = longest  # of the input, for callers that truncate texts
    model = _model(recipe, spec, prepared.tokenizer, checkpoint)
    model.generation_config.repetition_penalty = recipe.generate.repetition_penalty
    return model


def _model(
    recipe: Recipe, spec: ModelSpec, tokenizer: PreTrainedTokenizerFast, checkpoint: Path | None
) -> Network:
    """The recipe's model with random weights, or with those of a checkpoint or of `train.init_from`."""
    if checkpoint:
        return load_network(checkpoint)
    if recipe.train and recipe.train.init_from:
        return load_network(find_model(recipe.train.init_from), spec=spec)
    return build_network(
        spec,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
