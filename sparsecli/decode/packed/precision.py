"""The number formats of a packed model: one for each part, and with them the type of every tensor of the plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sparsecli.decode.packed.layouts import Slot
from sparsecli.decode.packed.tensors import slots
from sparsecli.spec.model import ModelSpec

INT8_RANK = 512  # the longest rank that is computed with in int8
WORDS = ("float32", "bfloat16", "int8", "int4")
FLOAT16 = "float16"
"""The type of models that are stored in it: of what has no other layout than rows."""
FLOAT16_PARTS = ("units", "projection", "head", "embedding")
INT4_PARTS = ("units", "projection", "head")
RESCORED_BY = {"int8": "bfloat16", "int4": "int8"}  # a head's type, and that of the weights that score again
RESCORED = 64  # tokens that they score


@dataclass(frozen=True)
class Precision:
    """The type of each part's weights: float32, bfloat16, int8 (a scale for each row) or int4 (for 64 columns of it).
    `FLOAT16_PARTS` may be float16, too, except tables of positions, which then are float32.

    Weights that the checkpoint itself holds quantized stay as they are.
    """

    units: str
    """Feed-forward matrices, dense or sparse; int4 is for dense ones, others become int8."""
    projection: str
    """Dense projections of attention."""
    controller: str
    """Controllers, routers and predictors."""
    multiplicative: str
    """D and E of multiplicative layers, the sparse loss layer's too."""
    convolution: str
    """Convolution kernels and what they remember: float32 or bfloat16."""
    head: str
    """Dense logits."""
    embedding: str
    """Tables of tokens and positions."""
    cache: str
    """Keys and values."""
    head_rescoring: bool = False
    """Score the likeliest tokens again with finer weights of the head, which are kept too: bfloat16 ones for an int8
    head, int8 ones for an int4 head."""

    @classmethod
    def of(cls, name: str, **changes: Any) -> Precision:
        """All parts as `name`, but for `changes`.

        `int8` keeps kernels, tables and the cache in bfloat16, which are a small part of what a token reads; so does
        `int4`, with int8 where int4 is not computed with. `float16` keeps the cache in bfloat16, and in float32
        what cannot be float16.
        """
        if name == FLOAT16:
            chosen = cls.of("float32", **dict.fromkeys(FLOAT16_PARTS, FLOAT16), cache="bfloat16")
            return replace(chosen, **changes)
        if name not in WORDS:
            raise ValueError(f"{name!r} is not one of {', '.join(WORDS)}")
        small = "bfloat16" if name in ("int8", "int4") else name
        other = "int8" if name == "int4" else name
        chosen = cls(name, name, other, other, small, name, small, small)
        return replace(chosen, **changes)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            words: tuple[str, ...] = WORDS if name in INT4_PARTS else WORDS[:-1]
            words += (FLOAT16,) if name in FLOAT16_PARTS else ()
            if name != "head_rescoring" and value not in words:
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(words)}")
        if self.convolution == "int8":
            raise ValueError("convolution: int8 kernels are not computed with; use bfloat16")
        if self.head_rescoring and self.head not in RESCORED_BY:
            raise ValueError("head_rescoring: needs an int8 or int4 head")


def head_candidates(spec: ModelSpec, precision: Precision) -> int:
    """Tokens that are scored again with finer weights of the head; 0: none."""
    if spec.quantization.head_candidates:
        return spec.quantization.head_candidates
    return RESCORED if _rescores(spec, precision) else 0


def _rescores(spec: ModelSpec, precision: Precision) -> bool:
    """Whether a dense head of float weights is kept twice."""
    quantized = spec.quantization.head or spec.head_module in spec.quantization.gguf
    return precision.head_rescoring and spec.vocabulary.kind == "dense" and not quantized


def plan(spec: ModelSpec, precision: Precision) -> list[tuple[Slot, str]]:
    """Every tensor and its type."""
    found = [_typed(slot, precision) for slot in slots(spec)]
    if _rescores(spec, precision):
        head = next(slot for slot, _ in found if slot.name == "head.weight")
        exact = replace(head, name="head.exact", layout="spans", bits=0)
        found.append((exact, RESCORED_BY[precision.head]))
    return found


def _typed(slot: Slot, precision: Precision) -> tuple[Slot, str]:
    if slot.bits or slot.gguf:
        return slot, "uint8"
    kind = getattr(precision, slot.part) if slot.part else "float32"
    if kind == "int4" and slot.layout == "spans":
        return replace(slot, layout="quantized", bits=4), "uint8"
    if kind == "int4":
        kind = "int8"
    if kind == FLOAT16 and slot.name == "positions":
        kind = "float32"
    # Longer sums of the controller's integers could leave 32 bits.
    return slot, "bfloat16" if kind == "int8" and slot.layout == "blocks" and slot.cols > INT8_RANK else kind
