"""`sparsecli train`: a recipe to a run directory with checkpoints, metrics and a model."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import transformers
from transformers import PreTrainedTokenizerFast, TrainingArguments, set_seed

from sparsecli.console import Failure, RecipeError, first_process, print_table, say
from sparsecli.data.examples import Prepared
from sparsecli.data.preparation import prepare
from sparsecli.model.auto import Network, build_network
from sparsecli.model.bfloat16 import has_bfloat16
from sparsecli.model.files import RECIPE, find_model, read_description, share
from sparsecli.model.loading import load_network, load_tokenizer
from sparsecli.model.sizes import count_parameters
from sparsecli.model.tokenizer import beyond
from sparsecli.recipe.data import CopyTask, CorruptedPairs, DataSpec, SavedTokenizer
from sparsecli.recipe.loader import LoadedRecipe, complete, dump, require, shipped
from sparsecli.recipe.schema import Recipe
from sparsecli.recipe.training import TrainSpec
from sparsecli.train import run_directory
from sparsecli.train.checkpoint import newest_sound
from sparsecli.train.distillation import DistillationTrainer, Teacher, check_teacher, check_vocabulary
from sparsecli.train.loop import LanguageModelTrainer, Signals, run_steps, training_arguments
from sparsecli.train.samples import ROUGE, SAMPLES, Samples

SHOWN, WIDTH = 5, 60
"""Samples that are printed when training is done, and characters of each text."""


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
    exact_match: float | None = None
    """Share of the sampled sources whose target was written exactly."""
    rouge: dict[str, float] | None = None
    """`rouge_1`, `rouge_2` and `rouge_lsum` of what was written for the sampled sources, 0 to 100."""
    lead_rouge: dict[str, float] | None = None
    """The same of the sources' first tokens."""


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

    known = _known_result(output) if resume else None
    if known and known.steps >= recipe.train.max_steps and (output / "model").is_dir():
        if not first:
            return None
        say(f"{output}: this run is finished; nothing to do")
        _print_result(known, recipe, output)
        return known
    if resume:
        say(
            f"going on from {checkpoint}"
            if checkpoint
            else f"{output}: no checkpoint yet, starting at step 0"
        )

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if first:
        _say_what_accelerate_changes(os.environ)
    arguments = training_arguments(recipe.train, recipe.seed, output / run_directory.CHECKPOINTS)
    with arguments.main_process_first(desc="preparing the text"):  # the others then find it in the cache
        prepared = prepare(recipe.data)
    _check_vocabularies(recipe.train, prepared.tokenizer)
    size, tokenizer = recipe.model.vocabulary.size, prepared.tokenizer
    ordinary, special = beyond(tokenizer.backend_tokenizer, size)
    # An older model may lack special tokens that its tokenizer got later; of these running text has the end alone.
    lenient = recipe.train.init_from and not recipe.data.pair_lengths and tokenizer.eos_token_id < size
    if ordinary or (special and not lenient):
        raise RecipeError(
            f"{loaded.path.name}: model.vocabulary.size: {size} is less than the {len(tokenizer)} tokens of "
            "data.tokenizer"
        )
    with run_directory.writing(output, run_directory.go_on(output)):
        result = _train(recipe, prepared, arguments, output, checkpoint, first)
    if result:
        _print_result(result, recipe, output)
        if result.rouge:
            _print_samples(output)
    return result


def _known_result(output: Path) -> Result | None:
    """The figures of a run that was finished. Raises `Failure` where they are damaged."""
    figures = run_directory.read_facts(output).get("result")
    try:
        result = Result(**figures) if figures else None
        return result if result is None or result.steps >= 0 else None
    except TypeError:
        place = output / run_directory.FACTS
        raise Failure(f"{place}: its result is not that of a run; delete it to go on without it") from None


def _say_what_accelerate_changes(environment: Mapping[str, str]) -> None:
    """`accelerate launch` leaves its options in the environment, where they come before the recipe's."""
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        say(
            f"accelerate launch --mixed_precision {precision} comes before train.bf16; leave it out for the recipe's"
        )
    several = "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment
    if several and environment.get("ACCELERATE_USE_CPU", "").lower() == "true":
        say("accelerate launch --cpu starts one process, whatever --num_processes; torchrun starts several")


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
        try:
            folder = find_model(start)
        except Failure as failure:
            instead = "; train.init_from=null starts from random weights" if recipe.model else ""
            if Path(start).name in shipped() and not Path(start).exists():
                instead = f"; sparsecli train {Path(start).name} makes it{instead}"
            raise Failure(f"train.init_from: {failure}{instead}") from None
        spec = read_description(folder).spec
        model = recipe.model or spec
        differ = run_directory.differences(spec.unhashed, model.unhashed)
        if differ:
            listed = ", ".join(
                f"model.{key}: {there} in the model, {here} in the recipe" for key, there, here in differ
            )
            raise RecipeError(
                f"{loaded.path.name}: model: is not the one in train.init_from {start}: {listed}; "
                f"leave the block out to take it from there"
            )
        data = recipe.data
        if not isinstance(data, CopyTask) and data.tokenizer is None:
            saved = SavedTokenizer(kind="saved", path=str(folder))
            data = data.model_copy(update={"tokenizer": saved})
        recipe = complete(loaded, {"model": model, "data": data})
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
    read, predicted = _longest(recipe.data)
    batch = train.per_device_train_batch_size * predicted
    step = train.per_device_train_batch_size * train.gradient_accumulation_steps * read
    copies = 4 if train.optim == "adamw_torch" else 3  # weights, gradients, the optimizer's averages
    logits = 3 * batch * recipe.model.vocabulary.size  # themselves, their softmax and their gradient
    written: tuple[str, ...] = (RECIPE, run_directory.FACTS, run_directory.METRICS, "loss.png")
    at_most = "at most " if recipe.data.pair_lengths else ""
    if _judge(recipe):
        written = (*written, SAMPLES)
    starts = [("starts from", train.init_from)] if train.init_from else []
    teachers = [("learns from", train.distillation.teacher)] if train.distillation else []
    rows = [
        *starts,
        *teachers,
        ("parameters", f"{sizes.total:,}, of which a token reads {sizes.active:,}"),
        ("weights, gradients, optimizer", f"about {sizes.total * copies * 4 / 2**20:,.0f} MiB"),
        ("logits of a batch", f"about {logits * 4 / 2**20:,.0f} MiB"),
        ("steps", f"{train.max_steps:,}"),
        ("tokens", f"{at_most}{train.max_steps * step:,}, {step:,} a step and process"),
        ("files", f"{', '.join(written)}, tensorboard/, checkpoints/, model/ in {output}"),
    ]
    print_table(["plan", ""], rows)


def _longest(data: DataSpec) -> tuple[int, int]:
    """Most tokens of one example that are read, and that are predicted."""
    if data.pair_lengths:
        source, target = data.pair_lengths
        return source + target, target
    assert not isinstance(data, CopyTask)
    return data.sequence_length, data.sequence_length


def _print_result(result: Result, recipe: Recipe, output: Path) -> None:
    """The figures that there are and that say something of such a model and such data."""
    copies = recipe.data is not None and recipe.data.copies  # of what is no text
    mixed = recipe.model is not None and recipe.model.feed_forward.kind == "mixture"
    figures = [
        ("held-out nats per token", result.held_out_nats, ".4f"),
        ("held-out bits per byte", None if copies else result.bits_per_byte, ".4f"),
        ("training tokens per second", result.tokens_per_second or None, ",.0f"),
        ("experts never chosen" if mixed else "units never chosen", result.never_chosen, ".2%"),
        ("balance of choices", result.balance, ".4f"),
        ("KL to the teacher", result.kl_to_teacher, ".4f"),
        ("copied exactly", result.exact_match, ".2%"),
    ]
    rows = [(label, format(value, digits)) for label, value, digits in figures if value is not None]
    for label, scores in (("ROUGE-1, 2, Lsum", result.rouge), ("the same of the lead", result.lead_rouge)):
        if scores:
            rows.append((label, ", ".join(f"{value:.1f}" for value in scores.values())))
    print_table(["result", ""], [*rows, ("model", str(output / "model"))])


def _print_samples(output: Path) -> None:
    """The first things that the finished model wrote, beside what was wanted."""
    with (output / SAMPLES).open() as lines:  # texts may hold what `splitlines` would take for a line's end
        samples = [json.loads(line) for line in islice(lines, SHOWN)]
    rows = []
    for sample in samples:
        source = sample["source"].strip().partition("\n")[0]
        rows.append(
            (shorten(source, WIDTH), shorten(sample["target"], WIDTH), shorten(sample["written"], WIDTH))
        )
    print_table(["source", "target", "written"], rows)


def _train(
    recipe: Recipe,
    prepared: Prepared,
    arguments: TrainingArguments,
    output: Path,
    checkpoint: Path | None,
    first: bool,
) -> Result | None:
    assert recipe.data
    assert recipe.train
    train, checkpoints = recipe.train, output / run_directory.CHECKPOINTS
    facts = run_directory.read_facts(output)
    if facts.get("corpus", prepared.fingerprint) != prepared.fingerprint:
        raise Failure(f"{output}: the text or its tokenizer is not what this run was started with")
    if checkpoint and facts.get("processes", arguments.world_size) != arguments.world_size:
        raise Failure(
            f"{output}: cannot be resumed with another number of processes ({facts['processes']} then, "
            f"{arguments.world_size} now): batches, their order and random numbers depend on it; start as many"
        )
    batch = train.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    if len(prepared.train) < batch:
        pairs = recipe.data.pair_lengths
        what = "pairs to train on" if pairs else f"training windows of {_longest(recipe.data)[0]} tokens"
        raise Failure(
            f"data: {len(prepared.train)} {what} do not fill a batch of {batch}; add text or lower "
            f"train.per_device_train_batch_size"
        )

    spec = recipe.model
    assert spec
    longest = spec.encoder.max_positions if spec.encoder else spec.max_positions
    prepared.tokenizer.model_max_length = longest  # of what is read, for those who ask it to cut texts
    set_seed(recipe.seed)
    model = _model(recipe, prepared.tokenizer, checkpoint)
    model.generation_config.repetition_penalty = recipe.generate.repetition_penalty
    if first:
        output.mkdir(parents=True, exist_ok=True)
        resolved = recipe.model_copy(update={"output": str(output)})
        run_directory.replace_text(output / RECIPE, dump(resolved))
        facts |= run_directory.environment() | {
            "started": facts.get("started", _now()),
            "finished": None,
            "seed": recipe.seed,
            "corpus": prepared.fingerprint,
            "processes": arguments.world_size,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        run_directory.write_facts(output, facts)

    samples, judge = None, _judge(recipe)
    if judge and first:
        samples = Samples(
            prepared.held_out,
            prepared.tokenizer,
            train.eval_samples,
            judge=judge,
            longest=_longest(recipe.data)[1],
            batch_size=train.per_device_eval_batch_size,
            folder=output,
        )
    if arguments.activation_checkpointing and not model.supports_gradient_checkpointing:
        say("train.gradient_checkpointing: reversible blocks store no activations; there is nothing to do")
        arguments.activation_checkpointing = False
    bf16 = train.bf16 and has_bfloat16(arguments.device.type)
    if train.bf16 and not bf16:
        say(
            "train.bf16: this processor has no products in bfloat16; they are in float32, which is faster here"
        )
    parts: dict[str, Any] = {
        "model": model,
        "arguments": arguments,
        "tokenizer": prepared.tokenizer,
        "examples": prepared.train,
        "held_out": prepared.held_out,
        "bytes_per_token": prepared.held_out.bytes_per_token(prepared.tokenizer),
        "bf16": bf16,
        "checkpoints": checkpoints,
        "keep": train.save_total_limit,
        "signals": Signals(),
        "samples": samples,
    }
    trainer: LanguageModelTrainer
    if train.distillation:
        teacher = Teacher(load_network(find_model(train.distillation.teacher)), bf16)
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
        exact_match=row.get("exact_match"),
        rouge={name: row[name] for name in ROUGE if name in row} or None,
        lead_rouge=samples.lead() if samples and judge == "rouge" else None,
    )
    run_directory.write_facts(output, {**facts, "finished": _now(), "result": asdict(result)})
    return result


def _judge(recipe: Recipe) -> Literal["rouge", "exact"] | None:
    """How what the model writes for held-out sources is judged; None where it writes nothing."""
    assert recipe.data
    assert recipe.train
    if not recipe.train.eval_samples or not recipe.data.pair_lengths:
        return None
    if recipe.data.copies:
        return "exact"
    assert not isinstance(recipe.data, CopyTask)
    return None if isinstance(recipe.data.pairs, CorruptedPairs) else "rouge"


def _model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, checkpoint: Path | None) -> Network:
    """The recipe's model with fresh weights, or with those of a checkpoint or of the model that it starts from."""
    assert recipe.model
    if checkpoint:
        return load_network(checkpoint)
    if recipe.train and recipe.train.init_from:
        return load_network(find_model(recipe.train.init_from), spec=recipe.model)
    return build_network(
        recipe.model,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
