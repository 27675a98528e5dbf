"""Learning from a teacher: the terms of the loss, runs that start from a model, and recovery after a conversion."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import Killed, assert_same_run, at_step, crash, files_up_to, send, weights
from torch.nn import functional as F

from sparsecli.console import Failure, RecipeError, Stopped
from sparsecli.data.packing import PackedCorpus, Windows, pack
from sparsecli.data.tokenization import train_byte_pairs
from sparsecli.model.bfloat16 import has_bfloat16
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.loading import load_network
from sparsecli.recipe.data import FilesCorpus
from sparsecli.recipe.loader import load, parse
from sparsecli.recipe.training import RecoverySpec
from sparsecli.spec.model import ModelSpec
from sparsecli.train import command, run_directory, trainer
from sparsecli.train.command import Result, run
from sparsecli.train.controllers import controller_loss, unit_scores
from sparsecli.train.distillation import Teacher, TeacherLogits, choosing_as_decoding
from sparsecli.train.divergence import divergence
from sparsecli.train.evaluation import evaluate
from sparsecli.train.recovery import FACTS, Recovery, TuningLoss, distil, trained_names
from sparsecli.train.stages import in_stage

RECIPE = """
seed: 3
data: {source: files, paths: ["TEXTS/*.txt"], sequence_length: 16, held_out_tokens: 256}
train:
  init_from: STUDENT
  distillation:
    teacher: TEACHER
    temperature: 2.0
    hidden_weight: 0.1
    cross_entropy_weight: 0.1
    controller_weight: 0.1
    start_units_per_block: 8
  max_steps: 12
  per_device_train_batch_size: 4
  learning_rate: 0.01
  logging_steps: 1
  eval_steps: 6
  save_steps: 4
"""
WIDTHS = {"d_model": 16, "layers": 2, "heads": 2, "max_positions": 32, "positions": "rotary", "dropout": 0.1}
DENSE = {"kind": "dense", "d_ff": 32}
SPARSE = {"kind": "sparse", "d_ff": 32, "block_size": 8, "rank": 4, "units_per_block": [1, 2]}
KINDS = {
    "sparse": SPARSE,
    "selector": {"kind": "selector", "d_ff": 32, "block_size": 8, "units_per_block": 2, "bypass": 2},
    "precision": {"kind": "precision", "d_ff": 32, "block_size": 8, "units_per_block": 0, "activation": "relu"},
    "mixture": {"kind": "mixture", "d_ff": 32, "experts": 4},
}  # fmt: skip


def network(
    feed_forward: dict[str, Any], vocabulary: int = 300, **fields: Any
) -> ScalingTransformerForCausalLM:
    torch.manual_seed(0)
    blocks = {"feed_forward": feed_forward, "vocabulary": {"kind": "dense", "size": vocabulary, "tied": True}}
    spec = ModelSpec.model_validate({**WIDTHS, **blocks, **fields})
    return ScalingTransformerForCausalLM(ScalingTransformerConfig.from_spec(spec)).eval()


@dataclass
class Place:
    """A text, a dense teacher, and a sparse student with the teacher's other weights, all in one folder."""

    folder: Path
    recipe: Path
    corpus: PackedCorpus
    data: FilesCorpus

    def save(self, model: ScalingTransformerForCausalLM, name: str) -> Path:
        model.save_pretrained(self.folder / name)
        self.corpus.tokenizer.save_pretrained(self.folder / name)
        return self.folder / name

    def student(self, kind: str = "sparse") -> ScalingTransformerForCausalLM:
        student, teacher = network(KINDS[kind]), self.teacher()
        kept = {name: value for name, value in teacher.state_dict().items() if ".feed_forward." not in name}
        student.load_state_dict(kept, strict=False)
        return student

    def teacher(self) -> ScalingTransformerForCausalLM:
        return load_network(self.folder / "teacher")

    @property
    def windows(self) -> tuple[Windows, Windows]:
        """Windows to train on, and to tune on."""
        every = self.corpus.train.windows(16)
        return every.without(range(8)), every.without(range(8, len(every)))

    def recover(self, student: ScalingTransformerForCausalLM, folder: Path, **changes: Any) -> Recovery:
        """Twelve steps at a given rate, with three evaluations and checkpoints, unless fields change."""
        fields = {"tokens": 12 * 4 * 16, "batch_size": 4, "learning_rate": 0.01, "start_units_per_block": 8}
        spec = RecoverySpec(**{**fields, "evaluations": 3, **changes})
        training = RecoverySpec.training
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                RecoverySpec,
                "training",
                lambda *arguments: training(*arguments).model_copy(update={"save_steps": 4}),
            )
            tokenizer = self.corpus.tokenizer
            return distil(student, self.teacher(), tokenizer, *self.windows, spec, 3, folder, "do it again")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("distillation")
    (folder / "texts").mkdir()
    for number in range(30):
        text = " ".join(f"{(number * word) % 17} and {word % 7}" for word in range(12))
        (folder / "texts" / f"{number}.txt").write_text(text)
    (folder / "upcycle.yaml").write_text(
        RECIPE.replace("TEXTS", str(folder / "texts"))
        .replace("STUDENT", str(folder / "student"))
        .replace("TEACHER", str(folder / "teacher"))
    )
    tokenizer = "tokenizer: {kind: bpe, vocabulary_size: 300}"
    data = f'data: {{source: files, paths: ["{folder}/texts/*.txt"], sequence_length: 16, {tokenizer}}}'
    blocks = parse(data, "data").data
    assert isinstance(blocks, FilesCorpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSECLI_CACHE", str(folder / "cache"))
        made = Place(folder, folder / "upcycle.yaml", pack(blocks), blocks)
        teacher = network(DENSE)
        optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
        windows = made.corpus.train.windows(16)
        tokens = torch.stack([windows[index]["input_ids"] for index in range(len(windows))])
        for _ in range(20):
            optimizer.zero_grad()
            teacher(tokens, labels=tokens).loss.backward()
            optimizer.step()
        made.save(teacher, "teacher")
        made.save(made.student(), "student")
        yield made


@pytest.fixture(scope="module")
def finished(place: Place) -> tuple[Path, Result]:
    """An uninterrupted run."""
    result = run(load(str(place.recipe)), output=place.folder / "finished")
    assert result is not None
    return place.folder / "finished", result


# -- the terms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_divergence_and_its_gradient(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr("sparsecli.train.divergence.SLICE", 3 * 50)  # 7 tokens are more than two slices
    teacher = torch.randn(7, 50).to(dtype)
    student = torch.randn(7, 50).to(dtype).requires_grad_()
    exact = student.detach().float().requires_grad_()
    log_q, log_p = (exact / 2).log_softmax(-1), (teacher.float() / 2).log_softmax(-1)
    expected = 4 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    found = divergence(student, teacher, 2.0)
    (3 * expected).backward()
    (3 * found).backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert student.grad is not None
    torch.testing.assert_close(student.grad.float(), exact.grad, atol=tolerance, rtol=tolerance)
    assert divergence(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


def test_a_bfloat16_teacher_shares_all_but_its_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(DENSE)
    ids = torch.arange(16)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teacher = Teacher(model, bf16=True)
    logits, hidden = teacher(ids)
    torch.testing.assert_close(logits, expected, atol=0, rtol=0)
    assert hidden.shape == (1, 16, 16)
    monkeypatch.setattr("sparsecli.train.distillation.SLICES", 3)
    pieces = list(TeacherLogits(teacher, hidden[0]).split(2))
    assert [len(piece) for piece in pieces] == [2, 2, 2] * 2 + [2, 2]
    torch.testing.assert_close(torch.cat(pieces), logits[0], atol=1e-2, rtol=1e-2)
    assert not logits.requires_grad
    assert teacher.network.model.norm.weight is model.model.norm.weight
    assert {value.dtype for value in before.values()} == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_controllers_learn_without_moving_anything_else() -> None:
    layer = network(SPARSE).model.layers[0].feed_forward
    x = torch.randn(64, 16)
    controller_loss(layer, x, unit_scores(layer, x)).backward()
    moved = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert moved == {"controller.first", "controller.second", "controller.bias"}


# -- stages --------------------------------------------------------------------------------------------------


def test_stages_halve_until_each_layer_has_its_own_units() -> None:
    model = network({**SPARSE, "block_size": 16, "units_per_block": [1, 4]}).train()
    layers = [block.feed_forward for block in model.model.layers]
    seen = []
    for step in range(0, 16):
        with in_stage(model, 16, step, 16):
            seen.append(tuple(layer.units_per_block for layer in layers))
    assert seen[:8] == [(16, 16)] * 2 + [(8, 8)] * 2 + [(4, 4)] * 2 + [(2, 4)] * 2
    assert seen[8:] == [(1, 4)] * 8
    assert [layer.units_per_block for layer in layers] == [1, 4]
    with choosing_as_decoding(model):
        assert {(layer.hard_fraction, layer.temperature) for layer in layers} == {(1.0, 0.0)}
    assert {(layer.hard_fraction, layer.temperature) for layer in layers} == {(0.3, 0.1)}


def test_stages_of_a_layer_whose_own_k_is_none() -> None:
    model = network({**KINDS["precision"]})
    seen = []
    for step in range(10):
        with in_stage(model, 2, step, 10):
            seen.append(model.model.layers[0].feed_forward.units_per_block)
    assert seen == [2, 2, 2, 1, 1, 0, 0, 0, 0, 0]


# -- runs ----------------------------------------------------------------------------------------------------


def test_a_run_starts_from_a_model_and_comes_nearer_to_its_teacher(
    place: Place, finished: tuple[Path, Result]
) -> None:
    output, result = finished
    rows = run_directory.read_metrics(output)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    student = load_network(place.folder / "student")
    held_out = place.corpus.held_out.windows(16, 256)
    teacher = Teacher(place.teacher(), bf16=False)
    before = evaluate(student, held_out, 1.0, teacher=teacher)
    after = evaluate(load_network(output / "model"), held_out, 1.0, teacher=teacher, batch_size=3)
    assert before is not None
    assert after is not None
    assert after.kl_to_teacher == pytest.approx(result.kl_to_teacher, abs=1e-5)
    assert after.kl_to_teacher < 0.8 * before.kl_to_teacher  # type: ignore[operator]
    assert [row["kl_to_teacher"] for row in rows if "held_out_loss" in row][-1] == result.kl_to_teacher

    stored = load(str(output / "recipe.yaml")).recipe
    assert stored.model == student.config.spec  # what the recipe left out
    assert stored.data is not None
    assert stored.data.tokenizer is not None
    assert stored.data.tokenizer.kind == "saved"


def test_stopped_and_resumed_run_ends_bit_for_bit_the_same(
    place: Place, finished: tuple[Path, Result], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, send(signal.SIGTERM))
        with pytest.raises(Stopped, match="stopped at step 3 of 12"):
            run(load(str(place.recipe)), output=output)
    result = run(load(str(output / "recipe.yaml")), output=output, resume="auto")
    assert result is not None
    assert result.kl_to_teacher == finished[1].kl_to_teacher
    assert_same_run(output, finished[0])


def test_a_model_can_start_a_run_without_a_teacher(place: Place, tmp_path: Path) -> None:
    overrides = ["train.distillation=null", "train.max_steps=1", "train.learning_rate=1e-9"]
    result = run(load(str(place.recipe), overrides), output=tmp_path / "run")
    assert result is not None
    assert result.kl_to_teacher is None
    started, ended = load_file(place.folder / "student" / "model.safetensors"), weights(tmp_path / "run")
    for name, value in started.items():
        torch.testing.assert_close(ended[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_trains_in_bfloat16(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    keep_the_last(monkeypatch)
    student = place.student(kind)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    fields = {"hidden_weight": 0.1, "controller_weight": 0.1, "start_units_per_block": None}
    place.recover(student, tmp_path, tokens=2 * 4 * 16, learning_rate=1e-3, **fields)
    trained = {name for name, _ in student.named_parameters()}
    for name, value in student.state_dict().items():
        moves = name in trained or name == "head.weight"
        assert torch.equal(value, before[name]) != moves, name
    assert not student.training


@pytest.mark.slow
def test_two_processes_learn_from_a_teacher(place: Place, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("sparsecli")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(program), "train"]
    subprocess.run([*command, str(place.recipe), "--output", str(tmp_path / "run")], check=True, timeout=300)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["processes"] == 2
    rows = run_directory.read_metrics(tmp_path / "run")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    held_out = place.corpus.held_out.windows(16, 256)
    teacher = Teacher(place.teacher(), bf16=False)
    after = evaluate(load_network(tmp_path / "run" / "model"), held_out, 1.0, teacher=teacher)
    assert after is not None
    assert after.kl_to_teacher == pytest.approx(facts["result"]["kl_to_teacher"], abs=1e-5)


# -- recovery of a conversion --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recovered(place: Place) -> dict[str, torch.Tensor]:
    """Weights after an uninterrupted recovery."""
    student = place.student()
    place.recover(student, place.folder / "recovered")
    return student.state_dict()


def assert_recovered(student: ScalingTransformerForCausalLM, expected: dict[str, torch.Tensor]) -> None:
    for name, value in student.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_interrupted_recovery_goes_on_where_it_stopped(
    place: Place, recovered: dict[str, torch.Tensor], tmp_path: Path, number: int, code: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 6, send(number))
        with pytest.raises(
            Stopped, match="stopped at step 6 of 12 with a checkpoint; do it again"
        ) as stopped:
            place.recover(place.student(), tmp_path)
    assert stopped.value.exit_code == code
    student = place.student()
    place.recover(student, tmp_path)
    assert_recovered(student, recovered)
    steps = [row["step"] for row in run_directory.read_metrics(tmp_path) if "loss" in row]
    assert steps == list(range(1, 13))


def test_finished_recovery_is_not_done_again(
    place: Place, recovered: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.LanguageModelTrainer, "train", lambda *args, **kwargs: pytest.fail("trained"))
    student = place.student()
    place.recover(student, place.folder / "recovered")
    assert_recovered(student, recovered)


def test_full_disk_is_one_line_and_the_recovery_goes_on(
    place: Place, recovered: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    before = trainer.LanguageModelTrainer._save_checkpoint

    def save_checkpoint(self: Any, *args: Any) -> None:
        if self.state.global_step < 8:
            before(self, *args)
        else:
            with files_up_to(20_000):
                before(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.LanguageModelTrainer, "_save_checkpoint", save_checkpoint)
        with pytest.raises(Failure, match="File too large; fix this, then do it again") as caught:
            place.recover(place.student(), tmp_path)
    assert "\n" not in caught.value.message
    student = place.student()
    place.recover(student, tmp_path)
    assert_recovered(student, recovered)


def test_a_killed_recovery_goes_on_from_its_last_checkpoint(
    place: Place, recovered: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 7, crash)
        with pytest.raises(Killed):
            place.recover(place.student(), tmp_path)
    student = place.student()
    place.recover(student, tmp_path)
    assert_recovered(student, recovered)


# -- the best state ------------------------------------------------------------------------------------------


def scripted(*values: float) -> Any:
    """A loss on tuning text that has these values in turn."""
    left = list(values)
    return lambda self, student: (left.pop(0), 0.0)


def falling() -> Any:
    return scripted(*range(100, 0, -1))


def keep_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every state seem better than the one before."""
    monkeypatch.setattr(TuningLoss, "__call__", falling())
    monkeypatch.setattr("sparsecli.train.recovery.window_losses", lambda *_: np.zeros(1))


def test_loss_on_tuning_text_is_that_of_an_evaluation(place: Place) -> None:
    _, tuning = place.windows
    student, teacher = place.student(), Teacher(place.teacher(), bf16=False)
    expected = evaluate(student, tuning, 1.0, teacher=teacher)
    assert expected
    kl, loss = TuningLoss(teacher, tuning, 3)(student)
    assert kl == pytest.approx(expected.kl_to_teacher, rel=1e-5)
    assert loss == pytest.approx(expected.nats_per_token, rel=1e-5)


@pytest.mark.parametrize("rate", [1.0, 1e30])
def test_a_harmful_rate_changes_nothing(place: Place, tmp_path: Path, rate: float) -> None:
    """The second makes the loss infinite."""
    student = place.student()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    recovery = place.recover(student, tmp_path, learning_rate=rate)
    assert recovery.best_step == 0
    assert (recovery.kl_after, recovery.loss_after) == (recovery.kl_before, recovery.loss_before)
    assert recovery.steps == (12 if rate == 1 else recovery.steps)
    assert recovery.steps > 0
    assert_recovered(student, before)


def test_a_recovery_is_never_worse_and_is_nearer_to_the_dense_model(place: Place, tmp_path: Path) -> None:
    student = place.student()
    recovery = place.recover(student, tmp_path)
    assert recovery.kl_after < 0.8 * recovery.kl_before
    assert recovery.loss_after <= recovery.loss_before
    kl, _ = TuningLoss(Teacher(place.teacher(), has_bfloat16("cpu")), place.windows[1], 4)(student)
    assert kl == pytest.approx(recovery.kl_after, rel=1e-5)


@pytest.mark.parametrize(
    ("patience", "losses", "best", "steps"),
    [
        (4, (9, 7, 5, 6), 8, 12),
        (1, (9, 5, 6), 4, 8),
        (1, (9, 10), 0, 4),
        (4, (9, 8, float("nan"), 7), 12, 12),
    ],
)
def test_the_best_state_is_kept_not_the_last(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    patience: int,
    losses: tuple[float, ...],
    best: int,
    steps: int,
) -> None:
    seen = []
    loss = scripted(*losses)

    def note(self: TuningLoss, student: ScalingTransformerForCausalLM) -> Any:
        seen.append({name: value.clone() for name, value in student.state_dict().items()})
        return loss(self, student)

    monkeypatch.setattr(TuningLoss, "__call__", note)
    student = place.student()
    recovery = place.recover(student, tmp_path, patience=patience)
    assert (recovery.best_step, recovery.steps) == (best, steps)
    assert recovery.tokens == steps * 4 * 16
    assert_recovered(student, seen[best // 4])
    again = place.student()
    assert place.recover(again, tmp_path, patience=patience) == recovery
    assert_recovered(again, seen[best // 4])


def test_a_state_whose_loss_is_higher_is_not_kept(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where its divergence is lower."""
    monkeypatch.setattr(TuningLoss, "__call__", falling())
    student = place.student()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert place.recover(student, tmp_path, learning_rate=1.0).best_step == 0
    assert_recovered(student, before)


def test_what_an_early_end_left_is_not_trained_further(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the last checkpoint and the result."""
    monkeypatch.setattr(TuningLoss, "__call__", scripted(9, 5, 6))
    student = place.student()
    recovery = place.recover(student, tmp_path, patience=1)
    facts = json.loads((tmp_path / FACTS).read_text())
    del facts["result"]
    (tmp_path / FACTS).write_text(json.dumps(facts))
    monkeypatch.setattr(trainer.LanguageModelTrainer, "train", lambda *args, **kwargs: pytest.fail("trained"))
    again = place.student()
    assert place.recover(again, tmp_path, patience=1) == recovery
    assert_recovered(again, student.state_dict())


# -- trials --------------------------------------------------------------------------------------------------


def test_what_trains() -> None:
    student, teacher = network(KINDS["selector"]), network(DENSE)
    every = trained_names(student, teacher, "all")
    assert every == [name for name, _ in student.named_parameters()]
    fitted = trained_names(student, teacher, "fitted")
    assert {name.split(".")[3] for name in fitted} == {"feed_forward"}
    assert any(name.endswith("bypass.first") for name in fitted)
    vectors = trained_names(student, teacher, "norms_and_biases")
    assert vectors
    assert all(student.get_parameter(name).ndim == 1 for name in vectors)
    assert set(fitted) & set(vectors)


@pytest.mark.parametrize("trains", ["fitted", "norms_and_biases"])
def test_other_parameters_stay(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trains: str
) -> None:
    keep_the_last(monkeypatch)
    student = place.student()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    place.recover(student, tmp_path, trains=trains, tokens=2 * 4 * 16, learning_rate=1e-3)
    names = trained_names(student, place.teacher(), trains)  # type: ignore[arg-type]
    moved = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert moved == set(names)
    assert all(parameter.requires_grad for parameter in student.parameters())


TRIED = {"learning_rate": None, "trains": "all"}


@pytest.fixture(scope="module")
def tried(
    place: Place, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recovery, ScalingTransformerForCausalLM]:
    """A distillation with trials that nothing stopped, and its student."""
    student = place.student()
    return place.recover(student, tmp_path_factory.mktemp("tried"), **TRIED), student


def test_trials_choose_by_tuning_text(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = [9, 5, 9, 9, 4, 9, 9, 6]  # the fifth, the second, the eighth and the first go on, in this order
    second = [3, 3.5, 8, 8]
    third = [2, 1, 2]
    monkeypatch.setattr(TuningLoss, "__call__", scripted(10, *first, *second, *third, 0.9, 0.8, 0.7))
    recovery = place.recover(place.student(), tmp_path, learning_rate=None)
    ran = [
        (trial.trains, trial.learning_rate, trial.warmup_fraction, trial.steps) for trial in recovery.trials
    ]
    every = [("all", rate, 0.1, 2) for rate in (1e-5, 3e-5, 1e-4, 3e-4)]
    every += [("fitted", rate, 0.1, 2) for rate in (3e-5, 1e-4)]
    every += [("norms_and_biases", rate, 0.1, 2) for rate in (3e-4, 1e-3)]
    assert ran[:8] == every
    assert ran[8:12] == [(*every[index][:3], 4) for index in (4, 1, 7, 0)]
    assert ran[12:] == [(*every[4][:3], 8), (*every[1][:3], 8), ("fitted", 3e-5, 0.4, 8)]
    assert [trial.kl for trial in recovery.trials] == [*first, *second, *third]
    assert recovery.settings == "all parameters, learning rate 3e-05, warm-up 10%"
    assert "the best of 15 trials" in " ".join(capsys.readouterr().err.split())
    rates = [row["learning_rate"] for row in run_directory.read_metrics(tmp_path) if "loss" in row]
    assert max(rates) == pytest.approx(3e-5)


def test_every_trial_has_the_same_start_and_the_same_tokens(
    place: Place, tried: tuple[Recovery, ScalingTransformerForCausalLM], tmp_path: Path
) -> None:
    recovery, _ = tried
    assert {trial.trains for trial in recovery.trials} == {"all"}
    last = recovery.trials[-1]
    fields = {"learning_rate": last.learning_rate, "warmup_fraction": last.warmup_fraction}
    alone = place.recover(
        place.student(), tmp_path / "one", tokens=last.steps * 4 * 16, evaluations=1, **fields
    )
    rows = run_directory.read_metrics(tmp_path / "one")
    assert [row["tuning_kl"] for row in rows if "tuning_kl" in row] == [last.kl]
    assert alone.trials == []


def test_a_setting_that_diverges_is_not_chosen(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsecli.train.recovery.RATES", {"all": (1e30, 1e-3)})
    recovery = place.recover(place.student(), tmp_path, learning_rate=None)
    assert recovery.trials[0].kl is None
    assert "learning rate 0.001" in recovery.settings
    assert recovery.kl_after < recovery.kl_before


@pytest.mark.parametrize(("number", "action"), [(4, crash), (9, send(signal.SIGTERM))])
def test_stopped_trials_go_on(
    place: Place,
    tried: tuple[Recovery, ScalingTransformerForCausalLM],
    tmp_path: Path,
    action: Any,
    number: int,
) -> None:
    """In the last of a trial's two steps, or in the first of another's four."""
    expected, whole = tried
    student, calls = place.student(), []
    before = trainer.LanguageModelTrainer.training_step

    def training_step(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == number:
            action()
        return before(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.LanguageModelTrainer, "training_step", training_step)
        with pytest.raises((Killed, Stopped)) as stopped:
            place.recover(place.student(), tmp_path / "stopped", **TRIED)
    assert action is crash or re.search(
        "stopped in trial . of the distillation; do it again", str(stopped.value)
    )
    assert place.recover(student, tmp_path / "stopped", **TRIED) == expected
    assert_recovered(student, whole.state_dict())


# -- what does not fit ---------------------------------------------------------------------------------------


def test_models_with_an_encoder_neither_teach_nor_learn(place: Place, tmp_path: Path) -> None:
    encoder = {"layers": 1, "max_positions": 16}
    fields = network(DENSE).config.spec.model_dump() | {"encoder": encoder}
    reading = ModelSpec.model_validate(fields)
    ScalingTransformerConfig.from_spec(reading).save_pretrained(tmp_path / "reading")
    changes = [f"train.distillation.teacher={tmp_path / 'reading'}"]
    with pytest.raises(Failure, match="models with an encoder are not supported yet"):
        run(load(str(place.recipe), changes), output=tmp_path / "run")


def test_a_teacher_of_another_vocabulary(place: Place, tmp_path: Path) -> None:
    larger = place.save(network(DENSE, vocabulary=310), "larger")
    with pytest.raises(Failure, match="the teacher's vocabulary has 310 tokens, the model's 300"):
        run(load(str(place.recipe), [f"train.distillation.teacher={larger}"]), output=tmp_path / "run")
    other = place.folder / "other"
    network(DENSE).save_pretrained(other)
    train_byte_pairs(290, ["another text of other words"] * 5).save_pretrained(other)
    message = r"train\.distillation\.teacher: .*other has another vocabulary than the text: the id of .* is \d+ there"
    with pytest.raises(Failure, match=message) as caught:
        run(load(str(place.recipe), [f"train.distillation.teacher={other}"]), output=tmp_path / "run")
    assert "\n" not in caught.value.message
    tokenizer = f"data.tokenizer={{kind: saved, path: {other}}}"
    with pytest.raises(Failure, match=r"train\.init_from: .*student has another vocabulary than the text"):
        run(load(str(place.recipe), [tokenizer]), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.distillation.start_units_per_block=9", "start_units_per_block: 9 is more than the model's units"),
        ("train.distillation.teacher=WIDE", r"hidden_weight: the teacher is 32 wide, the model 16; set it to 0"),
        ("train.distillation.teacher=nowhere", "nowhere: no such file or folder"),
        ("train.init_from=nowhere", "nowhere: no such file or folder"),
        ("data.sequence_length=33", r"upcycle\.yaml: data\.sequence_length: 33 is longer than model\.max_positions 32"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.setattr(command, "prepare", lambda data: pytest.fail("read the text"))
    if "WIDE" in override:
        override = override.replace("WIDE", str(place.save(network(DENSE, d_model=32), "wide")))
    with pytest.raises(Failure, match=message):
        run(load(str(place.recipe), [override]), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_block_must_agree_with_the_model(place: Place, tmp_path: Path) -> None:
    config = json.loads((place.folder / "student" / "config.json").read_text())
    spec = {name: config[name] for name in ModelSpec.model_fields if config.get(name) is not None}
    assert run(load(str(place.recipe), [f"model={json.dumps(spec)}"]), output=tmp_path, dry_run=True) is None
    spec |= {"layers": 3, "dropout": 0.0, "feed_forward": DENSE}
    with pytest.raises(
        RecipeError, match=r"model: differs from the model of .*; leave the block out to u"
    ) as raised:
        run(load(str(place.recipe), [f"model={json.dumps(spec)}"]), output=tmp_path / "run")
    differ = re.findall(
        r"model\.([\w.]+): (\w+|[\d.]+) in the model, ([\w.]+) in the recipe", raised.value.message
    )
    assert [key for key, *_ in differ] == ["layers", "feed_forward.kind", "dropout"]
    assert differ[1][1:] == ("sparse", "dense")


def test_what_a_recipe_must_say() -> None:
    data = "data: {source: stdlib}\n"
    with pytest.raises(RecipeError, match=r"r:1:1: data\.tokenizer: missing"):
        parse(data, "r")
    parse(f"{data}train: {{max_steps: 1, init_from: runs/x}}", "r")
    nothing = "train: {max_steps: 1, distillation: {teacher: runs/x, kl_weight: 0, controller_weight: 1}}"
    with pytest.raises(RecipeError, match=r"train\.distillation\.kl_weight: all weights are 0"):
        parse(nothing, "r")


def test_too_little_text_to_recover_on(place: Place, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"training windows of 16 tokens do not fill a batch of 5000"):
        place.recover(place.student(), tmp_path, batch_size=5000)
    assert not list(tmp_path.iterdir())
