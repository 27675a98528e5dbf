"""Where the time of a training step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsecli.console import print_table, say
from sparsecli.model.layers.attention import Attention
from sparsecli.model.layers.cross_attention import CrossAttention
from sparsecli.model.layers.feed_forward import ChosenUnits, DenseFeedForward, MixtureFeedForward
from sparsecli.model.layers.multiplicative import ModuleConvolution
from sparsecli.model.layers.spark import SparkFeedForward

ATTENTION, FEED_FORWARD, CONVOLUTION = "attention", "feed-forward", "convolution"
HEAD, OPTIMIZER, DATA, REST = "head and loss", "optimizer", "data", "rest"
PARTS = (ATTENTION, FEED_FORWARD, CONVOLUTION, HEAD, OPTIMIZER, DATA, REST)
KINDS: dict[type[nn.Module], str] = {
    Attention: ATTENTION,
    CrossAttention: ATTENTION,
    DenseFeedForward: FEED_FORWARD,
    ChosenUnits: FEED_FORWARD,
    MixtureFeedForward: FEED_FORWARD,
    SparkFeedForward: FEED_FORWARD,
    ModuleConvolution: CONVOLUTION,
}
WARM_UP = 2
"""Steps that do not count: they allocate memory and choose algorithms."""


@contextmanager
def profiled(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """While open, measure the steps of `trainer`; then write the table, also of a run that was stopped."""
    steps = StepProfile(model)
    trainer.add_callback(steps)
    try:
        yield
    finally:
        steps.print()


class StepProfile(TrainerCallback):
    """Adds up the time of each part, forward and backward, over the steps of a run.

    A part within another, such as a convolution in attention, counts alone. The loss is what follows the head. What is
    in no part (norms, residuals, embedding, the clipping of gradients) is the rest. Evaluations, logs and checkpoints
    are not in a step and do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = -WARM_UP
        self.open: list[str] = []  # parts that have begun, each within the one before
        self.last = 0.0
        self.hooks = ExitStack()
        for module in model.modules():
            for kind, part in KINDS.items():
                if isinstance(module, kind):
                    self._watch(module, part)
        if isinstance(head := getattr(model, "head", None), nn.Module):
            self._watch_head(model, head)

    def print(self) -> None:
        """Write the table to stdout, or a line if there were too few steps, and stop watching."""
        self.hooks.close()
        if self.steps <= 0:
            say("--profile: too few steps to show where their time goes")
            return
        total = sum(self.seconds[part] for part in PARTS)
        rows = [
            (part, f"{1e3 * self.seconds[part] / self.steps:.1f}", f"{self.seconds[part] / total:.1%}")
            for part in PARTS
        ]
        rows.append(("step", f"{1e3 * total / self.steps:.1f}", "100.0%"))
        print_table(("part", "ms", "share"), rows, f"a step, mean of {self.steps}")

    def _watch(self, module: nn.Module, part: str) -> None:
        def begin(*_: Any) -> None:
            self._begin(part)

        def end(*_: Any) -> None:
            self._end(part)

        for handle in (
            module.register_forward_pre_hook(begin),
            module.register_forward_hook(end),
            module.register_full_backward_pre_hook(begin),
            module.register_full_backward_hook(end),
        ):
            self.hooks.callback(handle.remove)

    def _watch_head(self, model: nn.Module, head: nn.Module) -> None:
        """From the head's beginning, with the loss, to the head's end in the backward pass."""

        def begin(*_: Any) -> None:
            self._begin(HEAD)

        def end(*_: Any) -> None:
            self._end(HEAD)

        def after(module: nn.Module, *_: Any) -> None:
            if not module.training or not torch.is_grad_enabled():
                self._end(HEAD)

        for handle in (
            head.register_forward_pre_hook(begin),
            model.register_forward_hook(after),
            head.register_full_backward_hook(end),
        ):
            self.hooks.callback(handle.remove)

    def _begin(self, part: str) -> None:
        self._note()
        self.open.append(part)

    def _end(self, part: str) -> None:
        """End a part with all that have begun within it, whose inputs may need no gradient."""
        self._note()
        if part in self.open:
            while self.open.pop() != part:
                pass

    def _note(self) -> None:
        """Give the time since the last call to the part that was open."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now = time.perf_counter()
        if self.steps >= 0:
            self.seconds[self.open[-1] if self.open else REST] += now - self.last
        self.last = now

    def _outside(self) -> None:
        """Begin to wait for data."""
        self.open = [DATA]
        self.last = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._outside()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._note()
        self.open = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._note()
        self.open = [OPTIMIZER]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._note()
        self.open = []

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._note()
        self.open = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._note()
        self.steps += 1
        self._outside()

    # What comes between steps, and ends with one of these, is not data.

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._outside()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._outside()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._outside()
