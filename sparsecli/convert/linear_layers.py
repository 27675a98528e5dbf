"""Linear layers and the weight types of GGUF that each may have; and the choice of a type for each within a budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sparsecli.model.gguf_types import HEAD_LANES, LANES, SKETCH, TYPES
from sparsecli.model.tensors import tensor_shapes
from sparsecli.spec.model import ModelSpec, QuantizationSpec

WIDE_TYPES = ("Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
"""Types of matrices whose rows are a multiple of 256 long."""
NARROW_TYPES = ("IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Types of the others. Q4_0 is as large as IQ4_NL and loses more in every layer that was measured."""
EMBEDDING, HEAD = "model.embedding", "head"
CANDIDATES = (512, 1024, 2048)
"""Tokens that a head with a sketch may score with its own weights. Twice as many halve what the sketch adds to the
loss (measured: docs/conversion.md)."""


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer that can be rounded.

    Attributes:
        name: of its module; with logits that are tied to the embedding, the embedding's.
        kept: the type that its weights have already, None for floating point.
    """

    name: str
    rows: int
    cols: int
    kept: str | None

    @property
    def types(self) -> list[str]:
        """The types into which it is rounded: those that are smaller than what it has."""
        fitting = WIDE_TYPES if self.cols % 256 == 0 else NARROW_TYPES if self.cols % 32 == 0 else ()
        most = self.bits(self.kept) if self.kept else math.inf
        return [name for name in fitting if self.bits(name) < most]

    @staticmethod
    def bits(name: str) -> float:
        """Bits of a weight, with its share of scales."""
        return TYPES[name].block_bytes * 8 / TYPES[name].block

    def bytes(self, name: str) -> int:
        """Bytes in a type."""
        return round(self.rows * self.cols * self.bits(name) / 8)

    @property
    def candidates(self) -> list[int]:
        """Numbers of tokens that its own weights may score, if a sketch scores all; at most a sixteenth of all."""
        if self.name not in (EMBEDDING, HEAD) or self.cols % SKETCH.block:
            return []
        most = self.rows // (LANES * HEAD_LANES) * HEAD_LANES
        return [count for count in CANDIDATES if count <= most] or [most] * (most > 0)

    @property
    def exact(self) -> str:
        """The type of the head's own weights beside a sketch, of which a token reads little."""
        return self.kept or "Q8_0"

    def bytes_with_sketch(self, candidates: int) -> int:
        """Bytes of a head that a token reads with a sketch."""
        of_sketch = self.rows * SKETCH.panel_bytes(self.cols) // LANES
        return of_sketch + candidates * TYPES[self.exact].row_bytes(self.cols)


@dataclass(frozen=True)
class TypeOption:
    """A type that a linear layer may have.

    Attributes:
        bytes: that a token reads.
        increase: estimated increase of the loss, nats/token.
        candidates: of a head with a sketch, see `QuantizationSpec.head_candidates`; else 0.
    """

    layer: LinearLayer
    type: str
    bytes: int
    increase: float
    candidates: int = 0


@dataclass(frozen=True)
class TypeChoice:
    """A type for every linear layer.

    Attributes:
        types: by the modules' names.
        increase: estimated increase of the loss, nats/token.
        head_candidates: see `QuantizationSpec.head_candidates`.
    """

    types: dict[str, str]
    bytes: int
    increase: float
    head_candidates: int | None = None

    @property
    def shares(self) -> str:
        """The types with their numbers of layers, such as `Q4_K x 140, Q6_K x 57`."""
        counts = Counter(self.types.values())
        words = [f"{name} x {count}" for name, count in sorted(counts.items())]
        return ", ".join(words + ["logits from a sketch"] * bool(self.head_candidates))


def linear_layers(spec: ModelSpec) -> list[LinearLayer]:
    """The linear layers of a dense decoder in the order of its modules, the logits last."""
    kept = spec.quantization.gguf
    plain = spec.model_copy(update={"quantization": QuantizationSpec()})
    found = []
    for tensor, shape in tensor_shapes(plain).items():
        module, _, ending = tensor.rpartition(".")
        inside = module.startswith("model.layers.") or module == (EMBEDDING if spec.tied else HEAD)
        if ending == "weight" and len(shape) == 2 and inside:
            found.append(LinearLayer(module, *shape, kept.get(module)))
    return sorted(found, key=lambda each: each.name == EMBEDDING)


def with_types(spec: ModelSpec, types: Mapping[str, str], head_candidates: int | None = None) -> ModelSpec:
    """`spec` with these types of modules, others stay; and a sketch of the head, where there are candidates."""
    fields = {"gguf": {**spec.quantization.gguf, **types}, "head_candidates": head_candidates}
    return spec.model_copy(update={"quantization": QuantizationSpec.model_validate(fields)})


def choose_types(options: Sequence[TypeOption], most_increase: float) -> TypeChoice | None:
    """The choice with the fewest bytes whose estimated increase of the loss (nats/token) is at most this; or None.

    Beginning with the largest type of every layer, one layer after another takes a smaller type, where a byte less
    costs least. A step that would go beyond the limit is left out, and smaller ones after it may still fit.
    """
    groups = _by_layer(options)
    chosen = {name: group[-1] for name, group in groups.items()}
    increase = sum(each.increase for each in chosen.values())
    if increase > most_increase:
        return None
    steps = [(smaller, larger) for group in groups.values() for smaller, larger in pairwise(group)]
    for smaller, larger in sorted(steps, key=lambda step: _gain(*step)):
        name, more = larger.layer.name, smaller.increase - larger.increase
        if chosen[name] is larger and increase + more <= most_increase:
            chosen[name] = smaller
            increase += more
    return _choice(chosen)


def least_increase(options: Sequence[TypeOption], most_bytes: int) -> TypeChoice | None:
    """The choice with the least estimated increase of the loss within so many bytes; None if there is none.

    Beginning with the smallest type of every layer, one layer after another takes a larger one, where a byte more
    gains most.
    """
    groups = _by_layer(options)
    chosen = {name: group[0] for name, group in groups.items()}
    size = sum(each.bytes for each in chosen.values())
    if size > most_bytes:
        return None
    steps = [(smaller, larger) for group in groups.values() for smaller, larger in pairwise(group)]
    for smaller, larger in sorted(steps, key=lambda step: -_gain(*step)):
        name, more = larger.layer.name, larger.bytes - smaller.bytes
        if chosen[name] is smaller and size + more <= most_bytes:
            chosen[name] = larger
            size += more
    return _choice(chosen)


def frontier(options: Sequence[TypeOption], count: int) -> list[TypeChoice]:
    """`count` choices from the smallest to the largest, evenly apart in bytes."""
    groups = _by_layer(options).values()
    fewest, most = (sum(group[at].bytes for group in groups) for at in (0, -1))
    sizes = [fewest + (most - fewest) * at // (count - 1) for at in range(count)]
    found = [least_increase(options, size) for size in sizes]
    return list({each.bytes: each for each in found if each}.values())


def _by_layer(options: Sequence[TypeOption]) -> dict[str, list[TypeOption]]:
    """The options of every layer that may be best at some price of a byte, from the smallest to the largest."""
    groups: dict[str, list[TypeOption]] = {}
    for option in sorted(options, key=lambda each: (each.bytes, each.increase)):
        group = groups.setdefault(option.layer.name, [])
        if group and group[-1].increase <= option.increase:
            continue
        while len(group) > 1 and _gain(group[-2], group[-1]) <= _gain(group[-2], option):
            group.pop()
        group.append(option)
    return groups


def _gain(smaller: TypeOption, larger: TypeOption) -> float:
    """What a byte more takes off the loss."""
    return (smaller.increase - larger.increase) / max(1, larger.bytes - smaller.bytes)


def _choice(chosen: Mapping[str, TypeOption]) -> TypeChoice:
    options = chosen.values()
    return TypeChoice(
        {each.layer.name: each.type for each in options},
        sum(each.bytes for each in options),
        sum(each.increase for each in options),
        max(each.candidates for each in options) or None,
    )
