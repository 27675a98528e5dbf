"""Quantized linear layers, and the feed-forward layers made of them: `selector` and `precision`.

Codes have 3 or 4 bits; 64 inputs of a row, a group, share a scale and a zero. `sparsecli.model.quantization` defines
their bytes. A low-bit sketch of the weights finds a token's units better than a low-rank controller of
the same size, and knows both branches of a gated unit.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecli.model.layers.dropout import shared_dropout
from sparsecli.model.layers.feed_forward import ACTIVATIONS, ChosenUnits, choose
from sparsecli.model.quantization import (
    GROUP,
    MIDDLE,
    STEPS,
    from_bfloat16,
    pack_nibbles,
    quantize_groups,
    quantize_residual,
)


class QuantizedMatrix(nn.Module):
    """A quantized matrix (rows, cols): weight = scale * (code - zero / 16).

    Buffers: codes (rows, G * 32) uint8, two codes a byte; scale (rows, G); zero (rows, G) uint8, in sixteenths.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, rows: int, cols: int, bits: int) -> None:
        super().__init__()
        groups = -(-cols // GROUP)
        self.rows, self.cols, self.bits = rows, cols, bits
        self.register_buffer("codes", torch.zeros(rows, groups * GROUP // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(rows, groups))
        self.register_buffer("zero", torch.zeros(rows, groups, dtype=torch.uint8))

    @torch.no_grad()
    def copy_(self, weight: Tensor) -> None:
        """Round `weight` (rows, cols) to the nearest codes."""
        codes, scale, zero = quantize_groups(weight.float().numpy(), self.bits)
        self.store(codes, torch.from_numpy(from_bfloat16(scale)), torch.from_numpy(zero))

    @torch.no_grad()
    def store(self, codes: np.ndarray, scale: Tensor, zero: Tensor) -> None:
        """Take over codes uint8 (rows, 64 G), scale (rows, G) and zero uint8 (rows, G)."""
        self.codes.copy_(torch.from_numpy(pack_nibbles(codes)))
        self.scale.copy_(scale)
        self.zero.copy_(zero)

    def reset_parameters(self) -> None:
        if self.codes.is_meta or getattr(self.codes, "_is_hf_initialized", False):
            return
        self.copy_(nn.init.xavier_uniform_(torch.empty(self.rows, self.cols)))

    @property
    def weight(self) -> Tensor:
        """The matrix (rows, cols)."""
        zero = self.zero.to(self.scale.dtype) / STEPS
        return _widened(self.codes, self.scale, zero)[:, : self.cols]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., cols) -> (..., rows)."""
        return F.linear(x, self.weight)


class ResidualMatrix(nn.Module):
    """The rounding error of a matrix (rows, cols), in 4 bits around zero: value = scale * (code - 8)."""

    codes: Tensor
    scale: Tensor

    def __init__(self, rows: int, cols: int) -> None:
        super().__init__()
        groups = -(-cols // GROUP)
        self.rows, self.cols = rows, cols
        self.register_buffer("codes", torch.full((rows, groups * GROUP // 2), 0x88, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(rows, groups))

    @torch.no_grad()
    def copy_(self, values: Tensor) -> None:
        """Round `values` (rows, cols) to the nearest codes."""
        codes, scale = quantize_residual(values.float().numpy())
        self.codes.copy_(torch.from_numpy(pack_nibbles(codes)))
        self.scale.copy_(torch.from_numpy(from_bfloat16(scale)))

    @property
    def weight(self) -> Tensor:
        """The matrix (rows, cols)."""
        return _widened(self.codes, self.scale, float(MIDDLE))[:, : self.cols]


def _widened(codes: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
    """scale * (code - zero) for every code, the groups' padding included: (rows, G * GROUP)."""
    groups = codes.view(*scale.shape, GROUP // 2)
    values = torch.cat((groups & 15, groups >> 4), dim=-1).to(scale.dtype)  # (rows, G, GROUP)
    shift = zero.unsqueeze(-1) if isinstance(zero, Tensor) else zero
    return (scale.unsqueeze(-1) * (values - shift)).flatten(1)


class QuantizedLinear(QuantizedMatrix):
    """A linear layer with quantized weights."""

    def __init__(self, width_in: int, width_out: int, bias: bool, bits: int) -> None:
        super().__init__(width_out, width_in, bits)
        self.bias = nn.Parameter(torch.zeros(width_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width_in) -> (..., width_out)."""
        return F.linear(x, self.weight, self.bias)


def linear(width_in: int, width_out: int, bias: bool, bits: int | None) -> nn.Module:
    """A linear layer whose weights have `bits` bits; in floating point where that is None."""
    if bits is None:
        return nn.Linear(width_in, width_out, bias)
    return QuantizedLinear(width_in, width_out, bias, bits)


def unit_values(
    gate: Tensor | None, up: Tensor, unit_bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """Values of units (tokens, d_ff) and their pre-activations, from the products of gate and up (tokens, d_ff)."""
    before = up if gate is None else gate
    if unit_bias is not None:
        before = before + unit_bias
    h = ACTIVATIONS[activation](before)
    return (h if gate is None else h * up), before


class Sketch(nn.Module):
    """A low-bit sketch of the weights that units read: gate and up (d_ff, d)."""

    def __init__(self, d_model: int, d_ff: int, gated: bool, bits: int) -> None:
        super().__init__()
        self.gate = QuantizedMatrix(d_ff, d_model, bits) if gated else None
        self.up = QuantizedMatrix(d_ff, d_model, bits)

    def forward(self, x: Tensor, unit_bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
        """Every unit's estimated value and pre-activation for x (tokens, d): (tokens, d_ff) each."""
        gate = None if self.gate is None else self.gate(x)
        return unit_values(gate, self.up(x), unit_bias, activation)


class Bypass(nn.Module):
    """A linear layer of low rank beside the units, which stands in for those that are left out."""

    def __init__(self, d_model: int, rank: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(rank, d_model))
        self.second = nn.Parameter(torch.empty(d_model, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.first)
        nn.init.zeros_(self.second)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d)."""
        return F.linear(F.linear(x, self.first), self.second)


class SelectorFeedForward(ChosenUnits):
    """Units chosen by a frozen low-bit sketch of their own weights.

    The estimate |h| times the norm of a unit's row of W_down (`importance`) is what the unit adds to the output.
    With the choice `positive` a unit takes part where its estimated pre-activation lies above its `threshold`.

    Args:
        bits: of a weight of the sketch.
        bypass: rank of the linear layer beside the units, 0 for none.
        others: as for `ChosenUnits`.
    """

    importance: Tensor
    threshold: Tensor

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        block_size: int,
        units_per_block: int,
        choice: str = "top",
        bits: int = 3,
        activation: str = "silu",
        gated: bool = True,
        unit_bias: bool = False,
        bypass: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(d_model, d_ff, block_size, units_per_block, activation, gated, unit_bias, dropout)
        self.sketch = Sketch(d_model, d_ff, gated, bits)
        self.bypass = Bypass(d_model, bypass) if bypass else None
        self.choice = choice
        self.register_buffer("importance", torch.ones(d_ff))
        if choice == "positive":
            self.register_buffer("threshold", torch.zeros(d_ff))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d). Training computes what decoding does; the choice passes no gradient."""
        tokens = x.reshape(-1, x.shape[-1])
        if self.training or self.choice == "positive" or self.units_per_block == self.block_size:
            y = self._masked(tokens, self.mask(tokens), None)
        else:
            y = self.evaluate(tokens, choose(self._scores(tokens), self.units_per_block))
        if self.bypass is not None:
            y = y + self.bypass(tokens)
        return shared_dropout(y, self.dropout, self.training, (-2,)).view_as(x)

    @torch.no_grad()
    def mask(self, x: Tensor) -> Tensor:
        """See `ChosenUnits.mask`."""
        if self.choice == "positive":
            _, before = self.sketch(x, self.unit_bias, self.activation)
            return (before > self.threshold).unflatten(-1, (-1, self.block_size)).to(x.dtype)
        if self.units_per_block == self.block_size:
            return x.new_ones(len(x), len(self.up) // self.block_size, self.block_size)
        scores = self._scores(x)
        return torch.zeros_like(scores).scatter_(-1, choose(scores, self.units_per_block), 1.0)

    @torch.no_grad()
    def _scores(self, x: Tensor) -> Tensor:
        """What each unit is estimated to add to the output (tokens, blocks, N)."""
        value, _ = self.sketch(x, self.unit_bias, self.activation)
        return (value.abs() * self.importance).unflatten(-1, (-1, self.block_size))


class QuantizedUnits(nn.Module):
    """The quantized weights of all units: gate and up (d_ff, d), down (d, d_ff)."""

    def __init__(self, d_model: int, d_ff: int, gated: bool, bits: int) -> None:
        super().__init__()
        self.gate = QuantizedMatrix(d_ff, d_model, bits) if gated else None
        self.up = QuantizedMatrix(d_ff, d_model, bits)
        self.down = QuantizedMatrix(d_model, d_ff, bits)


class ResidualUnits(nn.Module):
    """The rounding errors of the base, unit-major: (d_ff, d) each, W_down's too."""

    def __init__(self, d_model: int, d_ff: int, gated: bool) -> None:
        super().__init__()
        self.gate = ResidualMatrix(d_ff, d_model) if gated else None
        self.up = ResidualMatrix(d_ff, d_model)
        self.down = ResidualMatrix(d_ff, d_model)


class PrecisionFeedForward(nn.Module):
    """Every unit quantized; chosen units are refined by adding the quantized rounding error of their weights.

    The quantized pass also selects. Unlike a layer that drops units, this one keeps every unit's contribution, and
    a few units carry most of the rounding error (measured: docs/conversion.md).

    Args:
        bits: of a weight that every token reads.
        others: as for `ChosenUnits`; `units_per_block` may be 0.
    """

    importance: Tensor

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        block_size: int,
        units_per_block: int,
        bits: int = 4,
        activation: str = "silu",
        gated: bool = False,
        unit_bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base = QuantizedUnits(d_model, d_ff, gated, bits)
        self.residual = ResidualUnits(d_model, d_ff, gated)
        self.register_buffer("importance", torch.ones(d_ff))
        self.unit_bias = nn.Parameter(torch.zeros(d_ff)) if unit_bias else None
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.block_size, self.units_per_block = block_size, units_per_block
        self.activation, self.dropout = activation, dropout

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d)."""
        tokens = x.reshape(-1, x.shape[-1])
        base, residual = self.base, self.residual
        gate = None if base.gate is None else base.gate(tokens)
        up = base.up(tokens)
        h, _ = unit_values(gate, up, self.unit_bias, self.activation)
        if not self.units_per_block:
            y = base.down(h)
        else:
            if gate is not None and residual.gate is not None:
                gate = gate + F.linear(tokens, residual.gate.weight)
            up = up + F.linear(tokens, residual.up.weight)
            full, _ = unit_values(gate, up, self.unit_bias, self.activation)
            mask = self.refined(h)
            h = torch.where(mask, full, h)
            y = base.down(h) + (h * mask) @ residual.down.weight
        return shared_dropout(y + self.bias, self.dropout, self.training, (-2,)).view_as(x)

    @torch.no_grad()
    def refined(self, h: Tensor) -> Tensor:
        """Which units are refined, for their quantized values h (tokens, d_ff): bool, of the same shape."""
        scores = (h.abs() * self.importance).unflatten(-1, (-1, self.block_size))
        chosen = choose(scores, self.units_per_block)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True).flatten(-2)
