"""What PyTorch remembers of a text, as the engine's readable twin takes it over."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sparsecli.decode.kv_state import KVState
from sparsecli.decode.packed.tensors import modules_of
from sparsecli.decode.reference.ops import join, round_trip
from sparsecli.decode.reference.step import Reference


def import_kv(reference: Reference, layers: Sequence[KVState], source: int = 0) -> None:
    """Begin a sequence with what PyTorch remembers of its beginning, see `Engine.import_kv`."""
    spec, precision = reference.spec, reference.precision
    reference.memory.clear()
    reference.length, reference.first = layers[0].positions, source

    def keep(name: str, rows: np.ndarray | None, kind: str) -> None:
        if rows is not None:
            reference.memory[name] = [round_trip(row, kind) for row in torch.from_numpy(rows)]

    for layer_idx, layer in enumerate(layers):
        index, second = divmod(layer_idx, spec.attention_layers)
        block = f"blocks.{index}."
        attention = f"{block}second." if second else block
        keep(f"{attention}keys", layer.keys, precision.cache)
        keep(f"{attention}values", layer.values, precision.cache)
        if layer.inputs is not None:
            inputs = torch.from_numpy(layer.inputs)
            m, x = inputs.split((spec.d_model, inputs.shape[1] - spec.d_model), dim=1)
            keep(f"{attention}shared", m.numpy(), precision.convolution)
            how, modules = spec.attention.value_concat, modules_of(spec)
            joined = [join(*row, how, modules) for row in zip(m, x, strict=True)]
            keep(f"{attention}joined", torch.stack(joined).numpy(), precision.convolution)
        keep(f"{attention}output", layer.output_inputs, precision.convolution)
        for cell, states in enumerate(() if layer.states is None else layer.states):
            keep(f"{block}sru.cells.{cell}", states, "float32")
