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


def _split_groups(tensor: Tensor, spec: ModelSpec) -> Sequence[Tensor]:
    groups = tensor.unflatten(0, (spec.key_value_heads, -1, spec.width_of_head))
    return [part.flatten(0, 2) for part in groups.tensor_split((-2, -1), dim=1)]


def _merge_groups(tensors: Sequence[Tensor], spec: ModelSpec) -> Tensor:
    groups = [tensor.unflatten(0, (spec.key_value_heads, -1, spec.width_of_head)) for tensor in tensors]
    return torch.cat(groups, 1).flatten(0, 2)


def _pairs_apart(tensor: Tensor, spec: ModelSpec) -> Tensor:
    """Elements 0, 2, 4 ... of the turned part of every head, then 1, 3, 5 ..."""
    turned, rest = tensor.unflatten(0, (spec.heads, -1)).tensor_split((spec.rotary_width,), dim=1)
    turned = turned.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat((turned, rest), 1).flatten(0, 1)


def _pairs_together(tensor: Tensor, spec: ModelSpec) -> Tensor:
    turned, rest = tensor.unflatten(0, (spec.heads, -1)).tensor_split((spec.rotary_width,), dim=1)
    turned = turned.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat((turned, rest), 1).flatten(0, 1)


def _experts(spec: ModelSpec) -> int:
    assert spec.feed_forward.kind == "mixture"
    return spec.feed_forward.experts


UNCHANGED = TensorLayout(lambda tensor, _: [tensor], lambda tensors, _: tensors[0])

TRANSPOSED = TensorLayout(lambda tensor, _: [_transposed(tensor)], lambda tensors, _: _transposed(tensors[0]))
"""(inputs, outputs), as in GPT-2's Conv1D."""

TRANSPOSED_QKV = TensorLayout(
    lambda tensor, _: _transposed(tensor).chunk(3), lambda tensors, _: _transposed(torch.cat(tuple(tensors)))
)
"""Queries, keys and values side by side, (inputs, 3 * outputs), as in GPT-2's c_attn."""

QKV_BY_GROUP = TensorLayout(_split_groups, _merge_groups)
"""Queries of the first head of keys, its key and its value, then those of the next, as in GPT-NeoX and Falcon."""

QKV_BY_ROWS = TensorLayout(
    lambda tensor, spec: tensor.split((spec.attention_width, spec.key_width, spec.key_width)),
    lambda tensors, _: torch.cat(tuple(tensors)),
)
"""Queries, keys and values one after the other, as in Phi-3."""

HALVES = TensorLayout(lambda tensor, _: tensor.chunk(2), lambda tensors, _: torch.cat(tuple(tensors)))
"""Two matrices one after the other, as gate and up in Phi-3."""

ROTARY_PAIRS = TensorLayout(
    lambda tensor, spec: [_pairs_apart(tensor, spec)], lambda tensors, spec: _pairs_together(tensors[0], spec)
)
"""Elements that rotary positions turn together side by side, as in GPT-J; ours are half the turned width apart."""

EXPERTS = TensorLayout(
    lambda tensor, _: [tensor.flatten(0, 1)],
    lambda tensors, spec: tensors[0].unflatten(0, (_experts(spec), -1)),
)
"""A stack (experts, units, inputs) of matrices, as in Mixtral; ours is one matrix."""

EXPERTS_TRANSPOSED = TensorLayout(
    lambda tensor, _: [tensor.transpose(1, 2).flatten(0, 1)],
    lambda tensors, spec: tensors[0].unflatten(0, (_experts(spec), -1)).transpose(1, 2),
)
"""The same of matrices (outputs, units)."""

NORM_MINUS_ONE = TensorLayout(
    lambda tensor, _: [tensor.float() + 1], lambda tensors, _: tensors[0].float() - 1, changes_values=True
)
"""A norm's weight minus 1, as in Gemma."""

POSITIONS_AFTER_PADDING = TensorLayout(
    lambda tensor, _: [tensor[PADDING_POSITIONS:]],
    lambda tensors, _: torch.nn.functional.pad(tensors[0], (0, 0, PADDING_POSITIONS, 0)),
)
"""A position embedding after rows for padding, as in OPT; an export fills these with zeros."""
