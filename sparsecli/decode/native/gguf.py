"""Rows of a GGUF file in the engine's panels: by the library, or by its twin in NumPy where that is not there."""

from __future__ import annotations

import numpy as np

from sparsecli.decode.native import binding
from sparsecli.model import gguf_types
from sparsecli.model.gguf_types import LANES, GgufType

TYPE_CODES = {name: code for code, name in enumerate(gguf_types.PANEL_TYPES, 5)}
"""Numbers of the types in native/ops/ops.h, in the same order."""
THREADS = 2


def arrange(kind: GgufType, raw: np.ndarray, cols: int) -> np.ndarray:
    """`raw` (R, bytes of a row) uint8, as in a GGUF file, as panels (ceil(R / 16), bytes)."""
    if binding.available() is not None:
        return gguf_types.arrange(kind, raw, cols)
    rows = raw.shape[0]
    panels = np.zeros((-(-rows // LANES), kind.panel_bytes(cols)), np.uint8)
    whole = np.ascontiguousarray(raw)
    done = binding.library().sparsecli_arrange_gguf(
        TYPE_CODES[kind.name], whole.ctypes.data, rows, cols, panels.ctypes.data, THREADS
    )
    assert done == 0
    return panels
