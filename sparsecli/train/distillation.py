"""Distillation from a teacher's predictions and final hidden state, and training of controllers by unit scores."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from sparsecli.console import Failure
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.layers.feed_forward import SparseFeedForward
from sparsecli.recipe.training import Objective
from sparsecli.spec.model import ModelSpec
from sparsecli.train.controllers import controller_loss, unit_scores
from sparsecli.train.divergence import divergence
from sparsecli.train.stages import check_start_units
from sparsecli.train.trainer import LanguageModelTrainer

SCORED = 4
"""One of this many tokens trains the controllers: scoring every unit for all tokens took a fifth of a step."""
SLICES = 8
"""Slices of the divergence whose teacher's logits are computed at once: matrix products of few rows are slow."""


# -- the teacher ---------------------------------------------------------------------------------------------


class Teacher:
    """A model for inference alone. Its linear layers have bfloat16 weights if products are in bfloat16."""

    def __init__(self, network: ScalingTransformerForCausalLM, bf16: bool) -> None:
        self.bf16 = bf16
        self.network = (_narrowed(network) if bf16 else network).eval()

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) and final hidden state (B, T, d) of ids (B, T)."""
        hidden = self.hidden(ids)
        return self.logits(hidden), hidden

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """Final hidden state (B, T, d) of ids (B, T)."""
        self.network.to(ids.device)
        with self._autocast(ids):
            hidden: Tensor = self.network.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, T, V) of a final hidden state (B, T, d)."""
        with self._autocast(hidden):
            return self.network.logits(hidden, 0)

    def _autocast(self, like: Tensor) -> torch.autocast:
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)


class TeacherLogits:
    """The teacher's logits for final hidden states (tokens, d), computed in pieces: all of them take as much memory as
    the student's."""

    def __init__(self, teacher: Teacher, hidden: Tensor) -> None:
        self.teacher, self.hidden = teacher, hidden

    def split(self, rows: int) -> Iterator[Tensor]:
        """Logits (rows, V) of so many tokens at a time."""
        for piece in self.hidden.split(rows * SLICES):
            yield from self.teacher.logits(piece[None])[0].split(rows)


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
    if objective.start_units_per_block is not None:
        check_start_units("distillation", objective.start_units_per_block, student.feed_forward)


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
        self.start_units = objective.start_units_per_block
        self.teacher, self.objective = teacher, objective

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one batch, with units chosen as in decoding."""
        assert isinstance(self.model, nn.Module)
        with choosing_as_decoding(self.model):
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The objective on inputs (B, T), a scalar."""
        weights, ids = self.objective, inputs["input_ids"]
        hidden = self.teacher.hidden(ids)
        with ExitStack() as stack:
            seen = stack.enter_context(_controller_inputs(model)) if weights.controller_weight else {}
            output = model(input_ids=ids, use_cache=False, output_hidden_states=weights.hidden_weight > 0)
        loss = torch.zeros((), device=ids.device)
        if weights.kl_weight:
            ours, theirs = output.logits.flatten(0, 1), TeacherLogits(self.teacher, hidden.flatten(0, 1))
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
def choosing_as_decoding(model: nn.Module) -> Iterator[None]:
    """While open, layers choose hard and without noise."""
    choosing = [vars(module) for module in model.modules() if "hard_fraction" in vars(module)]
    before = [(values["hard_fraction"], values["temperature"]) for values in choosing]
    for values in choosing:
        values["hard_fraction"], values["temperature"] = 1.0, 0.0
    try:
        yield
    finally:
        for values, (fraction, temperature) in zip(choosing, before, strict=True):
            values["hard_fraction"], values["temperature"] = fraction, temperature


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
