"""What PyTorch remembers of a text that it read, for the engine and its twin to go on from there.

Of a prompt or a source longer than a chunk, hashed attention makes other numbers in one pass than token by token, and
the pass is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sparsecli.decode.packed.tensors import convolves
from sparsecli.spec.model import ModelSpec


@dataclass(frozen=True)
class KVState:
    """Of one attention layer and P positions, float32; None where the model has no such thing."""

    keys: np.ndarray
    """(P, H, d_head)."""
    values: np.ndarray
    """(P, H, d_head)."""
    inputs: np.ndarray | None = None
    """Of the projection's convolutions (P, d), or (P, 2 d) with what values read beside them."""
    output_inputs: np.ndarray | None = None
    """Of the output projection's convolution (P, d)."""
    states: np.ndarray | None = None
    """Of the block's recurrent units after each position (units, P, width), with its first attention layer."""

    @property
    def positions(self) -> int:
        """P."""
        return len(self.keys)


class CacheLayer(Protocol):
    """A layer of `model.cache.DecodeCache`."""

    keys: Any
    values: Any
    rows: Mapping[str, Any]


def kv_states(spec: ModelSpec, layers: Sequence[CacheLayer], positions: int) -> list[KVState]:
    """The first `positions` of a cache, of its only sequence."""
    return [
        KVState(**_parts(spec, layer, positions, layer_idx % spec.attention_layers == 0))
        for layer_idx, layer in enumerate(layers)
    ]


def _parts(spec: ModelSpec, layer: CacheLayer, positions: int, first: bool) -> dict[str, np.ndarray]:
    def array(held: Any) -> np.ndarray:
        return np.ascontiguousarray(held.float().numpy())

    parts = {
        name: array(getattr(layer, name)[0, :, :positions].transpose(0, 1)) for name in ("keys", "values")
    }
    before = spec.attention.kernel - 1
    row = slice(before, before + positions)
    if convolves(spec):
        parts["inputs"] = array(layer.rows["projection"][0, row])
    if spec.attention.output == "multiplicative_conv":
        parts["output_inputs"] = array(layer.rows["output"][0, row])
    if spec.sru and first:
        cells = [array(layer.rows[f"recurrent.{index}"][0, :positions]) for index in range(spec.sru.layers)]
        parts["states"] = np.stack(cells)
    return parts
