"""`sparsecli train`: a recipe to a run directory with checkpoints, metrics and a model."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast, set_seed

from sparsecli.console import Failure, RecipeError, first_process, print_table, say
from sparsecli.data.packing import PackedCorpus, pack
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.checkpoint import load_network, load_tokenizer
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.folder import find_model, read_description, share
from sparsecli.model.sizes import count_parameters
from sparsecli.recipe.loader import LoadedRecipe, complete, dump, require
from sparsecli.recipe.schema import Recipe, SavedTokenizer
from sparsecli.recipe.training import TrainSpec
from sparsecli.train import run_directory
from sparsecli.train.checkpoint import newest_sound
from sparsecli.train.distillation import DistillationTrainer, Teacher, check_teacher, check_vocabulary
from sparsecli.train.loop import LanguageModelTrainer, Signals, run_steps, training_arguments


@dataclass(frozen=True)
class Result:
    """The final figures of a run."""

    steps: int
    held_out_nats: float
    bits_per_byte: float
    tokens_per_second: float | None
    """Training speed of the process that finished the run."""
    never_chosen: float | None = None
    balance: float | None = None
    kl_to_teacher: float | None = None


def run(
    loaded: LoadedRecipe, *, output: Path, resume: str | None = None, dry_run: bool = False
) -> Result | None:
    """Train the recipe's model into `output` and print the final figures; a dry run prints the plan instead.

    Under `torchrun` every process calls this; the first one alone prints, writes and returns the figures.
    Raises `RecipeError` when the recipe cannot be trained; `Failure` when `output` is taken or cannot be
    written (now or later, as on a full disk), when the text cannot be read, or when a run cannot be resumed as
    asked; `Stopped` after SIGTERM or SIGINT before the last step. One that comes later has nothing left to
    stop: the run ends as if none had.
    """
    recipe = _resolved(loaded)
    assert recipe.model
    assert recipe.data
    assert recipe.train
    if resume not in (None, "auto"):
        raise Failure(
            f"--resume {resume}: expected auto, which takes the newest whole checkpoint", exit_code=2
        )
    first = first_process()
    if first:
        hint = "go on with --resume auto, or choose another --output"
        checkpoint = run_directory.claim(output, recipe, resume=resume == "auto", hint=hint)
    else:
        checkpoint = newest_sound(output / run_directory.CHECKPOINTS)[0] if resume else None
    if dry_run:
        if first:
            _print_plan(recipe, output)
        return None

    figures = run_directory.read_facts(output).get("result")
    if resume and figures and (output / "model").is_dir():
        if not first:
            return None
        say(f"{output}: this run is finished; nothing to do")
        _print_result(Result(**figures), output)
        return Result(**figures)
    if resume:
        say(
            f"going on from {checkpoint}"
            if checkpoint
            else f"{output}: no checkpoint yet, starting at step 0"
        )

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    corpus = pack(recipe.data)
    _check_vocabularies(recipe.train, corpus.tokenizer)
    if len(corpus.tokenizer) > recipe.model.vocabulary.size:
        raise RecipeError(
            f"{loaded.path.name}: model.vocabulary.size: {recipe.model.vocabulary.size} is less than the "
            f"{len(corpus.tokenizer)} tokens of data.tokenizer"
        )
    with run_directory.writing(output, run_directory.go_on(output)):
        result = _train(recipe, corpus, output, checkpoint, first)
    if result:
        _print_result(result, output)
    return result


def _resolved(loaded: LoadedRecipe) -> Recipe:
    """The recipe with the architecture and the tokenizer of the model that it starts from.

    Raises:
        RecipeError: a block is missing, or the two do not agree.
        Failure: there is no such model, or the teacher does not fit it.
    """
    recipe = loaded.recipe
    start = recipe.train and recipe.train.init_from
    require(loaded, *(() if start else ("model",)), "data", "train")
    assert recipe.data
    assert recipe.train
    if start:
        folder = find_model(start)
        spec = read_description(folder).spec
        model = recipe.model or spec
        differ = [name for name, value in spec if value != getattr(model, name)]
        if differ:
            raise RecipeError(
                f"{loaded.path.name}: model: is not the one in train.init_from {start}: {', '.join(differ)}; "
                f"leave the block out to take it from there"
            )
        tokenizer = recipe.data.tokenizer or SavedTokenizer(kind="saved", path=str(folder))
        data = recipe.data.model_copy(update={"tokenizer": tokenizer})
        recipe = complete(loaded, {"model": spec, "data": data})
    assert recipe.model
    objective = recipe.train and recipe.train.distillation
    if objective:
        check_teacher(objective, recipe.model, read_description(find_model(objective.teacher)).spec)
    return recipe


def _check_vocabularies(train: TrainSpec, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise Failure unless the models that the training starts from and learns from read the text's tokens alike."""
    models = {"train.init_from": train.init_from}
    if train.distillation:
        models["train.distillation.teacher"] = train.distillation.teacher
    for key, reference in models.items():
        if reference is not None:
            folder = find_model(reference)
            check_vocabulary(tokenizer, load_tokenizer(folder), key, folder)


def _print_plan(recipe: Recipe, output: Path) -> None:
    """What a run would do, from the recipe alone."""
    assert recipe.model
    assert recipe.data
    assert recipe.train
    train, sizes = recipe.train, count_parameters(recipe.model)
    batch = train.per_device_train_batch_size * recipe.data.sequence_length
    step = batch * train.gradient_accumulation_steps
    copies = 4 if train.optim == "adamw_torch" else 3  # weights, gradients, the optimizer's averages
    logits = 3 * batch * recipe.model.vocabulary.size  # themselves, their softmax and their gradient
    written = (run_directory.RECIPE, run_directory.FACTS, run_directory.METRICS, "loss.png")
    starts = [("starts from", train.init_from)] if train.init_from else []
    teachers = [("learns from", train.distillation.teacher)] if train.distillation else []
    rows = [
        *starts,
        *teachers,
        ("parameters", f"{sizes.total:,}, of which a token reads {sizes.active:,}"),
        ("weights, gradients, optimizer", f"about {sizes.total * copies * 4 / 2**20:,.0f} MiB"),
        ("logits of a batch", f"about {logits * 4 / 2**20:,.0f} MiB"),
        ("steps", f"{train.max_steps:,}"),
        ("tokens", f"{train.max_steps * step:,}, {step:,} a step and process"),
        ("files", f"{', '.join(written)}, tensorboard/, checkpoints/, model/ in {output}"),
    ]
    print_table(["plan", ""], rows)


def _print_result(result: Result, output: Path) -> None:
    def show(value: float | None, digits: str) -> str | None:
        return None if value is None else format(value, digits)

    rows = [
        ("held-out nats per token", show(result.held_out_nats, ".4f")),
        ("held-out bits per byte", show(result.bits_per_byte, ".4f")),
        ("training tokens per second", show(result.tokens_per_second, ",.0f")),
        ("units never chosen", show(result.never_chosen, ".2%")),
        ("balance of choices", show(result.balance, ".4f")),
        ("KL to the teacher", show(result.kl_to_teacher, ".4f")),
        ("model", str(output / "model")),
    ]
    print_table(["result", ""], rows)


def _train(
    recipe: Recipe, corpus: PackedCorpus, output: Path, checkpoint: Path | None, first: bool
) -> Result | None:
    assert recipe.data
    assert recipe.train
    train, checkpoints = recipe.train, output / run_directory.CHECKPOINTS
    windows = corpus.train.windows(recipe.data.sequence_length)
    held_out = corpus.held_out.windows(recipe.data.sequence_length, recipe.data.held_out_tokens)
    facts = run_directory.read_facts(output)
    if facts.get("corpus", corpus.fingerprint) != corpus.fingerprint:
        raise Failure(f"{output}: the text or its tokenizer is not what this run was started with")
    batch = train.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    if len(windows) < batch:
        raise Failure(
            f"data: {len(windows)} training windows of {recipe.data.sequence_length} tokens do not "
            f"fill a batch of {batch}; add text or lower train.per_device_train_batch_size"
        )

    arguments = training_arguments(train, recipe.seed, checkpoints)
    set_seed(recipe.seed)
    model = _model(recipe, corpus.tokenizer, checkpoint)
    if first:
        output.mkdir(parents=True, exist_ok=True)
        resolved = recipe.model_copy(update={"output": str(output)})
        run_directory.replace_text(output / run_directory.RECIPE, dump(resolved))
        facts |= run_directory.environment() | {
            "started": facts.get("started", _now()),
            "finished": None,
            "seed": recipe.seed,
            "corpus": corpus.fingerprint,
            "processes": arguments.world_size,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        run_directory.write_facts(output, facts)

    parts: dict[str, Any] = {
        "model": model,
        "arguments": arguments,
        "tokenizer": corpus.tokenizer,
        "windows": windows,
        "held_out": held_out,
        "bytes_per_token": held_out.bytes_per_token(corpus.tokenizer),
        "bf16": train.bf16,
        "checkpoints": checkpoints,
        "keep": train.save_total_limit,
        "signals": Signals(),
    }
    trainer: LanguageModelTrainer
    if train.distillation:
        teacher = Teacher(load_network(find_model(train.distillation.teacher)), train.bf16)
        trainer = DistillationTrainer(**parts, teacher=teacher, objective=train.distillation)
    else:
        trainer = LanguageModelTrainer(**parts)
    hint = run_directory.go_on(output)
    journal = run_steps(trainer, output, checkpoint, description="training", hint=hint)

    beside, place = output / "model.tmp", output / "model"
    if first:
        shutil.rmtree(beside, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(beside))
    if first:
        (beside / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody may load
        share(beside)
        shutil.rmtree(place, ignore_errors=True)
        beside.rename(place)
    row = journal.held_out_at(train.max_steps) if journal else None
    if trainer.anywhere(first and row is None):
        row = trainer.evaluate()
    if journal is None or row is None:
        return None
    result = Result(
        steps=train.max_steps,
        held_out_nats=row["held_out_nats"],
        bits_per_byte=row["bits_per_byte"],
        tokens_per_second=journal.tokens_per_second,
        never_chosen=row.get("never_chosen"),
        balance=row.get("balance"),
        kl_to_teacher=row.get("kl_to_teacher"),
    )
    run_directory.write_facts(output, {**facts, "finished": _now(), "result": asdict(result)})
    return result


def _model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, checkpoint: Path | None
) -> ScalingTransformerForCausalLM:
    """The recipe's model with fresh weights, or with those of a checkpoint or of the model that it starts from."""
    assert recipe.model
    if checkpoint:
        return ScalingTransformerForCausalLM.from_pretrained(checkpoint)
    if recipe.train and recipe.train.init_from:
        return load_network(find_model(recipe.train.init_from))
    tokens: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return ScalingTransformerForCausalLM(ScalingTransformerConfig.from_spec(recipe.model, **tokens))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
