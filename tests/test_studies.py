"""Studies: what is trained and in which order, how rates are chosen, what ends, and what the table says."""

from __future__ import annotations

import csv
import gc
import io
import json
import math
import os
import signal
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import at_step, write_texts

from sparsecli.bench import host
from sparsecli.console import Failure, RecipeError, Stopped
from sparsecli.data.preparation import prepare_with_tuning
from sparsecli.recipe import commands
from sparsecli.recipe.loader import LoadedRecipe, load, parse
from sparsecli.study import command, training
from sparsecli.study.training import Outcome, choose
from sparsecli.train import command as train_command
from sparsecli.train import journal, run_directory
from sparsecli.train.trainer import LanguageModelTrainer

RECIPE = """
model:
  d_model: 16
  layers: 1
  heads: 2
  max_positions: 32
  dropout: 0.1
  feed_forward: {kind: dense, d_ff: 32}
  vocabulary: {kind: dense, size: 300, tied: true}
data:
  source: files
  paths: ["TEXTS/*.txt"]
  sequence_length: 16
  held_out_fraction: 0.4
  held_out_tokens: 64
  tokenizer: {kind: bpe, vocabulary_size: 300}
train:
  max_steps: 4
  per_device_train_batch_size: 4
  logging_steps: 1
  eval_steps: 2
  save_steps: 2
study:
  variants:
    - name: student
      model: {feed_forward: {kind: dense, d_ff: 16}}
      distil_from: dense
    - name: dense
    - name: 2 of 8
      model: {feed_forward: {kind: sparse, d_ff: 32, block_size: 8, units_per_block: 2, rank: 4}}
  learning_rates: [1.0e-2, 1.0e+30]
  seeds: [3, 4]
  trial_tokens: 128
  tuning_tokens: 64
bench: {dtypes: [float32], context: 4, rounds: 1, tokens_per_round: 2, warmup_tokens: 0}
"""
ONE_RUN = ["study.learning_rates=[0.01]", "study.seeds=[0]", "study.variants=[{name: dense}]"]
Order = dict[str, list[torch.Tensor]]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Without what takes longer than a tiny run: pictures of each loss, collections of all objects, probes."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "draw_loss", lambda *_: None)
        patch.setattr(host, "bandwidth", lambda **_: 20.0)
        patch.setattr(host, "BUSY_SECONDS", 0.01)
        yield
    gc.unfreeze()


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies whose decoding is not measured, and without pictures."""
    monkeypatch.setattr(command, "_measured", lambda *_: None)
    monkeypatch.setattr(command, "draw", lambda *_: None)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A recipe of a tiny study and its text."""
    folder = tmp_path_factory.mktemp("study")
    write_texts(folder)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("TEXTS", str(folder / "texts")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSECLI_CACHE", str(folder / "cache"))
        yield path


@pytest.fixture(scope="module")
def finished(file: Path) -> tuple[Path, Order]:
    """A whole study, and the tokens of each run's steps."""
    output, order = file.parent / "finished", {}
    before = LanguageModelTrainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        run = self.checkpoints.parent.relative_to(output / "runs")
        order.setdefault(str(run), []).append(inputs["input_ids"].clone())
        return before(self, model, inputs, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModelTrainer, "training_step", training_step)
        command.run(load(str(file)), output=output)
    return output, order


def table(output: Path) -> dict[str, Any]:
    """The rows of a study by variant."""
    return {row["variant"]: row for row in json.loads((output / "study.json").read_text())["rows"]}


def facts(output: Path, run: str) -> dict[str, Any]:
    return run_directory.read_facts(output / "runs" / run)


# -- what is trained -----------------------------------------------------------------------------------------


def test_each_variant_reads_the_same_tokens_in_the_same_order(finished: tuple[Path, Order]) -> None:
    _, order = finished
    by_run = {run: torch.stack(steps) for run, steps in order.items()}
    for seed in (3, 4):
        first, *others = [ids for run, ids in by_run.items() if run.endswith(f"seed-{seed}")]
        assert len(others) == 2
        assert first.shape == (4, 4, 16)
        assert all(torch.equal(ids, first) for ids in others)
    assert not torch.equal(by_run["dense/rate-0.01-seed-3"], by_run["dense/rate-0.01-seed-4"])
    trials = [run for run in by_run if run.endswith("0.01-trial")]
    assert len(trials) == 3
    assert all(torch.equal(by_run[run], by_run["dense/rate-0.01-seed-3"][:2]) for run in trials)


def test_runs_of_a_study(finished: tuple[Path, Order]) -> None:
    """The short trials lose their weights, finished runs their checkpoints."""
    output, order = finished
    labels = ["0.01-trial", "1e+30-trial", "0.01-seed-3", "0.01-seed-4"]
    assert list(order) == [
        f"{name}/rate-{label}" for name in ("dense", "student", "2-of-8") for label in labels
    ]
    for run in order:
        folder = output / "runs" / run
        assert not (folder / "checkpoints").exists()
        assert (folder / "model").exists() == ("seed" in run)
        recipe = load(str(folder / "recipe.yaml")).recipe
        assert recipe.train
        assert (recipe.train.max_steps, recipe.seed) == ((2, 3) if "trial" in run else (4, int(run[-1])))
        teacher = recipe.train.distillation and recipe.train.distillation.teacher
        seed = 3 if "trial" in run else recipe.seed
        expected = str(output / "runs" / "dense" / f"rate-0.01-seed-{seed}")
        assert teacher == (expected if run.startswith("student") else None)


def test_tuning_text_follows_the_held_out_text(file: Path) -> None:
    data = load(str(file)).recipe.data
    prepared = prepare_with_tuning(data, 64)
    held_out, tuning = (
        torch.cat([examples[index]["input_ids"] for index in range(len(examples))])
        for examples in (prepared.held_out, prepared.tuning)
    )
    assert len(held_out) == len(tuning) == 64
    texts = [prepared.tokenizer.decode(ids) for ids in (held_out, tuning)]
    documents = [path.read_text() for path in (file.parent / "texts").iterdir()]
    found = [document for document in documents if document in texts[1] + document[:20]]
    assert any(texts[1].startswith(document[:40]) for document in documents)
    assert not any(document[:40] in texts[0] for document in found)
    with pytest.raises(
        Failure, match=r"held-out tokens follow data.held_out_tokens, study.tuning_tokens asks for 9,999"
    ):
        prepare_with_tuning(data, 9999)


# -- the table -----------------------------------------------------------------------------------------------


def test_the_table_says_what_the_runs_say(finished: tuple[Path, Order]) -> None:
    output, _ = finished
    rows = table(output)
    assert list(rows) == ["student", "dense", "2 of 8"]
    bench = {row["variant"]: row for row in json.loads((output / "bench.json").read_text())["rows"]}
    lines = {row["variant"]: row for row in csv.DictReader(io.StringIO((output / "study.csv").read_text()))}
    markdown = (output / "study.md").read_text()
    for name, row in rows.items():
        folder = name.replace(" ", "-")
        trials = {
            rate: facts(output, f"{folder}/rate-{rate}-trial")["result"]["tuning_loss"] for rate in ("0.01",)
        }
        assert row["trials"] == {**trials, "1e+30": None}
        assert (row["learning_rate"], row["border"]) == (0.01, True)
        runs = {seed: facts(output, f"{folder}/rate-{row['learning_rate']}-seed-{seed}") for seed in (3, 4)}
        losses = [run["result"]["held_out_loss"] for run in runs.values()]
        assert list(row["held_out_losses"].values()) == losses
        assert row["held_out_loss"] == pytest.approx(sum(losses) / 2)
        assert row["deviation"] == pytest.approx(abs(losses[0] - losses[1]) / math.sqrt(2))
        assert row["standard_error"] == pytest.approx(row["deviation"] / math.sqrt(2))
        assert row["parameters"] == runs[3]["parameters"]
        assert row["decoding"][0]["ms_per_token"] == bench[name]["ms_per_token"]["p50"]
        assert row["decoding"][0]["bytes_per_token"] == bench[name]["bytes_per_token"]
        assert float(lines[name]["held_out_loss"]) == row["held_out_loss"]
        assert float(lines[name]["ms_per_token_float32"]) == row["decoding"][0]["ms_per_token"]
        assert f"| {row['held_out_loss']:.3f} ± {row['deviation']:.3f} |" in markdown
        assert row["notes"] == [
            f"learning rate 1e+30 diverged: {facts(output, f'{folder}/rate-1e+30-trial')['diverged']}"
        ]
        assert f"- {name}: {row['notes'][0]}." in markdown
    student, dense = (list(rows[name]["held_out_losses"].values()) for name in ("student", "dense"))
    differences = [ours - theirs for ours, theirs in zip(dense, student, strict=True)]
    assert rows["student"]["difference"] is None
    assert rows["dense"]["difference"] == pytest.approx(statistics.fmean(differences))
    assert rows["dense"]["difference_error"] == pytest.approx(statistics.stdev(differences) / math.sqrt(2))
    assert rows["2 of 8"]["active_parameters"] < rows["2 of 8"]["parameters"]
    for name in ("loss-tokens", "loss-time"):
        assert (output / f"{name}.png").stat().st_size > 5000
        assert "</svg>" in (output / f"{name}.svg").read_text()


def test_the_curve_has_every_evaluation(finished: tuple[Path, Order], file: Path) -> None:
    from sparsecli.study.pictures import curve
    from sparsecli.study.plan import make_plan

    output, _ = finished
    plan = make_plan(load(str(file)), output)
    dense = plan.variants[1]
    trained = training.Trained(dense)
    trained.runs = {seed: (plan.run(dense, 0.01, seed), Outcome(1.0, 1.0)) for seed in (3, 4)}
    points = curve(trained)
    assert [point.tokens for point in points] == [128, 256]
    losses = [facts(output, f"dense/rate-0.01-seed-{seed}")["result"]["held_out_loss"] for seed in (3, 4)]
    assert (points[-1].low, points[-1].high) == (min(losses), max(losses))


# -- rates and losses that do not stay finite ----------------------------------------------------------------


def figures_by_rate(patch: pytest.MonkeyPatch, loss: Callable[[float, bool], float]) -> None:
    """Evaluations that give a loss of the learning rate and of whether it is that on tuning text."""
    before = LanguageModelTrainer._figures

    def figures(self: Any, examples: Any, teacher: Any) -> Any:
        found = before(self, examples, teacher)
        assert found
        return replace(found, nats_per_token=loss(self.args.learning_rate, examples is self.tuning))

    patch.setattr(LanguageModelTrainer, "_figures", figures)


@pytest.mark.usefixtures("unmeasured")
def test_rates_are_chosen_by_the_tuning_loss_alone(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where trials are as long as runs: the best one is the first seed's run."""
    figures_by_rate(monkeypatch, lambda rate, tuning: 1 + 10 * rate if tuning else 2 - 10 * rate)
    changes = [*ONE_RUN, "study.learning_rates=[0.01,0.02]", "study.trial_tokens=null", "train.max_steps=2"]
    result = command.run(load(str(file), changes), output=tmp_path / "run")
    assert result
    (row,) = result.rows
    assert (row.learning_rate, row.held_out_loss, row.border) == (0.01, 1.9, True)
    assert "| 0.01 * |" in result.markdown()
    assert "best rate may lie beyond" in result.markdown()
    runs = sorted(path.name for path in (tmp_path / "run" / "runs" / "dense").iterdir())
    assert runs == ["rate-0.01-seed-0", "rate-0.02-seed-0"]
    assert not (tmp_path / "run" / "runs" / "dense" / runs[1] / "model").exists()

    # Rates of the grid may go. The best of those that are left is trained again, because its weights are gone.
    result = command.run(load(str(file), [*changes, "study.learning_rates=[0.02]"]), output=tmp_path / "run")
    assert result
    assert (result.rows[0].learning_rate, result.rows[0].border) == (0.02, False)


def test_choose() -> None:
    trials = {
        0.1: Outcome(3.0, 1.0),
        0.2: Outcome(2.0, 2.0),
        0.4: Outcome(failure="diverged: the loss is nan"),
    }
    assert choose(trials) == 0.2
    assert choose({0.4: trials[0.4]}) is None


def test_a_loss_that_is_not_finite_ends_one_variant(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = LanguageModelTrainer.compute_loss

    def compute_loss(self: Any, model: Any, *rest: Any, **named: Any) -> Any:
        loss = before(self, model, *rest, **named)
        broken = model.config.spec.feed_forward.d_ff == 24 and self.state.global_step == 1
        return loss * math.nan if broken else loss

    monkeypatch.setattr(LanguageModelTrainer, "compute_loss", compute_loss)
    variants = "{name: broken, model: {feed_forward: {kind: dense, d_ff: 24}}}"
    variants = f"[{variants}, {{name: dense}}, {{name: untaught, distil_from: broken}}]"
    loaded = load(str(file), [*ONE_RUN, f"study.variants={variants}"])
    asked: dict[str, Path] = {}
    monkeypatch.setattr(command, "measure_runs", lambda loaded, named, *_: asked.update(named))
    monkeypatch.setattr(command, "as_json", lambda result: "{}")
    monkeypatch.setattr(command.compare, "read", lambda path: None)
    monkeypatch.setattr(command, "draw", lambda *_: None)
    command.run(loaded, output=tmp_path / "run")
    said = capsys.readouterr()
    line = "broken, learning rate 0.01, seed 0, 4 steps: diverged: the loss is nan at step 2"
    assert [found for found in said.err.splitlines() if "diverged" in found] == [line]
    rows = table(tmp_path / "run")
    assert rows["broken"]["held_out_loss"] is None
    assert rows["broken"]["notes"] == ["seed 0 diverged: the loss is nan at step 2"]
    assert rows["untaught"]["notes"] == ["seed 0 left out, because its teacher broken diverged"]
    assert rows["dense"]["held_out_loss"] > 0
    assert list(asked) == ["dense"]
    assert "broken" in said.out

    monkeypatch.setattr(training, "train", None)  # nothing is trained again
    command.run(loaded, output=tmp_path / "run")
    assert table(tmp_path / "run") == rows


@pytest.mark.usefixtures("unmeasured")
def test_a_run_that_ends_worse_than_chance_has_diverged(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures_by_rate(monkeypatch, lambda rate, tuning: math.log(300) + 1.1)
    result = command.run(load(str(file), ONE_RUN), output=tmp_path / "run")
    assert result
    assert result.rows[0].notes == ["seed 0 diverged: the loss is 6.804 at the end"]


# -- stopping and going on -----------------------------------------------------------------------------------


def killed(action: Callable[[], object]) -> None:
    """`action` in a process of its own, which must kill itself."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
def test_a_killed_study_goes_on_where_it_was(
    finished: tuple[Path, Order],
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Killed in the third step of a run, then behind another run, before the next one."""
    reference, _ = finished
    output = tmp_path / "run"
    variants = (
        "[{name: dense}, {name: student, distil_from: dense, model: {feed_forward: {kind: dense, d_ff: 16}}}]"
    )
    loaded = load(str(file), ["study.seeds=[3]", f"study.variants={variants}"])

    def in_a_step() -> None:
        at_step(monkeypatch, 4, kill)
        command.run(loaded, output=output)

    def between_runs() -> None:
        calls: list[object] = []
        before = training.train

        def train(*arguments: Any, **named: Any) -> Any:
            if len(calls) == 2:
                kill()
            calls.append(arguments)
            return before(*arguments, **named)

        monkeypatch.setattr(training, "train", train)
        command.run(loaded, output=output)

    killed(in_a_step)
    unfinished = output / "runs" / "dense" / "rate-0.01-seed-3"
    assert not (unfinished / "model").exists()
    first = stamps(output)
    assert len(first) == 2
    killed(between_runs)
    assert f"resuming from {unfinished / 'checkpoints' / 'checkpoint-2'}" in capfd.readouterr().err
    second = stamps(output)
    assert len(second) == 4
    command.run(loaded, output=output)
    last = stamps(output)
    assert len(last) == 6
    assert first.items() <= second.items() <= last.items()  # nothing is trained twice
    ours, theirs = table(output), table(reference)
    for name in ("dense", "student"):
        assert ours[name]["trials"] == theirs[name]["trials"]
        assert ours[name]["held_out_losses"] == {"3": theirs[name]["held_out_losses"]["3"]}


def stamps(output: Path) -> dict[str, int]:
    """When each finished run wrote its last figures."""
    return {
        str(path): path.stat().st_mtime_ns
        for path in output.glob("runs/*/*/metrics.jsonl")
        if {"result", "diverged"} & run_directory.read_facts(path.parent).keys()
    }


def test_a_study_stops_after_its_time_and_goes_on(tmp_path: Path, file: Path) -> None:
    loaded = load(str(file), ONE_RUN)
    with pytest.raises(Stopped, match="the same command"):
        command.run(loaded, output=tmp_path / "run", stop_after=0.0)
    assert command.run(loaded, output=tmp_path / "run")


@pytest.mark.usefixtures("unmeasured")
def test_a_signal_stops_the_study_with_a_checkpoint(  # from which `train` alone may go on, too
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(
        Stopped, match=r"^dense, .*: stopped at step 2 of 4 .*; the same command continues"
    ) as stopped:
        command.run(load(str(file), ONE_RUN), output=tmp_path / "run")
    assert stopped.value.exit_code == 75
    run = tmp_path / "run" / "runs" / "dense" / "rate-0.01-seed-0"
    alone = train_command.run(load(str(run / "recipe.yaml")), output=run, resume="auto")
    result = command.run(load(str(file), ONE_RUN), output=tmp_path / "run")
    assert alone
    assert result
    assert result.rows[0].held_out_loss == alone.held_out_loss
    assert facts(tmp_path / "run", "dense/rate-0.01-seed-0")["result"]["tuning_loss"] > 0


def test_a_finished_study_trains_and_measures_nothing(
    finished: tuple[Path, Order], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, _ = finished
    names = ("study.json", "study.md", "study.csv", "bench.json", "loss-time.svg", "loss-tokens.svg")
    before = {name: (output / name).read_bytes() for name in names}
    monkeypatch.setattr(training, "train", None)
    monkeypatch.setattr("sparsecli.bench.command._measure", None)
    command.run(load(str(file)), output=output)
    assert {name: (output / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["train.weight_decay=0.2"],
            "the study began with other settings; continue it with those",
        ),
        (
            ["data.held_out_fraction=0.5"],
            "the text or its tokenizer has changed since this study was started",
        ),
    ],
)
def test_a_study_does_not_go_on_with_another_recipe(
    finished: tuple[Path, Order], file: Path, changes: list[str], message: str
) -> None:
    output, _ = finished
    before = stamps(output)
    with pytest.raises(Failure, match=message):
        command.run(load(str(file), changes), output=output)
    assert stamps(output) == before


def test_a_folder_of_something_else_is_left_alone(file: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(Failure, match="is not empty and holds no study"):
        command.run(load(str(file)), output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_dry_run_writes_nothing(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    command.run(load(str(file)), output=output, dry_run=True)
    said = capsys.readouterr().out
    assert not output.exists()
    assert "12, 0 of them finished" in said
    assert "256 a whole run, 2,304 in all, 2,304 left" in said  # 3 * (2 trials * 128 + 2 seeds * 256)
    assert "without evaluations" in said


def test_a_dry_run_counts_what_is_left(
    finished: tuple[Path, Order], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run(load(str(file)), output=finished[0], dry_run=True)
    said = capsys.readouterr().out
    assert "12, 12 of them finished" in said
    assert "2,304 in all, 0 left" in said
    command.run(load(str(file), ["study.seeds=[3, 4, 5]"]), output=finished[0], dry_run=True)
    assert "3,072 in all, 768 left" in capsys.readouterr().out  # a third seed of three variants


# -- recipes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("study.learning_rates=[]", "study.learning_rates): expected a non-empty list of numbers above 0"),
        ("study.learning_rates=[1e-3, 0.001]", "study.learning_rates): 0.001 is given twice"),
        ("study.seeds=[1, 1]", "study.seeds): 1 is given twice"),
        (
            "study.variants=[]",
            "study.variants): expected a non-empty list of blocks with name, got an empty list",
        ),
        ("study.variants.1.name=student", "study.variants[1].name: 'student' is the name of two variants"),
        ("study.variants.1.name=2-of-8", "study.variants[2].name: '2 of 8' is the name of two variants"),
        ("study.variants.1.name=../x", "study.variants[1].name: '../x' is not a name"),
        ("study.variants.0.distil_from=big", "'big' is not one of student, dense, 2 of 8"),
        ("study.variants.1.distil_from=student", "'student' would learn from itself"),
        (
            "study.variants.0.model.heads=3",
            "study.variants[0].model: does not fit the recipe's model: d_model",
        ),
        ("study.variants.0.train.max_steps=3", "max_steps: unknown key, did you mean warmup_steps?"),
        ("study.equal_parameters=0.02%x", "expected a share such as `2 %`, got '0.02%x'"),
        ("data.held_out_tokens=null", "data.held_out_tokens): missing; the tuning text of a study follows"),
        ("train.init_from=runs/a", "train.init_from): a study trains from random weights"),
    ],
)
def test_wrong_studies_are_one_line(override: str, line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(RECIPE, "r.yaml", [override])
    (message,) = caught.value.message.splitlines()
    assert line in message


def test_unequal_parameters_are_refused(file: Path, tmp_path: Path) -> None:
    loaded = load(str(file), ["study.equal_parameters=2 %"])
    wrong = r"study.equal_parameters: 2 of 8 has [\d,]+ parameters, student [\d,]+: \d+\.\d% more, 2.0% are allowed"
    with pytest.raises(RecipeError, match=wrong) as caught:
        command.run(loaded, output=tmp_path / "run")
    assert len(caught.value.message.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    copy = tmp_path / "copy.yaml"
    copy.write_text(
        file.read_text().replace("tuning_tokens: 64", "tuning_tokens: 64\n  equal_parameters: 2 %")
    )
    with pytest.raises(RecipeError, match=wrong):
        commands.check([str(copy)])


def test_what_cannot_be_measured_is_refused_before_training(file: Path, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"^student: .* use a smaller --context"):
        command.run(load(str(file), ["bench.context=64"]), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_study_needs_its_blocks(file: Path, tmp_path: Path) -> None:
    loaded: LoadedRecipe = load(str(file), ["train=null"])
    with pytest.raises(RecipeError, match="this command needs a `train:` block"):
        command.run(loaded, output=tmp_path / "run")
