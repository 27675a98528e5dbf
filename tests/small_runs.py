"""A tiny recipe, runs that are cut short, and the comparison of what they leave behind."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsecli.train import journal, run_directory

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


def write_texts(folder: Path) -> None:
    """A text of 7 steps an epoch of the tiny recipe."""
    (folder / "texts").mkdir()
    for number in range(30):
        text = " ".join(
            f"{(number * word) % 17} and {word % number if number else word}" for word in range(12)
        )
        (folder / "texts" / f"{number}.txt").write_text(text)


def write_recipe(folder: Path) -> Path:
    """The recipe of a tiny model, and its text."""
    write_texts(folder)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("TEXTS", str(folder / "texts")))
    return path


def at_step(patch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Do `action` in the middle of one training step."""
    before = journal.Journal.on_step_begin

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before(self, args, state, control, **kwargs)
        if state.global_step == step - 1:
            action()

    patch.setattr(journal.Journal, "on_step_begin", on_step_begin)


class Killed(BaseException):
    """Ends a run as a kill does: nothing handles it."""


def crash() -> None:
    raise Killed


def send(number: int) -> Any:
    return lambda: os.kill(os.getpid(), number)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def assert_same_run(output: Path, reference: Path) -> None:
    """The same weights bit for bit, and every step there once with the same loss."""
    ours, theirs = weights(output), weights(reference)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    curves = [
        [
            (row["step"], row["tokens"], row.get("loss"), row.get("held_out_loss"))
            for row in run_directory.read_metrics(folder)
        ]
        for folder in (output, reference)
    ]
    assert curves[0] == curves[1]


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No longer file can be written: like a full disk, the system refuses, whichever library writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
