"""Random weights. All models of a bench share the same memory, because they never run at the same time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from sparsecli.decode.packed.layouts import LANES, Slot, padded
from sparsecli.decode.packed.pack import PackedModel, frequencies, huge_pages
from sparsecli.decode.packed.precision import Precision, plan
from sparsecli.decode.packed.tensor_file import TYPES, WIDTHS
from sparsecli.decode.packed.tensors import FREQUENCIES
from sparsecli.model.auto import Network, build
from sparsecli.model.quantization import to_bfloat16
from sparsecli.model.tensors import tensor_shapes
from sparsecli.model.vision import ScalingTransformerForImageClassification
from sparsecli.spec.model import ModelSpec
from sparsecli.spec.vision import AnySpec

TILE = 4_194_301  # prime, so that no two matrices start at the same place of the repeated tile
STANDARD_DEVIATION = 0.02
INTEGER_DEVIATION = 40
BIAS_SCALE = 1e-3
LINE = 64  # bytes: a cache line, on which every matrix starts


@dataclass(frozen=True)
class Pools:
    """Pools of normal numbers, one for each weight type: float32, bfloat16 as uint16, int8; codes are bytes."""

    arrays: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, elements: Mapping[str, int]) -> Pools:
        """Pools of these numbers of elements. A random tile is repeated: drawing billions takes longer than measuring.

        Raises:
            Failure: there is too little memory.
        """
        normal = np.random.default_rng(0).standard_normal(TILE, dtype=np.float32)
        small = normal * np.float32(STANDARD_DEVIATION)
        tiles = {
            "float32": lambda: small,
            "bfloat16": lambda: to_bfloat16(small),
            "int8": lambda: np.clip(np.rint(normal * INTEGER_DEVIATION), -127, 127).astype(np.int8),
            # Scales are stored between the codes; as bfloat16 these bytes are small numbers.
            "uint8": lambda: np.random.default_rng(0).integers(0x38, 0x3C, TILE, np.uint8),
        }
        arrays = {}
        for kind, count in elements.items():
            tile = tiles[kind]()
            array: np.ndarray = huge_pages(count * WIDTHS[kind]).view(TYPES[kind])
            for start in range(0, count, TILE):
                part = array[start : start + TILE]
                part[:] = tile[: part.size]
            arrays[kind] = array
        return cls(arrays)

    def tensor(self, kind: str) -> torch.Tensor:
        """The pool of a float type for PyTorch."""
        if kind == "bfloat16":
            return torch.from_numpy(self.arrays[kind].view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(self.arrays[kind])


def largest(needs: list[dict[str, int]]) -> dict[str, int]:
    """The maximum of `needs` for each type."""
    return {
        kind: max(need.get(kind, 0) for need in needs)
        for kind in WIDTHS
        if any(need.get(kind) for need in needs)
    }


def _lines(elements: int, kind: str) -> int:
    """`elements`, rounded up to whole cache lines."""
    return padded(elements, LINE // WIDTHS[kind])


# -- for the native engine -----------------------------------------------------------------------------------


def planned(spec: ModelSpec, precision: Precision) -> list[tuple[Slot, str]]:
    """Every packed tensor that `spec` has, and its type."""
    names = tensor_shapes(spec)
    return [
        (slot, kind)
        for slot, kind in plan(spec, precision)
        if not slot.optional or all(source in names for source in slot.sources)
    ]


def packed_elements(spec: ModelSpec, precision: Precision, *, overlapping: bool = False) -> dict[str, int]:
    """Elements of the pools that `packed_model` needs."""
    needed: dict[str, int] = {}
    for slot, kind in planned(spec, precision):
        if slot.layout != "vector":
            count, before = _lines(slot.elements, kind), needed.get(kind, 0)
            needed[kind] = max(before, count) if overlapping else before + count
    return needed


def packed_model(
    spec: ModelSpec, precision: Precision, pools: Pools, *, overlapping: bool = False
) -> PackedModel:
    """A packed model whose matrices are views into `pools`; its vectors and scales have memory of their own.

    `overlapping`: every matrix starts at the beginning of its pool. This is for models that are written to a file.
    """
    arrays: dict[str, np.ndarray] = {}
    taken: dict[str, int] = {}
    tensors = planned(spec, precision)
    for slot, kind in tensors:
        if slot.layout == "vector":
            continue
        start = 0 if overlapping else taken.get(kind, 0)
        taken[kind] = start + _lines(slot.elements, kind)
        arrays[slot.key] = pools.arrays[kind][start : taken[kind]]
    small = {slot.key: slot.elements for slot, _ in tensors if slot.layout == "vector"}
    small |= {f"{slot.key}.scale": slot.scales for slot, kind in tensors if kind == "int8"}
    lengths = {key: _lines(count, "float32") for key, count in small.items()}
    room = huge_pages(sum(lengths.values()) * WIDTHS["float32"]).view(np.float32)
    at = 0
    for key, length in lengths.items():
        arrays[key] = room[at : at + length]
        at += length
    for slot, kind in tensors:
        if slot.layout == "vector":
            _fill_vector(slot, arrays[slot.key], spec)
        if kind == "int8":
            arrays[f"{slot.key}.scale"][:] = STANDARD_DEVIATION / INTEGER_DEVIATION
    return PackedModel(spec, precision, arrays)


def _fill_vector(slot: Slot, array: np.ndarray, spec: ModelSpec) -> None:
    if slot.name in FREQUENCIES:
        array[: slot.cols] = frequencies(spec, slot.name)
    elif slot.name.endswith("norm.weight") or slot.name == "importance":
        array[:] = 1
    elif slot.name == "controller.bias":  # units that pad a block are never chosen
        width = padded(slot.group, LANES)
        blocks = array[: slot.cols].reshape(-1, width)
        blocks[:, slot.group :] = -np.inf


# -- for PyTorch ---------------------------------------------------------------------------------------------


def empty_model(spec: AnySpec) -> Network | ScalingTransformerForImageClassification:
    """The model on the meta device. It stores nothing but parameters, so that only these are missing."""
    with torch.device("meta"):
        return build(spec)


def torch_elements(spec: AnySpec, dtype: str) -> dict[str, int]:
    """Elements of the pools that `torch_weights` needs."""
    return {
        dtype: sum(
            _lines(parameter.numel(), dtype)
            for parameter in empty_model(spec).parameters()
            if parameter.dim() > 1
        )
    }


def torch_weights(spec: AnySpec, dtype: str, pools: Pools) -> dict[str, torch.Tensor]:
    """Weights by name: matrices as views into `pools`, biases small, normalisation weights one."""
    pool = pools.tensor(dtype)
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    position = 0
    for name, parameter in empty_model(spec).named_parameters():
        if parameter.dim() > 1:
            weights[name] = pool[position : position + parameter.numel()].view(parameter.shape)
            position += _lines(parameter.numel(), dtype)
        elif "norm" in name and name.endswith("weight"):
            weights[name] = torch.ones(parameter.shape, dtype=pool.dtype)
        else:
            values = torch.empty(parameter.shape).normal_(0, BIAS_SCALE, generator=generator)
            weights[name] = values.to(pool.dtype)
    return weights
