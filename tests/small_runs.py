"""Runs that are cut short and the comparison of what they leave behind, for the tests of training and converting."""

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


def at_step(patch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Do `action` in the middle of one training step."""
    before = journal.Journal.on_step_begin

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before(self, args, state, control, **kwargs)
        if state.global_step == step - 1:
            action()

    patch.setattr(journal.Journal, "on_step_begin", on_step_begin)


def crash() -> None:
    raise KeyboardInterrupt


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
            (row["step"], row["tokens"], row.get("loss"), row.get("held_out_nats"))
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
