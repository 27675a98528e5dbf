"""Layouts of our tensors in foreign ones: unchanged, transposed, concatenated, or shifted, each in both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecli.spec.model import ModelSpec

PADDING_POSITIONS = 2
"""Rows of OPT's position embedding that no token uses."""


@dataclass(frozen=True)
class TensorLayout:
    """The layout of our tensors in a foreign one.

    Attributes:
        to_ours: gives our tensors, in order; views where that is possible.
        to_foreign: gives the foreign tensor.
        changes_values: whether values change, and not only their positions; such tensors are kept in float32.
    """

    to_ours: Callable[[Tensor, ModelSpec], Sequence[Tensor]]
    to_foreign: Callable[[Sequence[Tensor], ModelSpec], Tensor]
    changes_values: bool = False


def _transposed(tensor: Tensor) -> Tensor:
    """Transpose a matrix; a vector stays as it is."""
    return tensor.t() if tensor.ndim == 2 else tensor


def _split_heads(tensor: Tensor, spec: ModelSpec) -> Sequence[Tensor]:
    heads = tensor.unflatten(0, (spec.heads, 3, spec.width_of_head))
    return [part.flatten(0, 1) for part in heads.unbind(1)]


def _merge_heads(tensors: Sequence[Tensor], spec: ModelSpec) -> Tensor:
    heads = [tensor.unflatten(0, (spec.heads, spec.width_of_head)) for tensor in tensors]
    return torch.stack(heads, 1).flatten(0, 2)


UNCHANGED = TensorLayout(lambda tensor, _: [tensor], lambda tensors, _: tensors[0])

TRANSPOSED = TensorLayout(lambda tensor, _: [_transposed(tensor)], lambda tensors, _: _transposed(tensors[0]))
"""(inputs, outputs), as in GPT-2's Conv1D."""

TRANSPOSED_QKV = TensorLayout(
    lambda tensor, _: _transposed(tensor).chunk(3), lambda tensors, _: _transposed(torch.cat(tuple(tensors)))
)
"""Queries, keys and values side by side, (inputs, 3 * outputs), as in GPT-2's c_attn."""

QKV_BY_HEAD = TensorLayout(_split_heads, _merge_heads)
"""Query, key and value of the first head, then of the next, (3 * outputs, inputs), as in GPT-NeoX."""

NORM_MINUS_ONE = TensorLayout(
    lambda tensor, _: [tensor.float() + 1], lambda tensors, _: tensors[0].float() - 1, changes_values=True
)
"""A norm's weight minus 1, as in Gemma."""

POSITIONS_AFTER_PADDING = TensorLayout(
    lambda tensor, _: [tensor[PADDING_POSITIONS:]],
    lambda tensors, _: torch.nn.functional.pad(tensors[0], (0, 0, PADDING_POSITIONS, 0)),
)
"""A position embedding after rows for padding, as in OPT; an export fills these with zeros."""
