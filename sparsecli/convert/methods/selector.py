"""The methods `selector` and `exact`: a low-bit sketch of the units chooses which of them are computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecli.convert.methods.base import BLOCK_SIZE, FitOptions, Method, block_fields, copy_units
from sparsecli.model.layers.feed_forward import ACTIVATIONS, DenseFeedForward
from sparsecli.model.layers.quantized import QuantizedMatrix, SelectorFeedForward
from sparsecli.spec.feed_forward import DenseFeedForwardSpec, FeedForwardSpec, SelectorFeedForwardSpec

MISSED = 0.001  # share of a unit's total activation that the choice `positive` may leave out


class SelectorMethod(Method):
    """Units chosen by a 3-bit sketch, the others dropped."""

    name = "selector"
    fit_groups: tuple[tuple[int, ...], ...] = ((12, 8, 6, 4, 2),)
    recovers = True

    def spec(
        self, dense: DenseFeedForwardSpec, d_model: int, units_per_block: int, rank: int
    ) -> FeedForwardSpec:
        """See `Method.spec`."""
        return SelectorFeedForwardSpec(
            kind="selector", **block_fields(dense, units_per_block), bypass=max(1, d_model // 8)
        )

    def fit(self, dense: DenseFeedForward, layer: nn.Module, x: Tensor, options: FitOptions) -> None:
        """See `Method.fit`; the sketch depends on the weights alone."""
        assert isinstance(layer, SelectorFeedForward)
        copy_units(dense, layer)
        fill_sketch(dense, layer)


class ExactMethod(SelectorMethod):
    """For ReLU: units whose activation a 4-bit sketch predicts to be zero are skipped, almost without loss."""

    name = "exact"
    fit_groups = ((BLOCK_SIZE,),)
    recovers = False

    def fits(self, dense: DenseFeedForwardSpec) -> bool:
        """See `Method.fits`."""
        return super().fits(dense) and dense.activation == "relu" and not dense.gated

    def spec(
        self, dense: DenseFeedForwardSpec, d_model: int, units_per_block: int, rank: int
    ) -> FeedForwardSpec:
        """See `Method.spec`."""
        return SelectorFeedForwardSpec(
            kind="selector",
            choice="positive",
            bits=4,
            **block_fields(dense, BLOCK_SIZE),  # its number of active units varies by token
        )

    def fit(self, dense: DenseFeedForward, layer: nn.Module, x: Tensor, options: FitOptions) -> None:
        """See `Method.fit`."""
        super().fit(dense, layer, x, options)
        assert isinstance(layer, SelectorFeedForward)
        layer.threshold.copy_(fit_thresholds(layer, x))


@torch.no_grad()
def fill_sketch(dense: DenseFeedForward, layer: SelectorFeedForward) -> None:
    """Quantize gate and up of `dense` for the selector, and weigh units by the norms of their columns of W_down."""
    layer.sketch.up.copy_(dense.up.weight)
    if dense.gate is not None and isinstance(layer.sketch.gate, QuantizedMatrix):
        layer.sketch.gate.copy_(dense.gate.weight)
    layer.importance.copy_(dense.down.weight.norm(dim=0))


@torch.no_grad()
def fit_thresholds(layer: SelectorFeedForward, x: Tensor) -> Tensor:
    """The estimate (d_ff,) below which a unit is skipped: over x it loses a share MISSED of its total activation."""
    exact = ACTIVATIONS[layer.activation](F.linear(x, layer.up, layer.unit_bias))  # (tokens, d_ff)
    _, estimate = layer.sketch(x, layer.unit_bias, layer.activation)
    order = estimate.argsort(dim=0)
    lost = exact.gather(0, order).cumsum(dim=0)
    first = (lost <= MISSED * lost[-1]).sum(dim=0).clamp(max=len(x) - 1)  # the first token that must be kept
    kept = estimate.gather(0, order).gather(0, first[None])[0]
    return torch.nextafter(kept, torch.full_like(kept, -torch.inf))
