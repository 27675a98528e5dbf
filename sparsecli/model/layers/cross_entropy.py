"""The cross-entropy of language models, on a CPU a few tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.loss.loss_utils import ForCausalLMLoss

from sparsecli.model.layers.tracing import tracing
from sparsecli.spec.vocabulary import IGNORED

AT_ONCE = 2**18
"""Logits that are computed with together: as floats they stay in a processor's cache."""


def token_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The cross-entropy in nats of logits (B, T, V): transformers' `ForCausalLMLoss`, which is the readable twin.

    On a CPU neither the logits nor anything else of their size is copied to float32, and the backward pass only scales
    a gradient that the forward pass made.

    Args:
        labels: (B, T), the tokens themselves, shifted here. Unused with `shift_labels`, which are not shifted.
        num_items_in_batch: what the sum is divided by; by default the number of labels that are not `ignore_index`.
    """
    if logits.device.type != "cpu" or tracing() or torch.compiler.is_compiling():
        return ForCausalLMLoss(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
        )
    if shift_labels is None:
        assert labels is not None
        shift_labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    shift_labels = shift_labels.flatten()
    count = (shift_labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    loss: Tensor = _CrossEntropy.apply(logits.reshape(-1, vocab_size), shift_labels, ignore_index, 1 / count)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """`scale` times the sum of the cross-entropies of logits (tokens, V) towards labels (tokens), float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, scale: Tensor | float) -> Tensor:
        total = torch.zeros(())
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        rows = max(AT_ONCE // logits.shape[-1], 1)
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            counted = (labels[part] != ignore_index).unsqueeze(-1)
            label = labels[part].unsqueeze(-1).where(counted, 0)
            z = logits[part].float()
            p = z.softmax(dim=-1)
            # The largest probability is 1 / sum exp(z - max z): exponentials, which take longest, are taken once.
            log_sum = z.amax(dim=-1, keepdim=True) - p.amax(dim=-1, keepdim=True).log_()
            total += (log_sum - z.gather(-1, label)).where(counted, 0.0).sum()
            if gradient is not None:  # p - 1 at the label, p elsewhere
                p.scatter_add_(-1, label, -torch.ones_like(label, dtype=torch.float32))
                gradient[part].copy_(p.mul_(counted * scale))
        ctx.save_for_backward(gradient)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient if d_loss == 1 else gradient * d_loss, None, None, None
