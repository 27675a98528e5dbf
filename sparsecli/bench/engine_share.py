"""What share of the memory's speed the engine's own matrix-vector products reach, by weight type."""

from __future__ import annotations

import time

from sparsecli.bench.weights import Pools, packed_elements, packed_model
from sparsecli.decode.engine import Engine
from sparsecli.decode.packed.precision import Precision
from sparsecli.decode.packed.tensor_file import WIDTHS
from sparsecli.spec.model import ModelSpec

TYPES = ("float32", "bfloat16", "int8", "int4")
WEIGHT_BYTES = 128 * 2**20  # several times the last-level cache of most processors
D_MODEL = 2048
STEPS = 4  # of which the best counts
BYTES = {**WIDTHS, "int4": 0.55}  # with a scale and a zero for 64 weights


def shares(gb_per_second: float) -> dict[str, float]:
    """Share of `gb_per_second` by weight type, of one dense layer with about WEIGHT_BYTES of weights.

    Raises:
        Failure: memory does not suffice, or the native engine cannot be used.
    """
    return {kind: round(_speed(kind, WEIGHT_BYTES) / gb_per_second, 3) for kind in TYPES}


def _speed(kind: str, weight_bytes: int) -> float:
    """GB/s of a step."""
    units = int(weight_bytes / BYTES[kind] / (2 * D_MODEL)) // 64 * 64
    spec = ModelSpec.model_validate(
        {
            "d_model": D_MODEL,
            "layers": 1,
            "heads": 16,
            "max_positions": 64,
            "feed_forward": {"kind": "dense", "d_ff": units},
            "attention": {"projection": "dense"},
            "vocabulary": {"kind": "dense", "size": 256},
        }
    )
    precision = Precision.of(kind)
    packed = packed_model(spec, precision, Pools.of(packed_elements(spec, precision)))
    engine = Engine(packed)
    try:
        sequence, best = engine.sequence(64), float("inf")
        for token in range(STEPS):
            start = time.perf_counter()
            engine.step(sequence, token)
            best = min(best, time.perf_counter() - start)
    finally:
        engine.close()
    read = sum(
        tensor.nbytes for name, tensor in packed.tensors.items() if name not in ("embedding", "positions")
    )
    return read / best / 1e9
