"""Packed models: weights put once into the layouts that the engine reads."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import psutil

from sparsecli.console import Failure
from sparsecli.decode.packed.layouts import Slot, arrange
from sparsecli.decode.packed.position_tables import position_table
from sparsecli.decode.packed.precision import Precision, plan
from sparsecli.decode.packed.quantized_layouts import arrange_panels, arrange_residual
from sparsecli.decode.packed.tensor_file import TYPES, WIDTHS
from sparsecli.decode.packed.tensors import FREQUENCIES
from sparsecli.model.gguf_types import PANEL_TYPES as GGUF_TYPES
from sparsecli.model.quantization import GROUP, from_bfloat16, quantize_groups, to_bfloat16, unpack_nibbles
from sparsecli.model.rotary import rotary_frequencies
from sparsecli.spec.model import ModelSpec

LINE = 64  # bytes: every packed tensor starts on a cache line


@dataclass(frozen=True)
class PackedModel:
    """A model as the engine reads it: flat arrays by name, int8 ones with their `.scale` beside them."""

    spec: ModelSpec
    precision: Precision
    tensors: Mapping[str, np.ndarray]
    from_disk: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def huge_pages(nbytes: int) -> np.ndarray:
    """Zeros (nbytes,) as bytes, in huge pages where the system has them.

    Raises:
        Failure: there is not so much memory.
    """
    # Shared memory, the default, gets no huge pages; Windows has no choice.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    lacking = Failure(f"{nbytes / 1e9:.1f} GB of memory are needed for the weights, but are not there")
    if nbytes > psutil.virtual_memory().available:  # the system would promise it and kill the process later
        raise lacking
    try:
        memory = mmap.mmap(-1, max(nbytes, 1), **private)
    except (OSError, ValueError) as error:
        raise lacking from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def place(planned: list[tuple[Slot, str]]) -> dict[str, np.ndarray]:
    """Arrays for every planned tensor, each on its own cache lines of one piece of memory."""
    sizes: list[tuple[str, str, int]] = []
    for slot, kind in planned:
        sizes.append((slot.key, kind, slot.elements))
        if kind == "int8":
            sizes.append((f"{slot.key}.scale", "float32", slot.scales))
    lengths = [-(-count * WIDTHS[kind] // LINE) * LINE for _, kind, count in sizes]
    memory = huge_pages(sum(lengths))
    arrays: dict[str, np.ndarray] = {}
    at = 0
    for (key, kind, _), length in zip(sizes, lengths, strict=True):
        arrays[key] = memory[at : at + length].view(TYPES[kind])
        at += length
    return arrays


def pack(spec: ModelSpec, weights: Mapping[str, np.ndarray], precision: Precision) -> PackedModel:
    """Repack a state dict. `weights` are float32, float16, or bfloat16 as uint16; quantized codes are uint8.

    Raises:
        Failure: a tensor is missing, has another shape, or holds a NaN or an infinity.
    """
    planned = [(slot, kind) for slot, kind in plan(spec, precision) if not _left_out(slot, weights)]
    arrays = place(planned)
    for slot, kind in planned:
        target = arrays[slot.key]
        if slot.gguf:
            _write(target, _codes(slot, weights))
            continue
        if slot.bits:
            _write(target, _in_few_bits(slot, spec, weights))
            continue
        source = _source(slot, spec, weights)
        if kind == "int8":
            quantised, scale = quantise_rows(source)
            _write(target, arrange(slot, quantised))
            _write(arrays[f"{slot.key}.scale"], _arrange_scale(slot, scale))
        else:
            _write(target, arrange(slot, _narrowed(source, kind)))
    return PackedModel(spec, precision, arrays)


def _narrowed(source: np.ndarray, kind: str) -> np.ndarray:
    """float32 weights as a float type."""
    if kind == "float16":
        return source.astype(np.float16)
    return source if kind == "float32" else to_bfloat16(source)


def _left_out(slot: Slot, weights: Mapping[str, np.ndarray]) -> bool:
    return slot.optional and any(name not in weights for name in slot.sources)


def _write(target: np.ndarray, values: np.ndarray) -> None:
    target[: values.size] = values


def _codes(slot: Slot, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Codes of a GGUF file, which are stored as the engine reads them."""
    [name] = slot.sources
    kind = GGUF_TYPES[slot.gguf]
    expected = kind.panel_shape(slot.rows, slot.cols)
    if slot.layout == "gguf_rows":
        expected = slot.rows, kind.row_bytes(slot.cols)
    if name not in weights:
        raise Failure(f"tensor {name} is missing")
    found = weights[name]
    if found.shape != expected or found.dtype != np.uint8:
        raise Failure(f"tensor {name} is {found.dtype} {found.shape}, expected {expected}")
    return found.reshape(-1)


def _in_few_bits(slot: Slot, spec: ModelSpec, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """The tensor's bytes, from codes as they are stored or from float weights."""
    if slot.layout == "residual":
        codes, scale = ([_stored(name, slot, weights) for name in slot.sources[at::2]] for at in range(2))
        return arrange_residual(codes, scale).reshape(-1)
    if len(slot.sources) == 1:  # float weights
        return arrange_panels(*quantize_groups(_source(slot, spec, weights), slot.bits), slot.bits).reshape(
            -1
        )
    stored = [_stored(name, slot, weights) for name in slot.sources]
    maps = [stored[at : at + 3] for at in range(0, len(stored), 3)]
    panels = [arrange_panels(unpack_nibbles(codes), scale, zero, slot.bits) for codes, scale, zero in maps]
    return np.stack(panels, axis=1).reshape(-1)  # those of all maps in turn


def _stored(name: str, slot: Slot, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """A stored part of a quantized matrix: uint8, or scales as bfloat16.

    Raises:
        Failure: it is missing, has another shape or type, holds codes that have more bits, a NaN or an infinity.
    """
    if name not in weights:
        raise Failure(f"tensor {name} is missing")
    found = weights[name]
    groups = -(-slot.cols // GROUP)
    codes, scale = name.endswith(".codes"), name.endswith(".scale")
    expected = (slot.rows // slot.group, groups * GROUP // 2 if codes else groups)
    if found.shape != expected or (found.dtype == np.uint8) == scale:
        raise Failure(f"tensor {name} is {found.dtype} {found.shape}, expected {expected}")
    if scale and not np.isfinite(from_bfloat16(found)).all():
        raise Failure(f"tensor {name} holds a NaN or an infinity; the checkpoint is damaged")
    if codes and slot.bits == 3 and (found & 0x88).any():
        raise Failure(f"tensor {name} holds codes of more than 3 bits; the checkpoint is damaged")
    return to_bfloat16(from_bfloat16(found)) if scale else found


def _source(slot: Slot, spec: ModelSpec, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """The tensor's weights (rows, cols) as float32."""
    if slot.name in FREQUENCIES:
        return frequencies(spec, slot.name)[None]
    found = [_floats(name, weights) for name in slot.sources]
    if slot.name == "positions" and spec.positions != "learned":
        return position_table(spec, found)
    for name, tensor in zip(slot.sources, found, strict=True):
        if tensor.size != slot.source_elements:
            raise Failure(f"tensor {name} is {tensor.shape}, expected {slot.source_elements} elements")
    if slot.layout == "units":  # the rows of one unit side by side
        return np.stack(found, axis=1).reshape(slot.rows, slot.cols)
    if slot.name == "controller.bias":  # units that only fill a block up are never chosen
        blocks = found[0].reshape(-1, slot.group)
        fill = slot.cols // blocks.shape[0] - slot.group
        return np.pad(blocks, ((0, 0), (0, fill)), constant_values=-np.inf).reshape(1, -1)
    return found[0].reshape(slot.rows, slot.cols)


def _floats(name: str, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """A tensor as float32."""
    if name not in weights:
        raise Failure(f"tensor {name} is missing")
    if weights[name].dtype == np.uint8:
        raise Failure(f"tensor {name} is uint8, expected float weights")
    found = from_bfloat16(weights[name])
    if not np.isfinite(found).all():
        raise Failure(f"tensor {name} holds a NaN or an infinity; the checkpoint is damaged")
    return found


def frequencies(spec: ModelSpec, name: str) -> np.ndarray:
    """Angles a position of rotary or sinusoidal positions, float32, in the model's own arithmetic.

    `name`: of their tensor, one of `FREQUENCIES`.
    """
    if spec.positions == "rotary":
        return rotary_frequencies(spec, FREQUENCIES[name])
    exponents = np.arange(0, spec.d_model, 2, dtype=np.float32) / np.float32(spec.d_model)
    return (np.float32(10000.0) ** -exponents).astype(np.float32)


def quantise_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(R, C) -> int8 (R, C) and scales (R,): the largest weight of a row becomes 127 or -127."""
    scale = np.abs(rows).max(axis=1) / 127
    whole = np.divide(rows, scale[:, None], out=np.zeros_like(rows), where=scale[:, None] > 0)
    return np.rint(whole).astype(np.int8), scale.astype(np.float32)


def _arrange_scale(slot: Slot, scale: np.ndarray) -> np.ndarray:
    """Scales where the kernels look for them: filled up like their rows."""
    if slot.layout == "blocks":
        blocks = scale.reshape(-1, slot.group)
        width = slot.scales // blocks.shape[0]
        return np.pad(blocks, ((0, 0), (0, width - slot.group))).reshape(-1)
    return np.pad(scale, (0, slot.scales - scale.size))
