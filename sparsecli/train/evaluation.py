"""Held-out loss, and how evenly the sparse layers use their units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecli.data.examples import Examples
from sparsecli.model.layers.feed_forward import SparseFeedForward, choose
from sparsecli.train.divergence import divergence


@dataclass(frozen=True)
class HeldOut:
    """What a model does on text it has not seen."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    """Tokens that were predicted."""
    never_chosen: float | None
    """Share of the sparse layers' units that no token chose; None without sparse layers."""
    balance: float | None
    """Entropy of the choices in a block over that of even choices, mean of all blocks; 1 is even."""
    kl_to_teacher: float | None = None
    """KL(teacher || model) in nats per predicted token; None without a teacher."""


TeacherModel = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Token ids (B, T) to logits (B, T, V) and final hidden states (B, T, d)."""


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    examples: Examples,
    bytes_per_token: float,
    *,
    batch_size: int = 16,
    teacher: TeacherModel | None = None,
    rank: int = 0,
    ranks: int = 1,
    add_up: Callable[[Tensor], Tensor] = lambda sums: sums,
    stopped: Callable[[], bool] = lambda: False,
) -> HeldOut | None:
    """Evaluate `model` as it decodes: in eval mode, with the argmax units.

    No random number is drawn. Of several processes each takes every `ranks`-th batch, and `add_up` sums a
    tensor over them. Returns None when `stopped` comes true on the way.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)  # nats, predicted tokens, divergence from the teacher
    try:
        with ExitStack() as stack:
            layers = [layer for layer in model.modules() if isinstance(layer, SparseFeedForward)]
            counts = [stack.enter_context(_choices(layer)) for layer in layers]
            for start in range(rank * batch_size, len(examples), ranks * batch_size):
                if stopped():
                    return None
                indices = range(start, min(start + batch_size, len(examples)))
                batch = examples.collate([examples[index] for index in indices])
                predicted = examples.predicted(batch)
                batch = {name: values.to(model.device) for name, values in batch.items()}
                output = model(**batch, use_cache=False)
                means = [output.loss.double().item(), 1.0, 0.0]
                if teacher:
                    logits = zip(output.logits, teacher(batch["input_ids"])[0], strict=True)
                    rows = [divergence(ours[:-1], theirs[:-1]).item() for ours, theirs in logits]
                    means[2] = sum(rows) / len(rows)
                sums += predicted * torch.tensor(means, dtype=torch.float64)
    finally:
        model.train(was_training)

    nats, tokens, kl = add_up(sums).tolist()
    never_chosen, balance = _evenness([add_up(count) for count in counts])
    per_token = nats / tokens
    bits_per_byte = per_token / math.log(2) / bytes_per_token
    kl_to_teacher = kl / tokens if teacher else None
    return HeldOut(per_token, bits_per_byte, int(tokens), never_chosen, balance, kl_to_teacher)


@contextmanager
def _choices(layer: SparseFeedForward) -> Iterator[Tensor]:
    """How often each unit is chosen while the context is open: int64 (blocks, N)."""
    units = layer.up.shape[0]
    counts = torch.zeros(
        units // layer.block_size, layer.block_size, dtype=torch.int64, device=layer.up.device
    )

    def count(controller: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        chosen = choose(logits, layer.units_per_block).reshape(-1, counts.shape[0], layer.units_per_block)
        first = torch.arange(0, units, layer.block_size, device=chosen.device)
        counts.add_(torch.bincount((chosen + first[:, None]).flatten(), minlength=units).view_as(counts))

    handle = layer.controller.register_forward_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


def _evenness(counts: list[Tensor]) -> tuple[float | None, float | None]:
    """Share of units never chosen, and balance, of the counts (blocks, N) of all sparse layers."""
    if not counts:
        return None, None
    blocks = torch.cat(counts).double()  # every block of every layer
    shares = blocks / blocks.sum(dim=-1, keepdim=True).clamp(min=1)
    entropy = torch.special.entr(shares).sum(dim=-1)
    return (blocks == 0).double().mean().item(), (entropy / math.log(blocks.shape[-1])).mean().item()
