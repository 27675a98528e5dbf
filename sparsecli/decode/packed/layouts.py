"""One packed tensor and its layout in memory: how long it is, how weights are put into it and read back.

The layouts are those of native/ops/ops.h. Rows are PAD elements or a multiple long and outputs come in multiples of
LANES; what fills them up is zero. Panels are for outer products, spans for long rows, blocks for controllers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sparsecli.decode.packed.quantized_layouts import LANES, panel_bytes, residual_bytes
from sparsecli.model.gguf_types import PANEL_TYPES as GGUF_TYPES

PAD = 64
PANEL = 64
SPAN = 2048

Layout = Literal[
    "vector",
    "rows",
    "spans",
    "panels",
    "taps",
    "blocks",
    "units",
    "quantized",
    "residual",
    "gguf",
    "gguf_rows",
]


def padded(value: int, step: int) -> int:
    """`value` rounded up to a multiple of `step`."""
    return -(-value // step) * step


@dataclass(frozen=True)
class Slot:
    """One packed tensor.

    Attributes:
        layer: block it belongs to, -1 for the model's own.
        rows, cols: outputs and inputs of the map; `units`, `residual` and a sketch count every row of every unit.
        part: field of `Precision` that gives its type; None is float32.
        sources: names in the Hugging Face state dict; several for `units`, in order.
        optional: leave it out where the state dict has no such tensor.
        group: `blocks`: units of a block; `taps`: positions of the kernel; `residual`: rows of a unit; `quantized`:
            maps of which panels follow each other in turn.
        bits: of a weight of the layouts `quantized` and `residual`; their elements are bytes.
        gguf: the type of the layouts `gguf` and `gguf_rows`, whose elements are bytes, too.
    """

    layer: int
    name: str
    layout: Layout
    rows: int
    cols: int
    part: str | None
    sources: tuple[str, ...]
    optional: bool = False
    group: int = 1
    bits: int = 0
    gguf: str = ""

    @property
    def key(self) -> str:
        """Its name in a packed model."""
        return self.name if self.layer < 0 else f"blocks.{self.layer}.{self.name}"

    @property
    def elements(self) -> int:
        """Elements in memory, padding included."""
        rows, cols = self.rows, self.cols
        if self.layout == "vector":
            return padded(cols, PAD)
        if self.layout == "panels":
            return padded(rows, LANES) * padded(cols, PAD)
        if self.layout == "taps":
            return padded(rows, LANES) * padded(cols // self.group, 4) * self.group
        if self.layout == "blocks":
            return rows // self.group * padded(self.group, LANES) * padded(cols, 2)
        if self.layout == "quantized":
            return self.group * padded(rows // self.group, LANES) // LANES * panel_bytes(cols, self.bits)
        if self.layout == "gguf":
            return math.prod(GGUF_TYPES[self.gguf].panel_shape(rows, cols))
        if self.layout == "gguf_rows":
            return rows * GGUF_TYPES[self.gguf].row_bytes(cols)
        if self.layout == "residual":
            return rows // self.group * residual_bytes(cols, self.group)
        return rows * padded(cols, PAD)

    @property
    def source_elements(self) -> int:
        """Elements of each of its sources."""
        if self.name == "controller.bias":  # blocks are filled up when they are packed
            return self.cols // padded(self.group, LANES) * self.group
        return self.rows * self.cols // len(self.sources)

    @property
    def scales(self) -> int:
        """Scales when the weights are int8."""
        if self.layout == "panels":
            return padded(self.rows, LANES)
        if self.layout == "blocks":
            return self.rows // self.group * padded(self.group, LANES)
        return self.rows


def arrange(slot: Slot, weights: np.ndarray) -> np.ndarray:
    """The packed order of `weights` (rows, cols), already of their final type; int8 panels are stored as w + 128."""
    kind = weights.dtype
    if slot.layout == "panels":
        return np.concatenate(list(_panels(_fill(weights, LANES, PAD))))
    if slot.layout == "taps":
        taps = weights.reshape(slot.rows, slot.group, -1)  # (M_out, F_h, F_w * M_in)
        filled = [_fill(taps[:, tap], LANES, 4) for tap in range(slot.group)]
        return np.concatenate([panel for tap in filled for panel in _panels(tap)])
    if slot.layout == "blocks":
        blocks = weights.reshape(-1, slot.group, slot.cols)  # (blocks, N, r)
        unit_pad, rank_pad = padded(slot.group, LANES) - slot.group, padded(slot.cols, 2) - slot.cols
        filled_blocks = np.pad(blocks, ((0, 0), (0, unit_pad), (0, rank_pad)))
        if kind == np.float32:
            return filled_blocks.transpose(0, 2, 1).reshape(-1)  # [block][rank][unit]
        pairs = filled_blocks.reshape(*filled_blocks.shape[:2], -1, 2)
        return pairs.transpose(0, 2, 1, 3).reshape(-1)  # [block][rank / 2][unit][2]
    rows = _fill(weights, 1, PAD)
    if slot.layout == "spans":
        return np.concatenate([rows[:, at : at + SPAN].reshape(-1) for at in range(0, rows.shape[1], SPAN)])
    return rows.reshape(-1)


def _fill(matrix: np.ndarray, rows: int, cols: int) -> np.ndarray:
    height, width = matrix.shape
    return np.pad(matrix, ((0, padded(height, rows) - height), (0, padded(width, cols) - width)))


def _panels(matrix: np.ndarray) -> Iterator[np.ndarray]:
    """Panels of PANEL outputs of (outputs, inputs), each [inputs / p][outputs][p]."""
    together = {4: 1, 2: 2, 1: 4}[matrix.dtype.itemsize]
    if matrix.dtype == np.int8:
        matrix = (matrix.view(np.uint8) ^ 0x80).view(np.int8)  # w + 128 as an unsigned byte
    for start in range(0, matrix.shape[0], PANEL):
        panel = matrix[start : start + PANEL]
        yield panel.reshape(panel.shape[0], -1, together).transpose(1, 0, 2).reshape(-1)


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
