"""Packed tensors as matrices again: what the engine's readable twin computes with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsecli.decode.arrangement import PANEL, SPAN
from sparsecli.decode.layout import LANES, PAD, Slot, padded
from sparsecli.decode.layout_low_bit import three_bit_places
from sparsecli.decode.packing import PackedModel, plan
from sparsecli.model.low_bit import MIDDLE, STEPS, from_bfloat16, unpack_nibbles


@dataclass(frozen=True)
class Weight:
    """A packed tensor, unpacked.

    Attributes:
        kind: its packed type.
        values: (rows, cols) as float32; those of int8 are integers.
        scale: (rows,), what a row has to be multiplied by; ones but for int8.
    """

    kind: str
    values: Tensor
    scale: Tensor

    def __getitem__(self, rows: Tensor) -> Weight:
        """Only some rows."""
        return Weight(self.kind, self.values[rows], self.scale[rows])

    def row(self, index: int) -> Tensor:
        """One row (cols,) as the numbers that it stands for."""
        return self.values[index] * self.scale[index]


@dataclass(frozen=True)
class FewBits:
    """A packed matrix of 3 or 4 bits, or a residual, unpacked.

    Attributes:
        steps: (rows, G, GROUP), sixteenths of a step above zero, as float64; padding is arbitrary.
        scale: (rows, G).
    """

    steps: Tensor
    scale: Tensor

    def __getitem__(self, rows: Tensor | slice) -> FewBits:
        """Only some rows."""
        return FewBits(self.steps[rows], self.scale[rows])

    def values(self) -> Tensor:
        """The matrix (rows, G * GROUP)."""
        return (self.steps / STEPS * self.scale[..., None]).float().flatten(1)


def unpack_few_bits(slot: Slot, packed: np.ndarray) -> FewBits:
    """The rows of every map of a slot, one map after the other."""
    groups = padded(slot.cols, PAD) // PAD
    count = slot.group * padded(slot.rows // slot.group, LANES) // LANES
    panels = packed[: slot.elements].reshape(count, -1)
    ends = np.cumsum([groups * LANES * PAD * slot.bits // 8, 2 * groups * LANES, groups * LANES])
    code_part, scale_part, zero_part, _ = np.split(panels, ends, axis=1)
    words = np.ascontiguousarray(code_part).view(np.uint32).reshape(len(panels), groups, -1, LANES)
    codes = codes_of(words.transpose(0, 3, 1, 2), slot.bits)  # (panels, LANES, G, GROUP)
    scale = (
        np.ascontiguousarray(scale_part)
        .view(np.uint16)
        .reshape(len(panels), groups, LANES)
        .transpose(0, 2, 1)
    )
    zero = zero_part.reshape(len(panels), groups, LANES).transpose(0, 2, 1)
    steps = codes.astype(np.float64) * STEPS - zero[..., None]

    def rows(values: np.ndarray) -> Tensor:
        by_map = values.reshape(-1, slot.group, *values.shape[1:]).swapaxes(0, 1)
        joined = by_map.reshape(slot.group, -1, *values.shape[2:])[:, : slot.rows // slot.group]
        return torch.from_numpy(np.ascontiguousarray(joined.reshape(slot.rows, *values.shape[2:])))

    return FewBits(rows(steps), rows(from_bfloat16(np.ascontiguousarray(scale))))


def codes_of(words: np.ndarray, bits: int) -> np.ndarray:
    """words (..., 8 or 6) of 32 bits -> codes (..., 64), as they lie in a lane of native/ops/low_bit.inl."""
    if bits == 4:
        shift = 4 * np.arange(4, dtype=np.uint32)[:, None] + 16 * np.arange(2, dtype=np.uint32)
        return (words[..., None, None] >> shift & 15).reshape(*words.shape[:-1], -1)
    two_shift, one_shift, odd = three_bit_places()
    two = words[..., :4, None, None] >> two_shift & 3
    one = words[..., 4:].repeat(2, axis=-1)[..., None, None] >> one_shift & 1
    return np.where(odd, two << 1 | one, two | one << 2).reshape(*words.shape[:-1], -1)


def unpack_residual(slot: Slot, packed: np.ndarray) -> FewBits:
    """The rows of every unit, one unit after the other."""
    units, groups = slot.rows // slot.group, padded(slot.cols, PAD) // PAD
    width = groups * (PAD // 2 + 2)
    rows = packed[: slot.elements].reshape(units, -1)[:, : slot.group * width].reshape(-1, width)
    codes = unpack_nibbles(rows[:, : groups * PAD // 2]).reshape(-1, groups, PAD)
    scale = np.ascontiguousarray(rows[:, groups * PAD // 2 :]).view(np.uint16)
    steps = (codes.astype(np.float64) - MIDDLE) * STEPS
    return FewBits(torch.from_numpy(steps), torch.from_numpy(from_bfloat16(scale)))


def unpack(slot: Slot, packed: np.ndarray) -> np.ndarray:
    """The inverse of `arrangement.arrange`: (rows, cols) of the packed type."""
    packed = packed[: slot.elements]
    rows, cols = slot.rows, slot.cols
    match slot.layout:
        case "spans":
            width = padded(cols, PAD)
            spans = np.split(packed, [rows * at for at in range(SPAN, width, SPAN)])
            return np.concatenate([span.reshape(rows, -1) for span in spans], axis=1)[:, :cols]
        case "panels":
            return unpack_panels(packed, padded(rows, LANES), padded(cols, PAD))[:rows, :cols]
        case "taps":
            inputs = cols // slot.group
            taps = packed.reshape(slot.group, -1)
            matrices = [unpack_panels(tap, padded(rows, LANES), padded(inputs, 4)) for tap in taps]
            return np.stack([matrix[:rows, :inputs] for matrix in matrices], axis=1).reshape(rows, cols)
        case "blocks":
            together = 1 if packed.dtype == np.float32 else 2
            blocks = packed.reshape(rows // slot.group, -1, padded(slot.group, LANES), together)
            units = blocks.transpose(0, 2, 1, 3).reshape(
                *blocks.shape[::2], -1
            )  # (blocks, N padded, r padded)
            return units[:, : slot.group, :cols].reshape(rows, cols)
    return packed.reshape(rows, -1)[:, :cols]


def unpack_panels(packed: np.ndarray, outputs: int, inputs: int) -> np.ndarray:
    """(outputs, inputs) from panels of PANEL outputs, each [inputs / p][outputs][p]; int8 is stored as w + 128."""
    together = 4 // packed.itemsize
    if packed.dtype == np.int8:
        packed = (packed.view(np.uint8) ^ 0x80).view(np.int8)
    panels, at = [], 0
    for start in range(0, outputs, PANEL):
        width = min(PANEL, outputs - start)
        panel = packed[at : at + width * inputs].reshape(-1, width, together)
        panels.append(panel.transpose(1, 0, 2).reshape(width, inputs))
        at += width * inputs
    return np.concatenate(panels)


def unpack_scale(slot: Slot, scale: np.ndarray) -> np.ndarray:
    """Scales (rows,) without those of padding."""
    if slot.layout == "blocks":
        return scale[: slot.scales].reshape(-1, padded(slot.group, LANES))[:, : slot.group].reshape(-1)
    return scale[: slot.rows]


def unpack_model(model: PackedModel) -> tuple[dict[str, Weight], dict[str, FewBits]]:
    """Every tensor of a packed model, by its name there: those of 8 bits and more, and the others."""
    weights: dict[str, Weight] = {}
    few_bits: dict[str, FewBits] = {}
    for slot, kind in plan(model.spec, model.precision):
        if slot.layout == "residual":
            few_bits[slot.key] = unpack_residual(slot, model.tensors[slot.key])
        elif slot.layout == "low_bit":
            few_bits[slot.key] = unpack_few_bits(slot, model.tensors[slot.key])
        elif slot.key in model.tensors:
            values = torch.from_numpy(from_bfloat16(unpack(slot, model.tensors[slot.key])).copy())
            scale = torch.ones(slot.rows)
            if kind == "int8":
                scale = torch.from_numpy(unpack_scale(slot, model.tensors[f"{slot.key}.scale"]).copy())
            weights[slot.key] = Weight(kind, values, scale)
    return weights, few_bits
