"""The order of packed weights in memory: panels for outer products, spans of long rows, blocks of controllers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sparsecli.decode.layout import LANES, PAD, Slot, padded

PANEL = 64
SPAN = 2048


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
