"""Training that is stopped and goes on, from whole checkpoints and past damaged ones."""

from __future__ import annotations

import json
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
from small_runs import Killed, assert_same_run, at_step, crash, send, weights
from torch.utils.data import DataLoader, RandomSampler
from transformers import TrainerState, TrainingArguments

from sparsecli.console import Failure, Stopped
from sparsecli.data import preparation
from sparsecli.data.ordering import SimilarLengths
from sparsecli.data.packing import pack
from sparsecli.model.layers.feed_forward import SparseFeedForward
from sparsecli.model.loading import load_model
from sparsecli.recipe.loader import LoadedRecipe, load
from sparsecli.recipe.training import TrainSpec
from sparsecli.train import checkpoint, command, profile, run_directory, trainer
from sparsecli.train.command import Result, run
from sparsecli.train.evaluation import evaluate

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
        with pytest.raises(Killed):
            run(tiny, output=output)
    assert run_directory.read_metrics(output)[-1]["step"] == 6
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')  # torn
    run(tiny, output=output, resume="auto")
    assert_same_run(output, finished[0])


def test_stages_and_explored_tokens_are_those_of_an_uninterrupted_run(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All units of a block at first, then half as many at each stage; evaluations always use the model's own k."""
    changes = ["train.start_units_per_block=4", "train.max_steps=8", "train.eval_steps=2"]
    sparse = ["hard_fraction=1.0", "explored_fraction=0.5"]
    staged = load(str(recipe_file), changes + [f"model.feed_forward.{change}" for change in sparse])
    used: dict[bool, list[int]] = {True: [], False: []}
    forward = SparseFeedForward.forward

    def noted(layer: SparseFeedForward, x: torch.Tensor) -> torch.Tensor:
        used[layer.training].append(layer.units_per_block)
        return forward(layer, x)

    monkeypatch.setattr(SparseFeedForward, "forward", noted)
    run(staged, output=tmp_path / "whole")
    assert used[True] == [4] * 8 + [2] * 8 + [1] * 16  # of 2 layers, 2 batches a step
    assert set(used[False]) == {1}
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, send(signal.SIGTERM))
        with pytest.raises(Stopped):
            run(staged, output=tmp_path / "run")
    run(staged, output=tmp_path / "run", resume="auto")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_line_of_the_log_is_the_mean_of_as_many_steps(recipe_file: Path, tmp_path: Path, how: str) -> None:
    """Also that of the steps before and behind a checkpoint that lies between two lines."""
    every_five = load(str(recipe_file), ["train.logging_steps=5"])
    run(every_five, output=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 9, crash if how == "killed" else send(signal.SIGTERM))
        with pytest.raises(Killed if how == "killed" else Stopped):
            run(every_five, output=tmp_path / "run")
    run(every_five, output=tmp_path / "run", resume="auto")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_checkpoint_of_an_earlier_version_has_no_sums(
    finished: tuple[Path, Result], tiny: LoadedRecipe, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 6, crash)
        with pytest.raises(Killed):
            run(tiny, output=output)
    newest = output / "checkpoints" / "checkpoint-4"
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest[trainer.SUMS]
    (newest / "manifest.json").write_text(json.dumps(manifest, indent=1))
    (newest / trainer.SUMS).unlink()
    run(tiny, output=output, resume="auto")
    assert_same_run(output, finished[0])


def test_what_a_kill_left_in_the_last_checkpoint_goes(
    finished: tuple[Path, Result], tiny: LoadedRecipe, tmp_path: Path
) -> None:
    """Killed when it was in its place, but neither its workplace nor what it replaces was deleted."""
    output = tmp_path / "run"

    def killed(*arguments: object) -> None:
        if (output / "checkpoints" / "checkpoint-12").exists():
            crash()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "prune", killed)
        with pytest.raises(Killed):
            run(tiny, output=output)
    places = {"checkpoint-4", "checkpoint-8", "checkpoint-12"}
    assert {path.name for path in (output / "checkpoints").iterdir()} == places | {".unfinished"}
    run(tiny, output=output, resume="auto")
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"checkpoint-8", "checkpoint-12"}
    assert_same_run(output, finished[0])


def test_a_run_stops_after_a_time_and_ends_the_same(
    tiny: LoadedRecipe, finished: tuple[Path, Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does measuring its steps change a run."""
    output = tmp_path / "run"
    with pytest.raises(
        Stopped, match=r"stopped at step 1 of 12 .*: sparsecli train \S*recipe.yaml --resume auto"
    ) as at:
        run(tiny, output=output, stop_after=1e-6)
    assert at.value.exit_code == 75
    run(tiny, output=output, resume="auto", stop_after=3600, profile=True)
    assert_same_run(output, finished[0])
    table = capsys.readouterr().out
    assert "a step, mean of 9" in table
    shares = dict(re.findall(r"^ *(\w[\w -]*?) +[\d.]+ +([\d.]+)%", table, flags=re.MULTILINE))
    assert list(shares) == [*profile.PARTS, "step"]
    assert sum(map(float, shares.values())) == pytest.approx(200, abs=0.5)
    assert min(float(shares[part]) for part in profile.PARTS[:5]) > 0


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
    output, before = tmp_path / "run", trainer.seal

    def interrupted(written: Path, *args: Any) -> Any:
        for _ in range(further if written.name == "checkpoint-5" else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return before(written, *args)

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, send(signal.SIGINT))
        patch.setattr(trainer, "seal", interrupted)
        with pytest.raises(Stopped):
            run(tiny, output=output)
    told = "stopping after this step with a checkpoint; another signal stops at once, without the checkpoint"
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
    before = trainer.evaluate

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return before(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "evaluate", interrupted)
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
    assert result.held_out_loss == finished[1].held_out_loss
    assert_same_run(tmp_path / "run", finished[0])

    short = load(str(recipe_file), ["train.max_steps=2"])  # not a multiple of eval_steps
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, send(signal.SIGTERM))
        result = run(short, output=tmp_path / "short")
    assert result is not None
    assert run_directory.read_metrics(tmp_path / "short")[-1]["held_out_loss"] == result.held_out_loss


def test_signal_in_the_last_evaluation_only_puts_it_off(
    finished: tuple[Path, Result], tiny: LoadedRecipe, tmp_path: Path
) -> None:
    output, before, sent = tmp_path / "run", trainer.evaluate, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if (output / "checkpoints" / "checkpoint-8").exists() and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return before(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "evaluate", interrupted)
        result = run(tiny, output=output)
    assert sent
    assert result is not None
    assert result.held_out_loss == finished[1].held_out_loss
    assert_same_run(output, finished[0])


def test_run_killed_in_its_last_evaluation_does_that_again(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, before = load(str(recipe_file), ["train.max_steps=2"]), trainer.evaluate

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        """Put off after the last step, killed once the model is there."""
        os.kill(os.getpid(), signal.SIGINT)
        return before(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "evaluate", interrupted)
        with pytest.raises(Stopped, match="interrupted; resume with"):
            run(short, output=tmp_path / "run")
    assert (tmp_path / "run" / "model").is_dir()
    monkeypatch.setattr(command.LanguageModelTrainer, "train", lambda *args, **kwargs: pytest.fail("trained"))
    result = run(short, output=tmp_path / "run", resume="auto")
    assert result is not None
    *_, logged, evaluated = run_directory.read_metrics(tmp_path / "run")
    assert evaluated["held_out_loss"] == result.held_out_loss
    assert (evaluated["step"], evaluated["tokens"]) == (2, logged["tokens"])


def test_run_killed_before_its_model_was_written_only_writes_it(
    finished: tuple[Path, Result], tiny: LoadedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.LanguageModelTrainer, "save_model", _crash_outside_checkpoints)
        with pytest.raises(Killed):
            run(tiny, output=output)
    assert not (output / "model").exists()
    monkeypatch.setattr(command.LanguageModelTrainer, "train", lambda *args, **kwargs: pytest.fail("trained"))
    result = run(tiny, output=output, resume="auto")
    assert result is not None
    assert result.held_out_loss == finished[1].held_out_loss
    assert_same_run(output, finished[0])


_save_model = command.LanguageModelTrainer.save_model


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
    monkeypatch.setattr(command, "prepare", prepare)
    monkeypatch.setattr(command, "set_seed", lambda seed: events.append("training") or crash())
    with pytest.raises(Killed):
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
    trainer.OrderOfEpoch().on_epoch_begin(None, state, None, train_dataloader=again)
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
    assert figures.nats_per_token == pytest.approx(facts["result"]["held_out_loss"], abs=1e-5)
    assert figures.bits_per_byte == pytest.approx(facts["result"]["bits_per_byte"], abs=1e-5)
    assert rows[-1]["held_out_loss"] == facts["result"]["held_out_loss"]


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
        ("model.safetensors", "changed", "model.safetensors has changed since it was written"),
        ("rng_state.pth", "missing", "rng_state.pth is missing"),
        ("manifest.json", "missing", "no manifest.json: it was not written completely"),
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
    with pytest.raises(Failure, match="all of its checkpoints are damaged"):
        run(tiny, output=stopped_run, resume="auto")


@pytest.mark.parametrize(
    ("content", "number"),
    [
        (b'{"step": 1, "loss": 2.0}\n\xff\n', 2),
        (b"[]\n", 1),
        (b'{"loss": 2.0}\n', 1),
        (b'{"step": "1"}\n', 1),
        (b'{"step": 1, "loss": null}\n{"step": 2', 1),
    ],
)
def test_damaged_metrics_are_one_line(
    stopped_run: Path, tiny: LoadedRecipe, content: bytes, number: int
) -> None:
    (stopped_run / "metrics.jsonl").write_bytes(content)
    with pytest.raises(Failure, match=rf"metrics\.jsonl:{number}: is not a row of metrics; delete the line"):
        run(tiny, output=stopped_run, resume="auto")


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff", b'{"result": 5}', b'{"result": {"x": 1}}'])
def test_damaged_facts_are_one_line(stopped_run: Path, tiny: LoadedRecipe, content: bytes) -> None:
    (stopped_run / "run.json").write_bytes(content)
    with pytest.raises(Failure, match=r"run\.json: .*; delete it to continue without it") as caught:
        run(tiny, output=stopped_run, resume="auto")
    assert "\n" not in caught.value.message


# -- another run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (
            "train.max_steps=20",
            r"train\.max_steps \(12 then, 20 now\), which determines the learning rate of every step",
        ),
        ("train.weight_decay=0.2", r"train\.weight_decay \(0\.1 then, 0\.2 now\)"),
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


def test_what_changes_no_step_may_change(
    finished: tuple[Path, Result], stopped_run: Path, recipe_file: Path
) -> None:
    changed = ["train.per_device_eval_batch_size=3", "train.logging_steps=2", "train.save_steps=5"]
    changed += ["train.eval_steps=11", "train.save_total_limit=3", "train.eval_samples=1"]
    run(load(str(recipe_file), changed), output=stopped_run, resume="auto")
    for name, tensor in weights(stopped_run).items():
        assert torch.equal(tensor, weights(finished[0])[name]), name
    rows = run_directory.read_metrics(stopped_run)
    assert [row["step"] for row in rows if "loss" in row] == [*range(1, 10), 10, 12]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [6, 11, 12]
    assert {path.name for path in (stopped_run / "checkpoints").iterdir()} == {
        f"checkpoint-{step}" for step in (9, 10, 12)
    }


def test_a_run_becomes_longer_where_no_step_depends_on_their_number(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def steps(number: int, *more: str) -> LoadedRecipe:
        constant = ["train.lr_scheduler_type=constant_with_warmup", f"train.max_steps={number}", *more]
        return load(str(recipe_file), constant)

    run(steps(4), output=tmp_path / "run")
    run(steps(7), output=tmp_path / "run", resume="auto")
    run(steps(7), output=tmp_path / "whole")
    curves = [
        [(row["step"], row["loss"]) for row in run_directory.read_metrics(tmp_path / name) if "loss" in row]
        for name in ("run", "whole")
    ]
    assert curves[0] == curves[1]
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, weights(tmp_path / "whole")[name]), name
    assert json.loads((tmp_path / "run" / "run.json").read_text())["result"]["steps"] == 7
    assert load(str(tmp_path / "run" / "recipe.yaml")).recipe.train.max_steps == 7  # type: ignore[union-attr]
    with pytest.raises(Failure, match=r"another recipe: train\.max_steps \(7 then, 5 now\); resume with"):
        run(steps(5), output=tmp_path / "run", resume="auto")


def test_stages_of_a_distillation_depend_on_the_number_of_steps() -> None:
    distillation = {"teacher": "x", "start_units_per_block": 8}
    fields = {"max_steps": 3, "lr_scheduler_type": "constant"}
    assert TrainSpec(**fields).bound_to_max_steps is None
    for staged in ({"distillation": distillation}, {"start_units_per_block": 8}):
        assert TrainSpec(**fields, **staged).bound_to_max_steps == "the number of chosen units"


def test_another_number_of_examples_in_a_step_cannot_resume(
    stopped_run: Path, recipe_file: Path, tiny: LoadedRecipe
) -> None:
    facts = run_directory.read_facts(stopped_run)
    run_directory.write_facts(stopped_run, {**facts, "processes": 2})
    expected = (
        "cannot be resumed with another number of examples in a step: 16 then (4 x 2 x 2 processes), "
        "8 now (4 x 2 x 1 processes); change train.per_device_train_batch_size or "
        "train.gradient_accumulation_steps (train.per_device_train_batch_size=8 gives as many)"
    )
    with pytest.raises(Failure, match=re.escape(expected)):
        run(tiny, output=stopped_run, resume="auto")
    run_directory.write_facts(stopped_run, facts)
    other = load(str(recipe_file), ["train.gradient_accumulation_steps=3"])
    with pytest.raises(
        Failure, match=re.escape("8 then (4 x 2 x 1 processes), 12 now (4 x 3 x 1 processes)")
    ):
        run(other, output=stopped_run, resume="auto")


def test_a_step_of_equally_many_examples_resumes(recipe_file: Path, tmp_path: Path) -> None:
    """The same steps, however batches share the examples, also beyond the end of an epoch."""
    still = ["model.dropout=0", "model.feed_forward.hard_fraction=1", "model.feed_forward.temperature=0"]
    stop, whole, halves = tmp_path / "stop", ["train.per_device_train_batch_size=8"], tmp_path / "halves"
    run(load(str(recipe_file), still), output=halves)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, send(signal.SIGTERM))
        with pytest.raises(Stopped):
            run(load(str(recipe_file), still), output=stop)
    run(
        load(str(recipe_file), [*still, *whole, "train.gradient_accumulation_steps=1"]),
        output=stop,
        resume="auto",
    )
    losses = [
        [row["loss"] for row in run_directory.read_metrics(run) if "loss" in row] for run in (stop, halves)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_checkpoints_of_deepspeed_are_told_from_others(stopped_run: Path, tiny: LoadedRecipe) -> None:
    (stopped_run / "checkpoints" / "checkpoint-9" / "latest").write_text("global_step9")
    with pytest.raises(Failure, match="checkpoint-9: a checkpoint of DeepSpeed cannot be read by others"):
        run(tiny, output=stopped_run, resume="auto")


def test_changed_text_cannot_resume(stopped_run: Path, recipe_file: Path, tmp_path: Path) -> None:
    extra = recipe_file.parent / "texts" / "extra.txt"
    extra.write_text("some text that was not there before")
    try:
        with pytest.raises(Failure, match="the text or its tokenizer has changed since this run was started"):
            run(load(str(recipe_file)), output=stopped_run, resume="auto")
    finally:
        extra.unlink()
