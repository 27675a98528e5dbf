"""Packed tensors as matrices again: what the engine's readable twin computes with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecli.decode.packed.layouts import LANES, PAD, Slot, padded, unpack, unpack_scale
from sparsecli.decode.packed.pack import PackedModel
from sparsecli.decode.packed.precision import plan
from sparsecli.decode.packed.quantized_layouts import codes_of
from sparsecli.decode.packed.tensors import shares_codes
from sparsecli.model.gguf_types import PANEL_TYPES as GGUF_TYPES
from sparsecli.model.gguf_types import row_values
from sparsecli.model.gguf_types import values as gguf_values
from sparsecli.model.quantization import MIDDLE, STEPS, from_bfloat16, unpack_nibbles


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

    def widened(self, cols: int) -> Weight:
        """With zeros for further columns, up to `cols`: integers of an input share one scale, also those not read."""
        return Weight(self.kind, F.pad(self.values, (0, cols - self.values.shape[1])), self.scale)

    def row(self, index: int) -> Tensor:
        """One row (cols,) as the numbers that it stands for."""
        return self.values[index] * self.scale[index]


@dataclass(frozen=True)
class Quantized:
    """A packed matrix of 3 or 4 bits, or a residual, unpacked.

    Attributes:
        steps: (rows, G, GROUP), sixteenths of a step above zero, as float64; padding is arbitrary.
        scale: (rows, G).
    """

    steps: Tensor
    scale: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Quantized:
        """Only some rows."""
        return Quantized(self.steps[rows], self.scale[rows])

    def values(self) -> Tensor:
        """The matrix (rows, G * GROUP)."""
        return (self.steps / STEPS * self.scale[..., None]).float().flatten(1)


def unpack_quantized(slot: Slot, packed: np.ndarray) -> Quantized:
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

    return Quantized(rows(steps), rows(from_bfloat16(np.ascontiguousarray(scale))))


def unpack_residual(slot: Slot, packed: np.ndarray) -> Quantized:
    """The rows of every unit, one unit after the other."""
    units, groups = slot.rows // slot.group, padded(slot.cols, PAD) // PAD
    width = groups * (PAD // 2 + 2)
    rows = packed[: slot.elements].reshape(units, -1)[:, : slot.group * width].reshape(-1, width)
    codes = unpack_nibbles(rows[:, : groups * PAD // 2]).reshape(-1, groups, PAD)
    scale = np.ascontiguousarray(rows[:, groups * PAD // 2 :]).view(np.uint16)
    steps = (codes.astype(np.float64) - MIDDLE) * STEPS
    return Quantized(torch.from_numpy(steps), torch.from_numpy(from_bfloat16(scale)))


def unpack_model(model: PackedModel) -> tuple[dict[str, Weight], dict[str, Quantized]]:
    """Every tensor of a packed model, by its name there: those of 8 bits and more, and the others."""
    weights: dict[str, Weight] = {}
    quantized: dict[str, Quantized] = {}
    for slot, kind in plan(model.spec, model.precision):
        if slot.layout == "residual":
            quantized[slot.key] = unpack_residual(slot, model.tensors[slot.key])
        elif slot.layout == "quantized":
            quantized[slot.key] = unpack_quantized(slot, model.tensors[slot.key])
        elif slot.gguf:
            stored = GGUF_TYPES[slot.gguf]
            codes = model.tensors[slot.key][: slot.elements]
            if slot.layout == "gguf_rows":
                found = row_values(stored, codes.reshape(slot.rows, -1))
            else:
                panels = codes.reshape(stored.panel_shape(slot.rows, slot.cols))
                found = gguf_values(stored, panels, slot.rows, slot.cols)
            weights[slot.key] = Weight("gguf", torch.from_numpy(found), torch.ones(slot.rows))
        elif slot.key in model.tensors:
            values = torch.from_numpy(from_bfloat16(unpack(slot, model.tensors[slot.key])).copy())
            scale = torch.ones(slot.rows)
            if kind == "int8":
                scale = torch.from_numpy(unpack_scale(slot, model.tensors[f"{slot.key}.scale"]).copy())
            weights[slot.key] = Weight(kind, values, scale)
    if shares_codes(model.spec):
        sketched = model.spec.quantization.head_candidates
        weights["head.exact" if sketched else "head.weight"] = weights["embedding"]
    return weights, quantized
