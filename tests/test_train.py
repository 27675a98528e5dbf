"""Training: what a run leaves behind, and how it fails."""

from __future__ import annotations

import json
import math
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import assert_same_run, files_up_to, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from sparsecli.console import Failure, RecipeError, Stopped
from sparsecli.data.packing import pack
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.recipe.loader import LoadedRecipe, load
from sparsecli.train import checkpoint, command, journal, run_directory, trainer
from sparsecli.train.command import Result, run
from sparsecli.train.evaluation import evaluate

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
    assert {"loss", "learning_rate", "held_out_loss", "balance"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.rglob("training_args.bin"))

    resolved = load(str(output / "recipe.yaml")).recipe
    assert resolved == tiny.recipe.model_copy(update={"output": str(output)})
    facts = json.loads((output / "run.json").read_text())
    assert facts["seed"] == 3
    assert facts["threads"] == torch.get_num_threads()
    assert facts["finished"] >= facts["started"]
    assert facts["result"]["held_out_loss"] == result.held_out_loss
    assert facts["versions"]["torch"] in torch.__version__


def test_metrics_have_a_row_for_every_log_and_evaluation(finished: tuple[Path, Result]) -> None:
    output, result = finished
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    logs, evaluations = ([row for row in rows if key in row] for key in ("loss", "held_out_loss"))
    assert [row["step"] for row in logs] == list(range(1, 13))
    assert [row["step"] for row in evaluations] == [6, 12]
    assert logs[6]["tokens"] - logs[5]["tokens"] <= 2 * 4 * 16
    assert logs[0]["tokens"] == 2 * 4 * 16
    assert [row["learning_rate"] for row in logs[:3]] == pytest.approx([0, 0.005, 0.01])  # warm-up of 2 steps
    assert logs[-1]["learning_rate"] < logs[3]["learning_rate"]
    assert all(row["tokens_per_second"] > 0 for row in logs)
    assert evaluations[-1]["held_out_loss"] == result.held_out_loss
    assert result.held_out_loss < logs[0]["loss"] < math.log(320) + 1


def test_final_model_gives_the_final_figures(finished: tuple[Path, Result], tiny: LoadedRecipe) -> None:
    output, result = finished
    model = ScalingTransformerForCausalLM.from_pretrained(output / "model").train()
    assert tiny.recipe.data
    corpus = pack(tiny.recipe.data)
    figures = evaluate(model, corpus.held_out.windows(16, 256), 1.0, batch_size=3)
    assert figures is not None
    assert figures.nats_per_token == pytest.approx(result.held_out_loss, abs=1e-5)
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
    monkeypatch.setattr(command, "prepare", lambda data: pytest.fail("read the text"))
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
    assert f"{result.held_out_loss:.4f}" in captured.out
    assert "bits per byte" in captured.out
    assert "KL to the teacher" not in captured.out
    assert "—" not in captured.out
    assert str(tmp_path / "run" / "model") in captured.out
    assert "training: 1/1" in captured.err
    assert captured.err.count("evaluating the trained model") == 1
    assert "train_runtime" not in captured.out + captured.err


def test_saved_tokenizer_knows_the_longest_text(finished: tuple[Path, Result], tiny: LoadedRecipe) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished[0] / "model")
    assert tokenizer.model_max_length == tiny.recipe.model.max_positions
    ids = tokenizer("def f(x): return x " * 500, truncation=True)["input_ids"]
    assert len(ids) == tiny.recipe.model.max_positions


def test_what_accelerate_launch_changes_is_said(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_CPU": "True",
        "MASTER_ADDR": "127.0.0.1",
    }
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    run(load(str(recipe_file), ["train.max_steps=1"]), output=tmp_path / "run")
    said = capsys.readouterr().err
    assert "accelerate launch --mixed_precision bf16 overrides train.bf16" in said
    assert "accelerate launch --cpu ignores --num_processes and starts one process" in said


def test_reversible_blocks_have_nothing_to_recompute(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["model.residual=reversible", "train.gradient_checkpointing=true", "train.max_steps=1"]
    assert run(load(str(recipe_file), asked), output=tmp_path / "run") is not None
    assert (
        "train.gradient_checkpointing: no effect, because reversible blocks store no activations"
        in capsys.readouterr().err
    )


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
    monkeypatch.setattr(command, "has_bfloat16", lambda device: there)
    losses = []
    for name, bf16 in (("wide", "false"), ("narrow", "true")):
        changes = [f"train.bf16={bf16}", "train.max_steps=2"]
        result = run(load(str(recipe_file), changes), output=tmp_path / name)
        assert result
        losses.append(result.held_out_loss)
    assert (losses[0] == losses[1]) is not there
    said = "train.bf16: this processor has no bfloat16 products; float32 is used, which is faster here"
    assert (said in capsys.readouterr().err.splitlines()) is not there


# -- refusals ------------------------------------------------------------------------------------------------


def test_taken_output_is_left_alone(
    finished: tuple[Path, Result], tiny: LoadedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "prepare", lambda data: pytest.fail("read the text"))
    with pytest.raises(Failure, match=r"already holds a run; resume with --resume auto"):
        run(tiny, output=finished[0])
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(Failure, match="is not empty and holds no run"):
        run(tiny, output=tmp_path, resume="auto")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_unwritable_output_is_found_before_anything_is_read(
    tiny: LoadedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "prepare", lambda data: pytest.fail("read the text"))
    (tmp_path / "file").write_text("")
    with pytest.raises(
        Failure, match=r"file/run: cannot be written: .*file is a file, not a folder$"
    ) as caught:
        run(tiny, output=tmp_path / "file" / "run")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("model.safetensors", "File too large"),
        ("optimizer.pt", r"not all data could be written \(disk full\?\)"),
    ],
)
def test_full_disk_is_one_line_and_the_run_goes_on(
    finished: tuple[Path, Result], tiny: LoadedRecipe, tmp_path: Path, file: str, reason: str
) -> None:
    output = tmp_path / "run"
    size = (finished[0] / "checkpoints" / "checkpoint-12" / file).stat().st_size
    before = trainer.LanguageModelTrainer._save_checkpoint

    def save_checkpoint(self: Any, *args: Any) -> None:
        if self.state.global_step < 8:
            before(self, *args)
        else:
            with files_up_to(size - 1):
                before(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.LanguageModelTrainer, "_save_checkpoint", save_checkpoint)
        with pytest.raises(Failure, match=f"{reason}; fix this, then resume with: spa") as caught:
            run(tiny, output=output)
    assert "\n" not in caught.value.message
    assert not (output / "model").exists()
    found, skipped = checkpoint.newest_sound(output / "checkpoints")
    assert (found, skipped) == (output / "checkpoints" / "checkpoint-4", [])
    run(tiny, output=output, resume="auto")
    assert_same_run(output, finished[0])


def test_full_disk_is_one_line_of_tensorboard_s_file_too(
    finished: tuple[Path, Result], tiny: LoadedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, before, by_threads = tmp_path / "run", journal.Board.write, []
    monkeypatch.setattr(threading, "excepthook", by_threads.append)

    def write(self: Any, values: dict[str, float], step: int) -> None:
        with files_up_to(500):
            before(self, values, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.Board, "write", write)
        with pytest.raises(Failure, match=r"File too large; fix this, then resume with") as caught:
            run(tiny, output=output)
    assert "\n" not in caught.value.message
    run(tiny, output=output, resume="auto")
    assert not by_threads
    assert_same_run(output, finished[0])
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))


def test_full_disk_leaves_no_half_written_model(
    finished: tuple[Path, Result], tiny: LoadedRecipe, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished[0], output, ignore=shutil.ignore_patterns("model"))
    with (
        files_up_to((finished[0] / "model" / "model.safetensors").stat().st_size - 1),
        pytest.raises(Failure, match="File too large; fix this, then resume with: sparsecli train"),
    ):
        run(tiny, output=output, resume="auto")
    assert not (output / "model").exists()
    run(tiny, output=output, resume="auto")
    assert_same_run(output, finished[0])


def test_an_interrupt_before_the_first_step(
    tiny: LoadedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(command, "prepare", interrupt)
        with pytest.raises(Stopped, match=r"^interrupted; nothing was written$") as stopped:
            run(tiny, output=output)
    assert stopped.value.exit_code == 130
    assert not output.exists()
    with monkeypatch.context() as patch:
        patch.setattr(command, "run_steps", interrupt)
        with pytest.raises(Stopped, match=r"^interrupted; resume with: sparsecli train .* --resume auto$"):
            run(tiny, output=output)
    assert run(tiny, output=output, resume="auto")


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


def test_stages_fit_the_layers(recipe_file: Path, tmp_path: Path) -> None:
    dense = "model.feed_forward={kind: dense, d_ff: 32}"
    for changes, said in (
        (["train.start_units_per_block=5"], "5 is more than the model's units per block, 4"),
        (
            ["train.start_units_per_block=4", dense],
            "the model's feed-forward layers choose no units; leave it out",
        ),
    ):
        with pytest.raises(Failure) as caught:
            run(load(str(recipe_file), changes), output=tmp_path / "run", dry_run=True)
        assert caught.value.message == f"train.start_units_per_block: {said}"


def test_missing_blocks(recipe_file: Path, tmp_path: Path) -> None:
    text = recipe_file.read_text()
    (tmp_path / "bare.yaml").write_text(text[: text.index("train:")])
    with pytest.raises(RecipeError, match="needs a `train:` block"):
        run(load(str(tmp_path / "bare.yaml")), output=tmp_path / "run")


def test_loss_that_is_not_a_number_stops_the_run(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"the loss is nan at step \d+; lower train\.learning_rate"):
        run(
            load(str(recipe_file), ["train.learning_rate=1e30", "train.max_grad_norm=0"]),
            output=tmp_path / "run",
        )
