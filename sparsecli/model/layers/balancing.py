"""What keeps all experts of a mixture in use: the load-balancing loss of Switch Transformer (Fedus et al., 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def load_balancing_loss(logits: Tensor, chosen: Tensor) -> Tensor:
    """E * sum_i f_i P_i: f_i is the share of all choices that fell on expert i, P_i the mean of its probability.

    It is 1 when both are even. The gradient goes through P alone, as a count of choices has none. Switch
    Transformer has one choice a token; of several, each counts alike, so that the value does not grow with k.

    Args:
        logits: the router's, (tokens, E).
        chosen: experts of every token, (tokens, k).
    """
    probabilities = logits.float().softmax(dim=-1)
    counts = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0).sum(dim=0)
    return logits.shape[-1] * (counts / chosen.numel() * probabilities.mean(dim=0)).sum()


def with_loss(y: Tensor, loss: Tensor, weight: float) -> Tensor:
    """y itself; where something is learned from y, `weight` times `loss` is learned from too.

    The loss enters by its gradient, when the backward pass comes through y. So it reaches everything that it was
    computed from wherever y does: through activations that are computed again, and through reversible layers, which
    hand on nothing but their streams.
    """
    return _WithLoss.apply(y, loss, weight)


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight, ctx.of_loss = weight, (loss.dtype, loss.device)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.of_loss
        return gradient, torch.full((), ctx.weight, dtype=dtype, device=device), None
