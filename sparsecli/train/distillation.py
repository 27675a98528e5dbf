"""Distillation from a teacher's predictions and final hidden state, and training of controllers by unit scores."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from sparsecli.console import Failure
from sparsecli.data.packing import PackedCorpus
from sparsecli.model.bfloat16 import has_bfloat16
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.layers.feed_forward import SparseFeedForward
from sparsecli.model.loading import load_network
from sparsecli.recipe.data import TextSpec
from sparsecli.recipe.training import Objective, TrainSpec
from sparsecli.spec.model import ModelSpec
from sparsecli.train.checkpoint import newest_sound, step_of
from sparsecli.train.controllers import controller_loss, unit_scores
from sparsecli.train.divergence import divergence
from sparsecli.train.run_directory import CHECKPOINTS, writing
from sparsecli.train.trainer import LanguageModelTrainer, Signals, run_steps, training_arguments

SCORED = 4
"""One of this many tokens trains the controllers: scoring every unit for all tokens took a fifth of a step."""


def distil(
    student: ScalingTransformerForCausalLM,
    teacher: ScalingTransformerForCausalLM,
    corpus: PackedCorpus,
    data: TextSpec,
    objective: Objective,
    train: TrainSpec,
    seed: int,
    folder: Path,
    hint: str,
    beginning: Sequence[int] = (),
) -> None:
    """Train `student` in place, writing metrics and checkpoints under `folder` and resuming from those that exist.

    The final weights are the same bit for bit, however often the training is stopped and resumed.

    Args:
        data: gives the window length and the number of held-out tokens; the text is that of `corpus`.
        train: the optimizer and its schedule.
        hint: how to resume; the end of the message when the training is stopped or cannot write.
        beginning: token ids that every window begins with.
    Raises:
        Failure: the two models do not fit, `folder` cannot be written, or there is too little text.
        Stopped: after SIGTERM or SIGINT, with a checkpoint.
    """
    check_teacher(objective, student.config.spec, teacher.config.spec)
    windows = corpus.train.windows(data.sequence_length, beginning=beginning)
    if len(windows) < train.per_device_train_batch_size:
        raise Failure(
            f"distillation: {len(windows)} training windows of {data.sequence_length} tokens do not fill a batch "
            f"of {train.per_device_train_batch_size}; add text or lower batch_size"
        )
    held_out = corpus.held_out.windows(data.sequence_length, data.held_out_tokens, beginning)
    checkpoints = folder / CHECKPOINTS
    checkpoint, _ = newest_sound(checkpoints)
    with writing(folder, hint):
        folder.mkdir(parents=True, exist_ok=True)
        if checkpoint and step_of(checkpoint) >= train.max_steps:
            student.load_state_dict(load_network(checkpoint).state_dict())
        arguments = training_arguments(train, seed, checkpoints, evaluations=False)
        bf16 = train.bf16 and has_bfloat16(arguments.device.type)
        trainer = DistillationTrainer(
            student,
            arguments,
            corpus.tokenizer,
            windows,
            held_out,
            held_out.bytes_per_token(corpus.tokenizer),
            bf16=bf16,
            checkpoints=checkpoints,
            keep=train.save_total_limit,
            signals=Signals(),
            teacher=Teacher(teacher, bf16),
            objective=objective,
        )
        run_steps(trainer, folder, checkpoint, description="distilling", hint=hint)
    student.eval()


# -- the teacher ---------------------------------------------------------------------------------------------


class Teacher:
    """A model for inference alone. Its linear layers have bfloat16 weights if products are in bfloat16."""

    def __init__(self, network: ScalingTransformerForCausalLM, bf16: bool) -> None:
        self.bf16 = bf16
        self.network = (_narrowed(network) if bf16 else network).eval()

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) and final hidden state (B, T, d) of ids (B, T)."""
        self.network.to(ids.device)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            hidden = self.network.model(input_ids=ids, use_cache=False).last_hidden_state
            return self.network.logits(hidden, 0), hidden


def _narrowed(network: ScalingTransformerForCausalLM) -> ScalingTransformerForCausalLM:
    """The same model with shared tensors, but bfloat16 copies of the linear weights, to avoid a cast at every step."""
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    narrow = {
        id(weight): nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
        for module in linear
        for weight in module.parameters()
    }
    kept = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    result = copy.deepcopy(network, {**kept, **narrow})
    result.model.embedding.weight = (
        network.model.embedding.weight
    )  # the stream stays float32 if the head is tied to it
    return result


def check_teacher(objective: Objective, student: ModelSpec, teacher: ModelSpec) -> None:
    """Raise Failure unless `student` can be distilled from `teacher` with this objective."""
    if student.encoder or teacher.encoder:
        raise Failure(
            "distillation: models with an encoder are not supported yet, neither as teacher nor as student"
        )
    ours, theirs = student.vocabulary.size, teacher.vocabulary.size
    if ours != theirs:
        raise Failure(f"distillation: the teacher's vocabulary has {theirs:,} tokens, the model's {ours:,}")
    if objective.hidden_weight and student.merged_width != teacher.merged_width:
        raise Failure(
            f"distillation.hidden_weight: the teacher is {teacher.merged_width} wide, "
            f"the model {student.merged_width}; set it to 0"
        )
    start = objective.start_units_per_block
    if start is not None and start > getattr(student.feed_forward, "block_size", 0):
        raise Failure(f"distillation.start_units_per_block: {start} is more than the model's units per block")


def check_vocabulary(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, key: str, folder: Path
) -> None:
    """Raise Failure, naming the recipe's `key`, unless the model in `folder` has the vocabulary of the text."""
    known, meant = ours.get_vocab(), theirs.get_vocab()
    if known != meant:
        token = min(token for token, number in (known.items() ^ meant.items()))
        raise Failure(
            f"{key}: {folder} has another vocabulary than the text: the id of token {token!a} is "
            f"{meant.get(token, 'none')} there, {known.get(token, 'none')} here; use one model's tokenizer throughout"
        )


# -- training ------------------------------------------------------------------------------------------------


class DistillationTrainer(LanguageModelTrainer):
    """Trains by distillation. Evaluations also give the KL divergence from the teacher."""

    teacher: Teacher

    def __init__(self, *args: Any, teacher: Teacher, objective: Objective, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.objective = teacher, objective

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one batch, with the number of active units of this step, chosen as in decoding."""
        assert isinstance(self.model, nn.Module)
        halvings = self.objective.start_units_per_block, self.state.global_step, self.state.max_steps
        with choosing_as_decoding(self.model, *halvings):
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The objective on inputs (B, T), a scalar."""
        weights, ids = self.objective, inputs["input_ids"]
        logits, hidden = self.teacher(ids)
        with ExitStack() as stack:
            seen = stack.enter_context(_controller_inputs(model)) if weights.controller_weight else {}
            output = model(input_ids=ids, use_cache=False, output_hidden_states=weights.hidden_weight > 0)
        loss = torch.zeros((), device=ids.device)
        if weights.kl_weight:
            ours, theirs = output.logits.flatten(0, 1), logits.flatten(0, 1)
            loss = loss + weights.kl_weight * divergence(ours, theirs, weights.temperature)
        if weights.hidden_weight:
            distance = F.mse_loss(output.hidden_states[-1].float(), hidden.float())
            loss = loss + weights.hidden_weight * distance
        if weights.cross_entropy_weight:
            predicted = output.logits[:, :-1].flatten(0, 1).float()
            loss = loss + weights.cross_entropy_weight * F.cross_entropy(predicted, ids[:, 1:].flatten())
        if seen:
            losses = [controller_loss(layer, x, unit_scores(layer, x)) for layer, x in seen.items()]
            loss = loss + weights.controller_weight * torch.stack(losses).mean()
        return loss


@contextmanager
def choosing_as_decoding(
    model: nn.Module, start: int | None = None, step: int = 0, steps: int = 1
) -> Iterator[None]:
    """While open, layers choose hard and without noise, and more than their k units in the first half of `steps`.

    They start with `start` active units per block. Each stage halves the number, until all layers have reached their k.
    """
    choosing = [
        module for module in model.modules() if {"hard_fraction", "units_per_block"} & vars(module).keys()
    ]
    names = {"hard_fraction", "temperature", "units_per_block"}
    before = [{name: vars(module)[name] for name in names & vars(module).keys()} for module in choosing]
    least = min((vars(module).get("units_per_block", 1) for module in choosing), default=1)
    for module in choosing:
        values = vars(module)
        if "hard_fraction" in values:
            values["hard_fraction"], values["temperature"] = 1.0, 0.0
        if start and "units_per_block" in values:
            values["units_per_block"] = max(
                values["units_per_block"], start >> _stage(start, least, step, steps)
            )
    try:
        yield
    finally:
        for module, values in zip(choosing, before, strict=True):
            vars(module).update(values)


def _stage(start: int, least: int, step: int, steps: int) -> int:
    """How often `start` has been halved at a step: at equal intervals in the first half, until at most `least`."""
    stages = 0
    while start >> stages > least:
        stages += 1
    return min(stages, 2 * step * stages // steps)


@contextmanager
def _controller_inputs(model: nn.Module) -> Iterator[dict[SparseFeedForward, Tensor]]:
    """While open, records the inputs (tokens, d) of sparse layers that choose, of every `SCORED`-th token.

    The inputs are detached.
    """
    seen: dict[SparseFeedForward, Tensor] = {}

    def note(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, SparseFeedForward)
        seen[layer] = arguments[0].detach().flatten(0, -2)[::SCORED]

    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, SparseFeedForward) and layer.units_per_block < layer.block_size:
                stack.callback(layer.register_forward_pre_hook(note).remove)
        yield seen
