"""Held-out loss, accuracy of classes, and how evenly the sparse layers use their units."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecli.data.examples import Example, Examples
from sparsecli.evaluate.losses import bits_per_byte
from sparsecli.model.layers.choices import ChoiceRecord
from sparsecli.model.layers.feed_forward import MixtureFeedForward, SparseFeedForward, choose
from sparsecli.model.terraformer import TerraformerForConditionalGeneration
from sparsecli.model.vision import ScalingTransformerForImageClassification
from sparsecli.spec.vocabulary import IGNORED
from sparsecli.train.divergence import divergence


@dataclass(frozen=True)
class HeldOut:
    """Figures of a model on held-out text or images."""

    nats_per_token: float
    """Or nats per image."""
    bits_per_byte: float | None
    """None for images."""
    tokens: int
    """Number of predicted tokens, or of images."""
    never_chosen: float | None
    """Share of the sparse layers' units, or of a mixture's experts, that no token chose; None for dense layers."""
    balance: float | None
    """Mean entropy of the choices in a block, or among experts, over that of uniform choices; 1 means uniform."""
    kl_to_teacher: float | None = None
    """KL(teacher || model) in nats per predicted token; None without a teacher."""
    accuracy: float | None = None
    """Share of images whose likeliest class is theirs; None for text."""


TeacherModel = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Token ids (B, T) to logits (B, T, V) and final hidden states (B, T, d)."""


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    examples: Examples,
    bytes_per_token: float | None,
    *,
    batch_size: int = 16,
    teacher: TeacherModel | None = None,
    rank: int = 0,
    ranks: int = 1,
    add_up: Callable[[Tensor], Tensor] = lambda sums: sums,
    stopped: Callable[[], bool] = lambda: False,
) -> HeldOut | None:
    """Evaluate `model` as it decodes: in eval mode, with the argmax units.

    No random number is drawn. With several processes, each takes every `ranks`-th batch, and `add_up` sums a
    tensor over the processes. All of them run the model equally often, as sharded models need: one that has no batch
    left repeats the first, which does not count. Returns None if `stopped` becomes true before the end.
    Images have no `bytes_per_token`.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(
        4, dtype=torch.float64
    )  # nats, predicted tokens, divergence from the teacher, accuracy
    try:
        with ExitStack() as stack:
            named = model.named_modules()
            kinds = SparseFeedForward | MixtureFeedForward
            choices = [_Choices(name, layer) for name, layer in named if isinstance(layer, kinds)]
            for counter in choices:
                stack.enter_context(counter)
            for start in range(0, len(examples), ranks * batch_size):
                if stopped():
                    return None
                counts = start + rank * batch_size < len(examples)
                first = start + rank * batch_size if counts else 0
                indices = range(first, min(first + batch_size, len(examples)))
                batch = examples.collate([examples[index] for index in indices])
                predicted = examples.predicted(batch) if counts else 0
                batch = {name: values.to(model.device) for name, values in batch.items()}
                of_decoder, of_encoder = _read(model, batch)
                for counter in choices:
                    read = of_encoder if counter.of_encoder else of_decoder
                    counter.expect(read & counts)
                output = model(**batch, use_cache=False)
                means = [output.loss.double().item(), 1.0, 0.0, 0.0]
                if "pixel_values" in batch:
                    means[3] = (output.logits.argmax(dim=-1) == batch["labels"]).double().mean().item()
                if teacher:
                    logits = zip(output.logits, teacher(batch["input_ids"])[0], strict=True)
                    rows = [divergence(ours[:-1], theirs[:-1]).item() for ours, theirs in logits]
                    means[2] = sum(rows) / len(rows)
                sums += predicted * torch.tensor(means, dtype=torch.float64)
    finally:
        model.train(was_training)

    nats, tokens, kl, correct = add_up(sums).tolist()
    never_chosen, balance = _evenness([add_up(counter.counts) for counter in choices])
    per_token = nats / tokens
    kl_to_teacher = kl / tokens if teacher else None
    return HeldOut(
        per_token,
        None if bytes_per_token is None else bits_per_byte(per_token, bytes_per_token),
        int(tokens),
        never_chosen,
        balance,
        kl_to_teacher,
        correct / tokens if isinstance(model, ScalingTransformerForImageClassification) else None,
    )


def _read(model: PreTrainedModel, batch: Example) -> tuple[Tensor, Tensor]:
    """Masks of tokens that are not padding, for layers of the decoder, bool (B, T), and of the encoder, bool (B, S)."""
    if isinstance(model, ScalingTransformerForImageClassification):
        patches = torch.ones(len(batch["labels"]), model.config.spec.positions, dtype=torch.bool)
        return patches, patches
    target = batch["labels"] != IGNORED
    if "attention_mask" not in batch:  # running text
        return target, target
    source = batch["attention_mask"].bool()
    if isinstance(model, TerraformerForConditionalGeneration):
        # Source and target are one sequence. Here the source's padding follows it; in that sequence it comes first.
        return torch.cat((source.flip(1), target), dim=1), source
    return target, source


class _Choices:
    """Counts of how often each unit of a layer is chosen: `counts`, int64 (blocks, N). Experts are one block.

    The layer is watched while this is open, as a context.
    """

    def __init__(self, name: str, layer: SparseFeedForward | MixtureFeedForward) -> None:
        self.of_encoder = "encoder" in name.split(".")
        self.layer, self.record, self.handles = layer, ChoiceRecord(), ExitStack()
        if isinstance(layer, MixtureFeedForward):
            shape = 1, layer.experts
        else:
            shape = layer.up.shape[0] // layer.block_size, layer.block_size
        self.counts = torch.zeros(shape, dtype=torch.int64, device=layer.up.device)

    def __enter__(self) -> None:
        if isinstance(self.layer, MixtureFeedForward):
            self.handles.callback(self.layer.router.register_forward_hook(self._after_router).remove)
            return
        self.handles.callback(self.layer.register_forward_pre_hook(self._before).remove)
        self.handles.callback(self.layer.register_forward_hook(self._after, always_call=True).remove)

    def __exit__(self, *error: object) -> None:
        self.handles.close()

    def expect(self, read: Tensor) -> None:
        """Set the mask of the layer's next batch: choices count only where `read`, bool (B, T), is true."""
        self.read = read.flatten()

    def _after_router(self, router: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        assert isinstance(self.layer, MixtureFeedForward)
        self._count(choose(logits, self.layer.experts_per_token)[:, None])

    def _before(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.running = self.record.recording().__enter__()

    def _after(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.running.__exit__(None, None, None)
        for chosen in self.running.made:
            self._count(chosen.long())

    def _count(self, chosen: Tensor) -> None:
        """Add the choices (tokens, blocks, k) of the next tokens of the batch."""
        read, self.read = self.read.split((len(chosen), len(self.read) - len(chosen)))
        first = torch.arange(0, self.counts.numel(), self.counts.shape[1], device=chosen.device)
        rows = (chosen[read] + first[:, None]).flatten()
        self.counts += torch.bincount(rows, minlength=self.counts.numel()).view_as(self.counts)


def _evenness(counts: list[Tensor]) -> tuple[float | None, float | None]:
    """Share of units that were never chosen, and balance, by the counts (blocks, N) of all layers that choose."""
    if not counts:
        return None, None
    never = torch.cat([(blocks == 0).flatten() for blocks in counts]).double()
    balance = torch.cat([_balance(blocks.double()) for blocks in counts])
    return never.mean().item(), balance.mean().item()


def _balance(blocks: Tensor) -> Tensor:
    """Entropy of the choices in every block over that of uniform ones, by counts (blocks, N): (blocks,)."""
    shares = blocks / blocks.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.special.entr(shares).sum(dim=-1) / math.log(blocks.shape[-1])
