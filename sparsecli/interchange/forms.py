"""How a foreign tensor holds ours: as it is, transposed, several in one, or shifted. Every form goes both ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecli.spec.model import ModelSpec

POSITIONS_BEFORE = 2
"""Rows of OPT's table of positions that no token uses."""


@dataclass(frozen=True)
class Form:
    """One foreign tensor, and the tensors of ours that are in it.

    Attributes:
        unfold: the foreign tensor to ours, in order; views where that is possible.
        fold: ours to the foreign one.
        computes: whether values change, and not just their places; such tensors are kept in float32.
    """

    unfold: Callable[[Tensor, ModelSpec], Sequence[Tensor]]
    fold: Callable[[Sequence[Tensor], ModelSpec], Tensor]
    computes: bool = False


def _turned(tensor: Tensor) -> Tensor:
    """A matrix transposed, a vector as it is."""
    return tensor.t() if tensor.ndim == 2 else tensor


def _by_head(tensor: Tensor, spec: ModelSpec) -> Sequence[Tensor]:
    heads = tensor.unflatten(0, (spec.heads, 3, spec.width_of_head))
    return [part.flatten(0, 1) for part in heads.unbind(1)]


def _into_heads(tensors: Sequence[Tensor], spec: ModelSpec) -> Tensor:
    heads = [tensor.unflatten(0, (spec.heads, spec.width_of_head)) for tensor in tensors]
    return torch.stack(heads, 1).flatten(0, 2)


SAME = Form(lambda tensor, _: [tensor], lambda tensors, _: tensors[0])

TRANSPOSED = Form(lambda tensor, _: [_turned(tensor)], lambda tensors, _: _turned(tensors[0]))
"""(inputs, outputs), as GPT-2's Conv1D."""

TRANSPOSED_THREE = Form(
    lambda tensor, _: _turned(tensor).chunk(3), lambda tensors, _: _turned(torch.cat(tuple(tensors)))
)
"""Queries, keys and values side by side, (inputs, 3 * outputs), as GPT-2's c_attn."""

THREE_BY_HEAD = Form(_by_head, _into_heads)
"""Query, key and value of the first head, then of the next, (3 * outputs, inputs), as GPT-NeoX."""

ONE_LESS = Form(
    lambda tensor, _: [tensor.float() + 1], lambda tensors, _: tensors[0].float() - 1, computes=True
)
"""A norm's weight less one, as Gemma."""

POSITIONS_BEHIND = Form(
    lambda tensor, _: [tensor[POSITIONS_BEFORE:]],
    lambda tensors, _: torch.nn.functional.pad(tensors[0], (0, 0, POSITIONS_BEFORE, 0)),
)
"""A table of positions behind rows that only padding would read, as OPT; going back these are zeros."""
