"""The method `precision`: every unit in 4 bits, and the chosen ones refined by a residual."""

from __future__ import annotations

from torch import Tensor, nn

from sparsecli.convert.methods.base import FitOptions, Method, block_fields, copy_biases
from sparsecli.convert.methods.rounding import round_second_order, second_moment
from sparsecli.model.layers.feed_forward import DenseFeedForward
from sparsecli.model.layers.quantized import PrecisionFeedForward, unit_values
from sparsecli.spec.feed_forward import DenseFeedForwardSpec, FeedForwardSpec, PrecisionFeedForwardSpec


class PrecisionMethod(Method):
    """Rounds every unit to second order, and keeps the rounding error of the units as their residual."""

    name = "precision"
    fit_groups = ((8, 4, 2, 1), (0,))
    recovers = False

    def spec(
        self, dense: DenseFeedForwardSpec, d_model: int, units_per_block: int, rank: int
    ) -> FeedForwardSpec:
        """See `Method.spec`."""
        return PrecisionFeedForwardSpec(kind="precision", **block_fields(dense, units_per_block))

    def fit(self, dense: DenseFeedForward, layer: nn.Module, x: Tensor, options: FitOptions) -> None:
        """See `Method.fit`. The second moment of W_down's inputs excludes refined units: they are read in full."""
        assert isinstance(layer, PrecisionFeedForward)
        moment = second_moment(x)
        for name in ("gate", "up"):
            linear, base, residual = (getattr(module, name) for module in (dense, layer.base, layer.residual))
            if linear is not None:
                round_second_order(base, linear.weight, moment, for_residual=True)
                residual.copy_(linear.weight - base.weight)
        layer.importance.copy_(dense.down.weight.norm(dim=0))
        copy_biases(dense, layer.unit_bias, layer.bias)
        gate = None if layer.base.gate is None else layer.base.gate(x)
        h, _ = unit_values(gate, layer.base.up(x), layer.unit_bias, layer.activation)
        if layer.units_per_block:
            h = h * ~layer.refined(h)
        round_second_order(layer.base.down, dense.down.weight, second_moment(h), for_residual=True)
        layer.residual.down.copy_((dense.down.weight - layer.base.down.weight).T)
