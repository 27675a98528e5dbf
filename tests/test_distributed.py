"""Two processes, started in every way that docs/training.md names, train the model that one process trains."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import RECIPE, weights

from sparsecli.train import run_directory

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
TOLERANCE = 1e-5  # nats/token

pytestmark = pytest.mark.slow


def accelerate(name: str) -> tuple[str, ...]:
    return ("-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / f"{name}.yaml"))


WAYS = {
    "torchrun": TORCHRUN,
    "ddp": accelerate("ddp"),
    "fsdp": accelerate("fsdp"),
    "deepspeed": accelerate("deepspeed"),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without random numbers, and text that does not end within the run."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "texts").mkdir()
    for number in range(400):
        words = [f"{a} plus {b} is {a + b}. " for a in range(number, number + 8) for b in range(6)]
        (folder / "texts" / f"{number}.txt").write_text("".join(words))
    text = RECIPE.replace("TEXTS", str(folder / "texts"))
    for old, new in (
        ("dropout: 0.1", "dropout: 0.0"),
        ("hard_fraction: 0.5, temperature: 0.3", "hard_fraction: 1.0, temperature: 0.0"),
        ("max_steps: 12", "max_steps: 50\n  lr_scheduler_type: constant"),
        ("eval_steps: 6", "eval_steps: 20"),
        ("save_steps: 4", "save_steps: 20"),
        ("batch_size: 4", "batch_size: 8"),
    ):
        assert old in text
        text = text.replace(old, new)
    path = folder / "model.yaml"
    path.write_text(text)
    return path


def train(recipe: Path, output: Path, *changes: str, launcher: tuple[str, ...] = ("-m",)) -> str:
    """Run `sparsecli train` in new processes; returns what they wrote to stderr."""
    module = ("sparsecli",) if launcher == ("-m",) else ("-m", "sparsecli")
    words = [sys.executable, *launcher, *module, "train", str(recipe), *changes, "--output", str(output)]
    if output.exists():
        words += ["--resume", "auto"]
    ended = subprocess.run(words, timeout=600, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def losses(output: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in run_directory.read_metrics(output) if "loss" in row}


def assert_same(output: Path, reference: Path) -> None:
    ours, theirs = losses(output), losses(reference)
    assert ours.keys() == theirs.keys() == {*range(1, 51)}
    for step, loss in theirs.items():
        assert ours[step] == pytest.approx(loss, abs=TOLERANCE), step
    facts = [run_directory.read_facts(folder)["result"]["held_out_loss"] for folder in (output, reference)]
    assert facts[0] == pytest.approx(facts[1], abs=TOLERANCE)
    shapes = [
        {name: tensor.shape for name, tensor in weights(folder).items()} for folder in (output, reference)
    ]
    assert shapes[0] == shapes[1]


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    train(recipe, recipe.parent / "alone")
    return recipe.parent / "alone"


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_end_as_one(recipe: Path, alone: Path, tmp_path: Path, way: str) -> None:
    if way == "deepspeed" and not importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed")
    half = "train.per_device_train_batch_size=4"
    train(recipe, tmp_path / "run", half, launcher=WAYS[way])
    assert_same(tmp_path / "run", alone)


@pytest.mark.parametrize("way", ["torchrun", "fsdp"])
def test_a_run_moves_from_one_process_to_two_and_back(
    recipe: Path, alone: Path, tmp_path: Path, way: str
) -> None:
    output = tmp_path / "run"
    train(recipe, output, "train.max_steps=20")
    stderr = train(
        recipe,
        output,
        *("train.max_steps=40", "train.per_device_train_batch_size=4"),
        launcher=WAYS[way],
    )
    assert "2 processes instead of 1" in stderr
    assert "1 processes instead of 2" in train(recipe, output)
    assert_same(output, alone)
