"""Targets of controllers: the units that contribute most to their layer's output."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecli.model.layers.feed_forward import ACTIVATIONS, SparseFeedForward


@torch.no_grad()
def unit_scores(sparse: SparseFeedForward, x: Tensor) -> Tensor:
    """The contribution of each unit to the output for x (tokens, d): |h| times the norm of its row of W_down.

    Returns (tokens, blocks, N). A perfect controller chooses the k best of each block.
    """
    h = F.linear(x, sparse.up if sparse.gate is None else sparse.gate, sparse.unit_bias)
    h = ACTIVATIONS[sparse.activation](h)
    if sparse.gate is not None:
        h = h * F.linear(x, sparse.up)
    return (h.abs() * sparse.down.norm(dim=-1)).unflatten(-1, (-1, sparse.block_size))


def controller_loss(sparse: SparseFeedForward, x: Tensor, scores: Tensor) -> Tensor:
    """Cross-entropy of the controller on x (tokens, d) towards each block's shares of `scores` (tokens, blocks, N).

    Blocks that contribute more have more weight. A block without an active unit has none.
    """
    mass = scores.sum(dim=-1, keepdim=True)
    weight = mass.squeeze(-1) / mass.mean().clamp(min=1e-12)
    shares = scores / mass.clamp(min=1e-12)
    losses = -(shares * sparse.controller(x).float().log_softmax(dim=-1)).sum(dim=-1)
    return (weight * losses).mean()
