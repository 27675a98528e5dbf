"""Training: what a run leaves behind, how it stops and goes on, and how it fails."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from small_runs import assert_same_run, at_step, crash, files_up_to, send, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, RandomSampler
from transformers import TrainerState, TrainingArguments

from sparsecli.console import Failure, RecipeError, Stopped
from sparsecli.data import preparation
from sparsecli.data.ordering import SimilarLengths
from sparsecli.data.packing import TokenStream, pack
from sparsecli.model.architecture import ModelSpec
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.checkpoint import load_model
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.recipe.loader import LoadedRecipe, load
from sparsecli.train import checkpoint, loop, run_directory, trainer
from sparsecli.train.evaluation import evaluate
from sparsecli.train.trainer import Result, run

RECIPE = """
seed: 3
model:
  d_model: 16
  layers: 2
  heads: 2
  max_positions: 32
  dropout: 0.1
  feed_forward: {kind: sparse, d_ff: 32, block_size: 4, rank: 4, hard_fraction: 0.5, temperature: 0.3}
  attention: {projection: multiplicative_conv}
  vocabulary: {kind: dense, size: 320, tied: true}
data:
  source: files
  paths: ["TEXTS/*.txt"]
  sequence_length: 16
  held_out_tokens: 256
  tokenizer: {kind: bpe, vocabulary_size: 300}
train:
  max_steps: 12
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 2
  learning_rate: 0.01
  warmup_steps: 2
  logging_steps: 1
  eval_steps: 6
  save_steps: 4
"""


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe of a tiny model on a text of 7 steps an epoch."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "texts").mkdir()
    for number in range(30):
        text = " ".join(
            f"{(number * word) % 17} and {word % number if number else word}" for word in range(12)
        )
        (folder / "texts" / f"{number}.txt").write_text(text)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("TEXTS", str(folder / "texts")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSECLI_CACHE", str(folder / "cache"))
        yield path


@pytest.fixture(scope="module")
def finished(recipe_file: Path) -> tuple[Path, Result]:
    """An uninterrupted run."""
    output = recipe_file.parent / "finished"
    result = run(load(str(recipe_file)), output=output)
    assert result is not None
    return output, result


@pytest.fixture
def tiny(recipe_file: Path) -> LoadedRecipe:
    return load(str(recipe_file))


# -- what a run leaves behind --------------------------------------------------------------------------------


def test_run_directory_is_complete(finished: tuple[Path, Result], tiny: LoadedRecipe) -> None:
    output, result = finished
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoints", "loss.png", "metrics.jsonl", "model", "recipe.yaml", "run.json", "tensorboard"
    ]  # fmt: skip
    assert [path.name for path in sorted((output / "checkpoints").iterdir())] == [
        "checkpoint-12",
        "checkpoint-8",
    ]
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    assert {"loss", "learning_rate", "held_out_nats", "balance"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.rglob("training_args.bin"))

    resolved = load(str(output / "recipe.yaml")).recipe
    assert resolved == tiny.recipe.model_copy(update={"output": str(output)})
    facts = json.loads((output / "run.json").read_text())
    assert facts["seed"] == 3
    assert facts["threads"] == torch.get_num_threads()
    assert facts["finished"] >= facts["started"]
    assert facts["result"]["held_out_nats"] == result.held_out_nats
    assert facts["versions"]["torch"] in torch.__version__


def test_metrics_have_a_row_for_every_log_and_evaluation(finished: tuple[Path, Result]) -> None:
    output, result = finished
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    logs, evaluations = ([row for row in rows if key in row] for key in ("loss", "held_out_nats"))
    assert [row["step"] for row in logs] == list(range(1, 13))
    assert [row["step"] for row in evaluations] == [6, 12]
    assert logs[6]["tokens"] - logs[5]["tokens"] <= 2 * 4 * 16
    assert logs[0]["tokens"] == 2 * 4 * 16
    assert [row["learning_rate"] for row in logs[:3]] == pytest.approx([0, 0.005, 0.01])  # warm-up of 2 steps
    assert logs[-1]["learning_rate"] < logs[3]["learning_rate"]
    assert all(row["tokens_per_second"] > 0 for row in logs)
    assert evaluations[-1]["held_out_nats"] == result.held_out_nats
    assert result.held_out_nats < logs[0]["loss"] < math.log(320) + 1


def test_final_model_gives_the_final_figures(finished: tuple[Path, Result], tiny: LoadedRecipe) -> None:
    output, result = finished
    model = ScalingTransformerForCausalLM.from_pretrained(output / "model").train()
    assert tiny.recipe.data
    corpus = pack(tiny.recipe.data)
    figures = evaluate(model, corpus.held_out.windows(16, 256), 1.0, batch_size=3)
    assert figures is not None
    assert figures.nats_per_token == pytest.approx(result.held_out_nats, abs=1e-5)
    evaluated = corpus.held_out.tokens[: len(corpus.held_out.tokens) // 16 * 16].tolist()
    text = corpus.tokenizer.decode(evaluated, skip_special_tokens=True)
    bits_per_token = figures.nats_per_token / math.log(2)
    assert result.bits_per_byte == pytest.approx(bits_per_token * len(evaluated) / len(text), abs=1e-5)
    assert model.training, "evaluate must put the model back"
    assert model.config.eos_token_id == corpus.tokenizer.eos_token_id


def test_same_seed_same_weights_other_seed_others(
    finished: tuple[Path, Result], recipe_file: Path, tmp_path: Path
) -> None:
    again = run(load(str(recipe_file), ["train.max_steps=12"]), output=tmp_path / "again")
    assert again is not None
    assert_same_run(tmp_path / "again", finished[0])
    run(load(str(recipe_file), ["seed=4", "train.max_steps=1"]), output=tmp_path / "other")
    first = run_directory.read_metrics(tmp_path / "other")[0]["loss"]
    assert first != run_directory.read_metrics(finished[0])[0]["loss"]


def test_dry_run_computes_and_writes_nothing(
    tiny: LoadedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "prepare", lambda data: pytest.fail("read the text"))
    assert run(tiny, output=tmp_path / "run", dry_run=True) is None
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr().out
    assert "1,536" in printed  # 12 steps of 2 batches of 4 windows of 16 tokens
    assert f"{tmp_path / 'run'}" in printed


def test_result_is_on_stdout_and_talk_is_not(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(load(str(recipe_file), ["train.max_steps=1"]), output=tmp_path / "run")
    assert result is not None
    captured = capsys.readouterr()
    assert f"{result.held_out_nats:.4f}" in captured.out
    assert "bits per byte" in captured.out
    assert "KL to the teacher" not in captured.out
    assert "—" not in captured.out
    assert str(tmp_path / "run" / "model") in captured.out
    assert "training: 1/1" in captured.err
    assert "train_runtime" not in captured.out + captured.err


def test_bfloat16_and_recomputation_train(recipe_file: Path, tmp_path: Path) -> None:
    result = run(
        load(str(recipe_file), ["train.bf16=true", "train.gradient_checkpointing=true", "train.max_steps=4"]),
        output=tmp_path / "run",
    )
    assert result is not None
    losses = [row["loss"] for row in run_directory.read_metrics(tmp_path / "run") if "loss" in row]
    assert losses[-1] < losses[0]
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}


@pytest.mark.parametrize("there", [True, False])
def test_bfloat16_is_left_out_where_it_would_be_imitated(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    there: bool,
) -> None:
    monkeypatch.setattr(trainer, "has_bfloat16", lambda device: there)
    losses = []
    for name, bf16 in (("wide", "false"), ("narrow", "true")):
        changes = [f"train.bf16={bf16}", "train.max_steps=2"]
        result = run(load(str(recipe_file), changes), output=tmp_path / name)
        assert result
        losses.append(result.held_out_nats)
    assert (losses[0] == losses[1]) is not there
    said = "train.bf16: this processor has no products in bfloat16; they are in float32, which is faster here"
    assert (said in capsys.readouterr().err.splitlines()) is not there


# -- stopping and going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 5, 7, 9])
def test_stopped_and_resumed_run_ends_bit_for_bit_the_same(
    finished: tuple[Path, Result], tiny: LoadedRecipe, tmp_path: Path, step: int
) -> None:
    """In the first epoch, at its end and in the second one, on and off the checkpoint grid."""
    output = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, send(signal.SIGTERM))
        with pytest.raises(Stopped, match=f"stopped at step {step} of 12") as stopped:
            run(tiny, output=output)
    assert stopped.value.exit_code == 75
    assert not (output / "model").exists()
    run(load(str(output / "recipe.yaml")), output=output, resume="auto")
    assert_same_run(output, finished[0])


def test_killed_run_goes_on_from_its_last_checkpoint(
    finished: tuple[Path, Result], tiny: LoadedRecipe, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 7, crash)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, output=output)
    assert run_directory.read_metrics(output)[-1]["step"] == 6
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')  # torn
    run(tiny, output=output, resume="auto")
    assert_same_run(output, finished[0])


def test_interrupt_ends_with_130_and_says_how_to_go_on(tiny: LoadedRecipe, tmp_path: Path) -> None:
    output = tmp_path / "run"
    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, send(signal.SIGINT))
        with pytest.raises(Stopped) as stopped:
            run(tiny, output=output)
    assert stopped.value.exit_code == 130
    assert f"sparsecli train {output}/recipe.yaml --resume auto" in stopped.value.message
    assert "\n" not in stopped.value.message
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("further", [1, 2])
def test_a_second_signal_leaves_the_checkpoint_to_be_written(
    finished: tuple[Path, Result],
    tiny: LoadedRecipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    further: int,
) -> None:
    """A third one does not; then nothing of it is there."""
    output, before = tmp_path / "run", loop.seal

    def interrupted(written: Path, *args: Any) -> Any:
        for _ in range(further if written.name == "checkpoint-5" else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return before(written, *args)

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, send(signal.SIGINT))
        patch.setattr(loop, "seal", interrupted)
        with pytest.raises(Stopped if further == 1 else KeyboardInterrupt):
            run(tiny, output=output)
    told = "stopping with a checkpoint after this step; a further signal ends at once, without it"
    assert capsys.readouterr().err.splitlines().count(told) == 1
    newest, skipped = checkpoint.newest_sound(output / "checkpoints")
    assert newest is not None
    assert (newest.name, skipped) == (f"checkpoint-{5 if further == 1 else 4}", [])
    run(tiny, output=output, resume="auto")
    assert_same_run(output, finished[0])


def test_signal_during_evaluation_cuts_it_short(
    finished: tuple[Path, Result], tiny: LoadedRecipe, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    before = loop.evaluate

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return before(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted)
        with pytest.raises(Stopped, match="stopped at step 6"):
            run(tiny, output=output)
    run(tiny, output=output, resume="auto")
    for name, tensor in weights(output).items():
        assert torch.equal(tensor, weights(finished[0])[name]), name


def test_signal_in_the_last_step_changes_nothing(
    finished: tuple[Path, Result], recipe_file: Path, tiny: LoadedRecipe, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 12, send(signal.SIGTERM))
        result = run(tiny, output=tmp_path / "run")
    assert result is not None
    assert result.held_out_nats == finished[1].held_out_nats
    assert_same_run(tmp_path / "run", finished[0])

    short = load(str(recipe_file), ["train.max_steps=2"])  # not a multiple of eval_steps
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, send(signal.SIGTERM))
        result = run(short, output=tmp_path / "short")
    assert result is not None
    assert run_directory.read_metrics(tmp_path / "short")[-1]["held_out_nats"] == result.held_out_nats


def test_signal_in_the_last_evaluation_only_puts_it_off(
    finished: tuple[Path, Result], tiny: LoadedRecipe, tmp_path: Path
) -> None:
    output, before, sent = tmp_path / "run", loop.evaluate, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if (output / "checkpoints" / "checkpoint-8").exists() and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return before(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted)
        result = run(tiny, output=output)
    assert sent
    assert result is not None
    assert result.held_out_nats == finished[1].held_out_nats
    assert_same_run(output, finished[0])


def test_run_killed_in_its_last_evaluation_does_that_again(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, before = load(str(recipe_file), ["train.max_steps=2"]), loop.evaluate

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        """Put off after the last step, killed once the model is there."""
        os.kill(os.getpid(), signal.SIGINT)
        return before(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(short, output=tmp_path / "run")
    assert (tmp_path / "run" / "model").is_dir()
    monkeypatch.setattr(trainer.LanguageModelTrainer, "train", lambda *args, **kwargs: pytest.fail("trained"))
    result = run(short, output=tmp_path / "run", resume="auto")
    assert result is not None
    *_, logged, evaluated = run_directory.read_metrics(tmp_path / "run")
    assert evaluated["held_out_nats"] == result.held_out_nats
    assert (evaluated["step"], evaluated["tokens"]) == (2, logged["tokens"])


def test_run_killed_before_its_model_was_written_only_writes_it(
    finished: tuple[Path, Result], tiny: LoadedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.LanguageModelTrainer, "save_model", _crash_outside_checkpoints)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, output=output)
    assert not (output / "model").exists()
    monkeypatch.setattr(trainer.LanguageModelTrainer, "train", lambda *args, **kwargs: pytest.fail("trained"))
    result = run(tiny, output=output, resume="auto")
    assert result is not None
    assert result.held_out_nats == finished[1].held_out_nats
    assert_same_run(output, finished[0])


_save_model = trainer.LanguageModelTrainer.save_model


def _crash_outside_checkpoints(self: Any, folder: str, **kwargs: Any) -> None:
    if folder.endswith("model.tmp"):
        crash()
    _save_model(self, folder, **kwargs)


def test_finished_run_says_so(
    finished: tuple[Path, Result], tiny: LoadedRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished[0] / "run.json").read_bytes()
    assert run(tiny, output=finished[0], resume="auto") == finished[1]
    assert "this run is finished" in capsys.readouterr().err
    assert (finished[0] / "run.json").read_bytes() == before


def test_finished_run_without_its_model_writes_it_again(
    finished: tuple[Path, Result], tiny: LoadedRecipe, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished[0], output, ignore=shutil.ignore_patterns("model"))
    assert run(tiny, output=output, resume="auto") is not None
    assert_same_run(output, finished[0])


def test_the_first_process_prepares_the_text(
    tiny: LoadedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    @contextmanager
    def first(self: TrainingArguments, *args: Any, **kwargs: Any) -> Iterator[None]:
        events.append("turn")
        yield
        events.append("the others' turn")

    def prepare(data: Any) -> Any:
        events.append("prepared")
        return preparation.prepare(data)

    monkeypatch.setattr(TrainingArguments, "main_process_first", first)
    monkeypatch.setattr(trainer, "prepare", prepare)
    monkeypatch.setattr(trainer, "set_seed", lambda seed: events.append("training") or crash())
    with pytest.raises(KeyboardInterrupt):
        run(tiny, output=tmp_path / "run")
    assert events == ["turn", "prepared", "the others' turn", "training"]


@pytest.mark.parametrize("kind", ["pairs", "windows"])
def test_a_process_that_goes_on_within_an_epoch_keeps_its_order(kind: str) -> None:
    """As the Trainer does it: the callback, a loader that skips what was seen, then the number of the epoch."""
    numbers = list(range(64))

    def loader() -> Any:
        pairs = SimilarLengths(np.array(numbers) % 7, batch_size=2, seed=0)
        sampler = pairs if kind == "pairs" else RandomSampler(numbers)
        plain = DataLoader(numbers, batch_size=2, sampler=sampler, drop_last=True)
        return prepare_data_loader(
            plain, num_processes=2, process_index=1, use_seedable_sampler=True, data_seed=3
        )

    def batches(loader: Any, epoch: int) -> list[list[int]]:
        loader.set_epoch(epoch)
        return [batch.tolist() for batch in loader]

    whole, again = loader(), loader()
    first, second = batches(whole, 0), batches(whole, 1)
    assert first != second
    state = TrainerState(epoch=1 + 4 / len(second))
    loop.OrderOfEpoch().on_epoch_begin(None, state, None, train_dataloader=again)
    assert batches(skip_first_batches(again, 4), 1) == second[4:]


@pytest.mark.slow
def test_two_processes_train_one_model(recipe_file: Path, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("sparsecli")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(program), "train"]
    command += [str(recipe_file), "train.max_steps=5", "--output", str(tmp_path / "run")]
    # An empty cache, so that there is something to announce.
    new = {**os.environ, "SPARSECLI_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, check=True, timeout=300, stderr=subprocess.PIPE, text=True, env=new)
    for said in ("training a tokenizer", "packing", "training: 5/5", "step 5: held out nats"):
        assert done.stderr.count(said) == 1, done.stderr

    # What is left when the processes are killed in the evaluation after the last step.
    shutil.rmtree(tmp_path / "run" / "model")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    (tmp_path / "run" / "model.tmp").mkdir()
    subprocess.run([*command, "--resume", "auto"], check=True, timeout=300)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["processes"] == 2
    rows = run_directory.read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 6))
    assert rows[0]["tokens"] == 2 * 2 * 4 * 16
    found, skipped = checkpoint.newest_sound(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert not skipped
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in found.iterdir()}
    assert not (tmp_path / "run" / "model.tmp").exists()
    model, tokenizer = load_model(tmp_path / "run" / "model")
    data = load(str(recipe_file)).recipe.data
    assert data
    held_out = pack(data).held_out.windows(16, 256)
    figures = evaluate(model, held_out, held_out.bytes_per_token(tokenizer))
    assert figures is not None
    assert figures.nats_per_token == pytest.approx(facts["result"]["held_out_nats"], abs=1e-5)
    assert figures.bits_per_byte == pytest.approx(facts["result"]["bits_per_byte"], abs=1e-5)
    assert rows[-1]["held_out_nats"] == facts["result"]["held_out_nats"]


# -- damaged checkpoints -------------------------------------------------------------------------------------


@pytest.fixture
def stopped_run(tiny: LoadedRecipe, tmp_path: Path) -> Path:
    """A run stopped at step 9, with checkpoints 8 and 9."""
    output = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 9, send(signal.SIGTERM))
        with pytest.raises(Stopped):
            run(tiny, output=output)
    return output


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "changed":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("file", "how", "reason"),
    [
        ("optimizer.pt", "truncated", "optimizer.pt has .* bytes, not"),
        ("model.safetensors", "changed", "model.safetensors is not what was written"),
        ("rng_state.pth", "missing", "rng_state.pth is missing"),
        ("manifest.json", "missing", "no manifest.json: it was not written to the end"),
        ("manifest.json", "truncated", "manifest.json cannot be used"),
    ],
)
def test_damaged_checkpoint_is_skipped_with_its_reason(
    stopped_run: Path, file: str, how: str, reason: str
) -> None:
    damage(stopped_run / "checkpoints" / "checkpoint-9" / file, how)
    found, skipped = checkpoint.newest_sound(stopped_run / "checkpoints")
    assert found is not None
    assert found.name == "checkpoint-8"
    assert len(skipped) == 1
    assert re.match(f"checkpoint-9: {reason}", skipped[0])


def test_resume_past_a_damaged_checkpoint_ends_the_same(
    finished: tuple[Path, Result],
    stopped_run: Path,
    tiny: LoadedRecipe,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(stopped_run / "checkpoints" / "checkpoint-9" / "optimizer.pt", "truncated")
    run(tiny, output=stopped_run, resume="auto")
    assert "skipped checkpoint-9: optimizer.pt" in capsys.readouterr().err
    assert_same_run(stopped_run, finished[0])


def test_no_whole_checkpoint_left_is_a_failure(stopped_run: Path, tiny: LoadedRecipe) -> None:
    for folder in (stopped_run / "checkpoints").iterdir():
        damage(folder / "model.safetensors", "truncated")
    with pytest.raises(Failure, match="none of its checkpoints is whole"):
        run(tiny, output=stopped_run, resume="auto")


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.max_steps=20", r"train\.max_steps \(12 then, 20 now\)"),
        ("model.d_model=32", r"model\.d_model \(16 then, 32 now\)"),
        ("data.sequence_length=8", r"data\.sequence_length \(16 then, 8 now\)"),
        ("seed=1", r"seed \(3 then, 1 now\)"),
    ],
)
def test_another_recipe_cannot_resume(
    finished: tuple[Path, Result], recipe_file: Path, override: str, key: str
) -> None:
    with pytest.raises(Failure, match=f"cannot be resumed with another recipe: {key};"):
        run(load(str(recipe_file), [override]), output=finished[0], resume="auto")


def test_changed_text_cannot_resume(stopped_run: Path, recipe_file: Path, tmp_path: Path) -> None:
    extra = recipe_file.parent / "texts" / "extra.txt"
    extra.write_text("some text that was not there before")
    try:
        with pytest.raises(Failure, match="the text or its tokenizer is not what this run was started with"):
            run(load(str(recipe_file)), output=stopped_run, resume="auto")
    finally:
        extra.unlink()


def test_taken_output_is_left_alone(
    finished: tuple[Path, Result], tiny: LoadedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "prepare", lambda data: pytest.fail("read the text"))
    with pytest.raises(Failure, match=r"already holds a run; go on with --resume auto"):
        run(tiny, output=finished[0])
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(Failure, match="is not empty and holds no run"):
        run(tiny, output=tmp_path, resume="auto")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_unwritable_output_is_found_before_anything_is_read(
    tiny: LoadedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "prepare", lambda data: pytest.fail("read the text"))
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match=r"file/run: cannot be written: .*file: Not a directory") as caught:
        run(tiny, output=tmp_path / "file" / "run")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("model.safetensors", "File too large"),
        ("optimizer.pt", "not all of it could be written, as on a full disk"),
    ],
)
def test_full_disk_is_one_line_and_the_run_goes_on(
    finished: tuple[Path, Result], tiny: LoadedRecipe, tmp_path: Path, file: str, reason: str
) -> None:
    output = tmp_path / "run"
    size = (finished[0] / "checkpoints" / "checkpoint-12" / file).stat().st_size
    before = loop.LanguageModelTrainer._save_checkpoint

    def save_checkpoint(self: Any, *args: Any) -> None:
        if self.state.global_step < 8:
            before(self, *args)
        else:
            with files_up_to(size - 1):
                before(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.LanguageModelTrainer, "_save_checkpoint", save_checkpoint)
        with pytest.raises(Failure, match=f"{reason}; once that is mended, go on with: spa") as caught:
            run(tiny, output=output)
    assert "\n" not in caught.value.message
    assert not (output / "model").exists()
    found, skipped = checkpoint.newest_sound(output / "checkpoints")
    assert (found, skipped) == (output / "checkpoints" / "checkpoint-4", [])
    run(tiny, output=output, resume="auto")
    assert_same_run(output, finished[0])


def test_full_disk_leaves_no_half_written_model(
    finished: tuple[Path, Result], tiny: LoadedRecipe, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished[0], output, ignore=shutil.ignore_patterns("model"))
    with (
        files_up_to((finished[0] / "model" / "model.safetensors").stat().st_size - 1),
        pytest.raises(Failure, match="File too large; once that is mended, go on with: sparsecli train"),
    ):
        run(tiny, output=output, resume="auto")
    assert not (output / "model").exists()
    run(tiny, output=output, resume="auto")
    assert_same_run(output, finished[0])


def test_vocabulary_must_hold_the_tokenizer(recipe_file: Path, tmp_path: Path) -> None:
    assert load(str(recipe_file)).recipe.data
    corpus = pack(load(str(recipe_file)).recipe.data)  # type: ignore[arg-type]
    corpus.tokenizer.save_pretrained(tmp_path / "tokenizer")
    overrides = [
        f"data.tokenizer={{kind: saved, path: {tmp_path / 'tokenizer'}}}",
        "model.vocabulary.size=258",
    ]
    with pytest.raises(RecipeError, match=r"model\.vocabulary\.size: 258 is less than the .* tokens"):
        run(load(str(recipe_file), overrides), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_too_little_text_for_a_batch(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"training windows of 16 tokens do not fill a batch of 5000"):
        run(load(str(recipe_file), ["train.per_device_train_batch_size=5000"]), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_blocks_and_unknown_resume(recipe_file: Path, tiny: LoadedRecipe, tmp_path: Path) -> None:
    text = recipe_file.read_text()
    (tmp_path / "bare.yaml").write_text(text[: text.index("train:")])
    with pytest.raises(RecipeError, match="needs a `train:` block"):
        run(load(str(tmp_path / "bare.yaml")), output=tmp_path / "run")
    with pytest.raises(Failure, match="--resume yes: expected auto") as caught:
        run(tiny, output=tmp_path / "run", resume="yes")
    assert caught.value.exit_code == 2


def test_loss_that_is_not_a_number_stops_the_run(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"the loss is nan at step \d+; lower train\.learning_rate"):
        run(
            load(str(recipe_file), ["train.learning_rate=1e30", "train.max_grad_norm=0"]),
            output=tmp_path / "run",
        )


# -- the parts -----------------------------------------------------------------------------------------------


def tiny_model(**fields: Any) -> ScalingTransformerForCausalLM:
    spec = {
        "d_model": 8,
        "layers": 2,
        "heads": 2,
        "max_positions": 16,
        "feed_forward": {"kind": "sparse", "d_ff": 16, "block_size": 4, "rank": 2},
        "vocabulary": {"kind": "dense", "size": 50},
        **fields,
    }
    torch.manual_seed(0)
    return ScalingTransformerForCausalLM(ScalingTransformerConfig.from_spec(ModelSpec.model_validate(spec)))


def stream(tokens: int) -> TokenStream:
    return TokenStream(torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(1)).numpy())


def test_evaluation_is_the_mean_over_predicted_tokens() -> None:
    model, windows = tiny_model().eval(), stream(16 * 5).windows(16)
    figures = evaluate(model, windows, 1.0, batch_size=2)  # the last batch is smaller
    tokens = torch.stack([windows[index]["input_ids"] for index in range(5)])
    with torch.no_grad():
        predicted = model(tokens).logits[:, :-1].log_softmax(-1)
    expected = -predicted.gather(-1, tokens[:, 1:, None]).mean().item()
    assert figures is not None
    assert figures.nats_per_token == pytest.approx(expected, abs=1e-5)
    assert figures.bits_per_byte == pytest.approx(expected / math.log(2), abs=1e-5)
    assert figures.tokens == 5 * 15


def test_evaluation_splits_over_processes() -> None:
    model, windows = tiny_model(), stream(16 * 7).windows(16)
    whole = evaluate(model, windows, 2.0, batch_size=2)
    collected: list[list[torch.Tensor]] = [[], []]
    for rank in range(2):
        evaluate(
            model, windows, 2.0, batch_size=2, rank=rank, ranks=2,
            add_up=lambda sums, to=collected[rank]: to.append(sums) or sums,
        )  # fmt: skip
    sums = [first + second for first, second in zip(*collected, strict=True)]
    assert whole is not None
    assert (sums[0][0] / sums[0][1]).item() == pytest.approx(whole.nats_per_token, abs=1e-6)
    assert sums[0][1] == whole.tokens
    assert torch.cat(sums[1:]).eq(0).double().mean().item() == pytest.approx(whole.never_chosen)


def test_never_chosen_and_balance_count_the_choices() -> None:
    model, windows = tiny_model(), stream(16 * 4).windows(16)
    for block in model.model.blocks:
        controller = block.feed_forward.controller
        torch.nn.init.zeros_(controller.first)
        with torch.no_grad():
            controller.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]).repeat(4))
    figures = evaluate(model, windows, 1.0)
    assert figures is not None
    assert (figures.never_chosen, figures.balance) == (0.75, 0.0)
    assert not any(block.feed_forward.controller._forward_hooks for block in model.model.blocks)

    dense = tiny_model(feed_forward={"kind": "dense", "d_ff": 16})
    figures = evaluate(dense, windows, 1.0)
    assert figures is not None
    assert (figures.never_chosen, figures.balance) == (None, None)


def test_evaluation_draws_no_random_number() -> None:
    model = tiny_model(dropout=0.5).train()
    state = torch.get_rng_state()
    evaluate(model, stream(64).windows(16), 1.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_weight_decay_spares_what_is_no_matrix_of_the_network(positions: str) -> None:
    model = tiny_model(positions=positions)
    names = loop.LanguageModelTrainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    assert names
    assert all(name.endswith((".weight", "feed_forward.up", "feed_forward.down")) for name in names)
    assert not [name for name in names if "controller" in name or "embedding" in name or "norm" in name]
    assert any("attention" in name for name in names)
    assert "model.blocks.0.feed_forward.up" in names
    mixture = tiny_model(feed_forward={"kind": "mixture", "d_ff": 16, "experts": 4})
    names = loop.LanguageModelTrainer.get_decay_parameter_names(None, mixture)  # type: ignore[arg-type]
    assert not [name for name in names if "router" in name]


@pytest.mark.parametrize(
    ("schedule", "name"),
    [("cosine", "cosine_with_min_lr"), ("linear", "linear"), ("inverse_sqrt", "inverse_sqrt")],
)
def test_schedules_by_their_recipe_names(
    tiny: LoadedRecipe, tmp_path: Path, schedule: str, name: str
) -> None:
    assert tiny.recipe.train
    train = tiny.recipe.train.model_copy(update={"lr_scheduler_type": schedule, "min_lr_rate": 0.25})
    arguments = loop.training_arguments(train, 5, tmp_path)
    assert arguments.lr_scheduler_type == name
    assert (arguments.lr_scheduler_kwargs or {}).get("min_lr_rate") == (
        0.25 if schedule == "cosine" else None
    )
    assert (arguments.seed, arguments.data_seed) == (5, 5)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (2, 10, 4, 30):
        written = tmp_path / ".unfinished" / f"checkpoint-{step}"
        written.mkdir(parents=True)
        (written / "weights").write_text(str(step))
        checkpoint.seal(written, tmp_path, keep=2)
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-10", "checkpoint-30"]
    assert checkpoint.newest_sound(tmp_path) == (tmp_path / "checkpoint-30", [])
