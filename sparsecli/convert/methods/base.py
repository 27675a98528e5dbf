"""The interface of conversion methods, and how they copy the units of a dense feed-forward layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsecli.model.layers.feed_forward import ChosenUnits, DenseFeedForward
from sparsecli.spec.feed_forward import DenseFeedForwardSpec, FeedForwardSpec

BLOCK_SIZE = 16  # smaller blocks (such as 1 of 4) leave out important units; larger blocks gain little


@dataclass(frozen=True)
class FitOptions:
    """Options of a fit.

    Attributes:
        controller_steps: optimizer steps of a controller's fit.
        generator: draws the batches of that fit.
    """

    controller_steps: int
    generator: torch.Generator


class Method(ABC):
    """A way to make a dense feed-forward layer cheaper to decode."""

    name: str
    fit_groups: tuple[tuple[int, ...], ...]
    """Active units per block that the search tries; one fit serves all of a group."""
    recovers: bool
    """Whether refit and distillation recover much of its loss."""

    @property
    def active_units(self) -> list[int]:
        """All active units per block that the search tries."""
        return [k for group in self.fit_groups for k in group]

    def fits(self, dense: DenseFeedForwardSpec) -> bool:
        """Whether layers like `dense` can be converted."""
        return dense.d_ff % BLOCK_SIZE == 0 and not (dense.gated and dense.bias)

    @abstractmethod
    def spec(
        self, dense: DenseFeedForwardSpec, d_model: int, units_per_block: int, rank: int
    ) -> FeedForwardSpec:
        """The layer that replaces `dense`."""

    @abstractmethod
    def fit(self, dense: DenseFeedForward, layer: nn.Module, x: Tensor, options: FitOptions) -> None:
        """Fit `layer` to approximate `dense` on inputs x (tokens, d)."""


def block_fields(dense: DenseFeedForwardSpec, units_per_block: int) -> dict[str, Any]:
    """The fields that a layer with units in blocks shares with a dense one."""
    return {
        "d_ff": dense.d_ff,
        "block_size": BLOCK_SIZE,
        "units_per_block": units_per_block,
        "activation": dense.activation,
        "gated": dense.gated,
        "unit_bias": dense.bias,
    }


@torch.no_grad()
def copy_units(dense: DenseFeedForward, layer: ChosenUnits) -> None:
    """Copy the units of `dense` to `layer`; consecutive units share a block."""
    layer.up.copy_(dense.up.weight)
    layer.down.copy_(dense.down.weight.T)  # (d, d_ff) -> unit-major
    if dense.gate is not None and layer.gate is not None:
        layer.gate.copy_(dense.gate.weight)
    copy_biases(dense, layer.unit_bias, layer.bias)


@torch.no_grad()
def copy_biases(dense: DenseFeedForward, unit_bias: Tensor | None, bias: Tensor) -> None:
    """Copy the biases of `dense` to `unit_bias` (d_ff,), where there is one, and `bias` (d,)."""
    bias.copy_(torch.zeros_like(bias) if dense.down.bias is None else dense.down.bias)
    if unit_bias is not None:
        unit_bias.copy_(dense.up.bias)
