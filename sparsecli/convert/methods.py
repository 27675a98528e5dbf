"""What a dense feed-forward layer can become, each method with one way to say so and one way to fit it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecli.convert.controller import fit_controller
from sparsecli.convert.rounding import round_to, second_moment
from sparsecli.model.layers.feed_forward import ACTIVATIONS, ChosenUnits, DenseFeedForward, SparseFeedForward
from sparsecli.model.layers.quantized import (
    PrecisionFeedForward,
    QuantizedMatrix,
    SelectorFeedForward,
    unit_values,
)
from sparsecli.spec.feed_forward import (
    DenseFeedForwardSpec,
    FeedForwardSpec,
    PrecisionFeedForwardSpec,
    SelectorFeedForwardSpec,
    SparseFeedForwardSpec,
)

BLOCK = 16  # small blocks force units out that matter, as 1 of 4 does; larger ones than this gain little
MISSED = 0.001  # share of a unit's active tokens that the choice `positive` may leave out


@dataclass(frozen=True)
class Options:
    """What fitting needs besides the layers.

    Attributes:
        controller_steps: optimizer steps of a controller's fit.
        generator: draws its batches.
    """

    controller_steps: int
    generator: torch.Generator


class Method(ABC):
    """One way to make a dense feed-forward layer cheaper to decode."""

    name: str
    choices: tuple[tuple[int, ...], ...]
    """Units of a block of BLOCK that the search tries, those together that one fit serves."""
    recovers: bool
    """Whether refit and distillation make up for much of what it loses."""

    @property
    def units(self) -> list[int]:
        """All that the search tries."""
        return [k for together in self.choices for k in together]

    def fits(self, dense: DenseFeedForwardSpec) -> bool:
        """Whether layers like `dense` can be converted."""
        return dense.d_ff % BLOCK == 0 and not (dense.gated and dense.bias)

    @abstractmethod
    def spec(
        self, dense: DenseFeedForwardSpec, d_model: int, units_per_block: int, rank: int
    ) -> FeedForwardSpec:
        """The layer that `dense` becomes."""

    @abstractmethod
    def fit(self, dense: DenseFeedForward, layer: nn.Module, x: Tensor, options: Options) -> None:
        """Fill `layer` so that it does for inputs x (tokens, d) what `dense` does."""


class Precision(Method):
    """Every unit in 4 bits, rounded to second order, and the bits left out for the chosen ones."""

    name = "precision"
    choices = ((8, 4, 2, 1), (0,))
    recovers = False

    def spec(
        self, dense: DenseFeedForwardSpec, d_model: int, units_per_block: int, rank: int
    ) -> FeedForwardSpec:
        """See `Method.spec`."""
        return PrecisionFeedForwardSpec(
            kind="precision",
            **_units(dense, units_per_block),
        )

    def fit(self, dense: DenseFeedForward, layer: nn.Module, x: Tensor, options: Options) -> None:
        """See `Method.fit`. The moment of W_down's inputs leaves the chosen units out: they are read in full."""
        assert isinstance(layer, PrecisionFeedForward)
        moment = second_moment(x)
        for name in ("gate", "up"):
            linear, base, residual = (getattr(of, name) for of in (dense, layer.base, layer.residual))
            if linear is not None:
                round_to(base, linear.weight, moment, near=True)
                residual.copy_(linear.weight - base.weight)
        layer.importance.copy_(dense.down.weight.norm(dim=0))
        _copy_biases(dense, layer.unit_bias, layer.bias)
        gate = None if layer.base.gate is None else layer.base.gate(x)
        h, _ = unit_values(gate, layer.base.up(x), layer.unit_bias, layer.activation)
        if layer.units_per_block:
            h = h * ~layer.refined(h)
        round_to(layer.base.down, dense.down.weight, second_moment(h), near=True)
        layer.residual.down.copy_((dense.down.weight - layer.base.down.weight).T)


class Selector(Method):
    """Units chosen by a 3-bit copy of themselves, the others dropped."""

    name = "selector"
    choices: tuple[tuple[int, ...], ...] = ((12, 8, 6, 4, 2),)
    recovers = True

    def spec(
        self, dense: DenseFeedForwardSpec, d_model: int, units_per_block: int, rank: int
    ) -> FeedForwardSpec:
        """See `Method.spec`."""
        return SelectorFeedForwardSpec(
            kind="selector",
            **_units(dense, units_per_block),
            bypass=max(1, d_model // 8),
        )

    def fit(self, dense: DenseFeedForward, layer: nn.Module, x: Tensor, options: Options) -> None:
        """See `Method.fit`; the copy needs no text."""
        assert isinstance(layer, SelectorFeedForward)
        copy_units(dense, layer)
        copy_selector(dense, layer)


class Controller(Method):
    """Sparse FF (paper section 3.1): units chosen by a low-rank controller, the others dropped."""

    name = "controller"
    choices = ((12, 8, 6, 4, 2),)
    recovers = True

    def spec(
        self, dense: DenseFeedForwardSpec, d_model: int, units_per_block: int, rank: int
    ) -> FeedForwardSpec:
        """See `Method.spec`."""
        return SparseFeedForwardSpec(
            kind="sparse",
            rank=min(rank, d_model),
            hard_fraction=1.0,
            **_units(dense, units_per_block),
        )

    def fit(self, dense: DenseFeedForward, layer: nn.Module, x: Tensor, options: Options) -> None:
        """See `Method.fit`."""
        assert isinstance(layer, SparseFeedForward)
        copy_units(dense, layer)
        with torch.enable_grad():
            fit_controller(layer, x, options.controller_steps, options.generator)


class Exact(Selector):
    """For ReLU: units whose activation a 4-bit copy predicts to be zero are skipped, almost without loss."""

    name = "exact"
    choices = ((BLOCK,),)
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
            **_units(dense, BLOCK),  # what it chooses is not a number of each block
        )

    def fit(self, dense: DenseFeedForward, layer: nn.Module, x: Tensor, options: Options) -> None:
        """See `Method.fit`."""
        super().fit(dense, layer, x, options)
        assert isinstance(layer, SelectorFeedForward)
        layer.threshold.copy_(thresholds(layer, x))


METHODS: dict[str, Method] = {
    method.name: method for method in (Precision(), Selector(), Controller(), Exact())
}


def method_of(layer: FeedForwardSpec) -> str | None:
    """The name of the method that gives such a layer; None where there is none, as for a dense one."""
    if layer.kind == "selector":
        return "exact" if layer.choice == "positive" else "selector"
    return {"sparse": "controller", "precision": "precision"}.get(layer.kind)


def _units(dense: DenseFeedForwardSpec, units_per_block: int) -> dict[str, Any]:
    """What layers that choose units in blocks take over from a dense one."""
    return {
        "d_ff": dense.d_ff,
        "block_size": BLOCK,
        "units_per_block": units_per_block,
        "activation": dense.activation,
        "gated": dense.gated,
        "unit_bias": dense.bias,
    }


@torch.no_grad()
def copy_units(dense: DenseFeedForward, layer: ChosenUnits) -> None:
    """Give `layer` the units of `dense`; consecutive units share a block."""
    layer.up.copy_(dense.up.weight)
    layer.down.copy_(dense.down.weight.T)  # (d, d_ff) -> unit-major
    if dense.gate is not None and layer.gate is not None:
        layer.gate.copy_(dense.gate.weight)
    _copy_biases(dense, layer.unit_bias, layer.bias)


@torch.no_grad()
def copy_selector(dense: DenseFeedForward, layer: SelectorFeedForward) -> None:
    """Make the low-bit sketch of what `dense` reads, and weigh units by the norms of their rows of W_down."""
    layer.sketch.up.copy_(dense.up.weight)
    if dense.gate is not None and isinstance(layer.sketch.gate, QuantizedMatrix):
        layer.sketch.gate.copy_(dense.gate.weight)
    layer.importance.copy_(dense.down.weight.norm(dim=0))


@torch.no_grad()
def thresholds(layer: SelectorFeedForward, x: Tensor) -> Tensor:
    """For every unit the estimate below which it is left out: its sum of activations over x loses MISSED (d_ff,)."""
    exact = ACTIVATIONS[layer.activation](F.linear(x, layer.up, layer.unit_bias))  # (tokens, d_ff)
    _, estimate = layer.sketch(x, layer.unit_bias, layer.activation)
    order = estimate.argsort(dim=0)
    lost = exact.gather(0, order).cumsum(dim=0)
    first = (lost <= MISSED * lost[-1]).sum(dim=0).clamp(max=len(x) - 1)  # the first token that must be kept
    kept = estimate.gather(0, order).gather(0, first[None])[0]
    return torch.nextafter(kept, torch.full_like(kept, -torch.inf))


def _copy_biases(dense: DenseFeedForward, unit_bias: Tensor | None, bias: Tensor) -> None:
    bias.copy_(torch.zeros_like(bias) if dense.down.bias is None else dense.down.bias)
    if unit_bias is not None:
        unit_bias.copy_(dense.up.bias)
