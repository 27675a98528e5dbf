"""Layers that treat every token alike, computed for some tokens at a time to save memory."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsecli.model.layers.choices import ChoiceRecord
from sparsecli.model.layers.tracing import tracing


def in_chunks(layer: nn.Module, x: Tensor, tokens: int | None) -> Tensor:
    """layer(x) of x (B, T, d), `tokens` of its B * T tokens at a time; all at once where that is None.

    What a chunk computed is computed once more in the backward pass, so that one chunk's activations exist at a time.
    A chunk is a call of its own: it draws its own dropout, and its own hard or soft mask.
    """
    if tokens is None or tracing() or x.shape[:-1].numel() <= tokens:
        return layer(x)
    chunks = x.flatten(0, -2).split(tokens)
    compute = _checkpointed if torch.is_grad_enabled() else nn.Module.__call__
    return torch.cat([compute(layer, chunk) for chunk in chunks]).view_as(x)


@torch.compiler.disable  # which cannot follow a checkpoint with contexts of its own
def _checkpointed(layer: nn.Module, x: Tensor) -> Tensor:
    choices = ChoiceRecord()

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return choices.recording(), choices.replaying()

    return checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
