"""Bytes that a decode step reads: its active weights in their packed types, and cached keys and values."""

from __future__ import annotations

from collections.abc import Sequence

from sparsecli.bench.random_weights import planned
from sparsecli.decode.packed.layouts import LANES, Slot, padded
from sparsecli.decode.packed.precision import Precision
from sparsecli.decode.packed.tensor_file import WIDTHS
from sparsecli.decode.packed.tensors import FREQUENCIES, crosses, joins, shares_codes
from sparsecli.model.gguf_types import TYPES
from sparsecli.model.quantization import GROUP
from sparsecli.spec.model import ModelSpec

SCALE_BYTES = 4
BUCKET_BYTES = 4
GROUP_BYTES = {"quantized": 3, "residual": 2}  # the scale of a group of quantized weights, and its zero
RESCORED = 64  # rows of the exact head: native/forward.h, HEAD_LANES * CANDIDATES


def bytes_per_token(
    spec: ModelSpec,
    precision: Precision,
    context: int,
    batch: int = 1,
    vectors: str = "float32",
    shares: Sequence[float] | None = None,
    source: int = 0,
) -> int:
    """Bytes per sequence of one step of `batch` sequences with `context` cached tokens each.

    Weights are read once for all sequences. Of a sparse layer only chosen units count: k/N of them for one token; for
    a batch the expected number of different units, if the choices are independent. `vectors` is the type of biases
    and normalisation weights. Padding, activations and the state of convolutions do not count. LSH attention reads
    the keys and values that it chooses, the buckets, and the rotations.

    Args:
        shares: measured share of units that a token uses, by block; by default the planned share.
        source: tokens of the encoder's input, if there is an encoder.
    """
    if shares is None:
        shares = [spec.chosen_share(layer) for layer in range(spec.layers)]
    tensors = planned(spec, precision)
    weights = sum(
        _read(slot, kind if slot.part or slot.bits or slot.gguf else vectors, spec, batch, shares)
        for slot, kind in tensors
    )
    rotations, cached = _cache_read(spec, precision, context + source * joins(spec))
    attended = source * source_bytes(spec, precision) if crosses(spec) else 0
    return round((weights + rotations + batch * (cached + attended)) / batch)


def chosen_unit_bytes(spec: ModelSpec, precision: Precision, batch: int = 1) -> int:
    """Bytes per sequence of the rows of chosen units in one step of `batch` sequences."""
    shares = [spec.chosen_share(layer) for layer in range(spec.layers)]
    units = ((slot, kind) for slot, kind in planned(spec, precision) if slot.layout == "units")
    return round(sum(_read(slot, kind, spec, batch, shares) for slot, kind in units) / batch)


def _cache_read(spec: ModelSpec, precision: Precision, held: int) -> tuple[int, int]:
    """Bytes of the LSH rotations, and of the cache of `held` positions that is read: all keys and values, or some of
    them and all buckets."""
    hashing = spec.attention.hashing
    if hashing is None:
        share = sum(min(held, spec.window(layer) or held) for layer in range(spec.layers)) / spec.layers
        return 0, round(share * cached_bytes(spec, precision))
    read = min(held, max(1, hashing.most_keys - 1)) * cached_bytes(spec, precision)
    if held < hashing.most_keys:
        return 0, read
    from sparsecli.decode.lsh_rotations import factors_at  # PyTorch's rotations

    columns = hashing.rounds * sum(factors_at(spec, held.bit_length())) // 2
    rotations = spec.layers * spec.attention_layers * spec.attention_width * columns * WIDTHS["float32"]
    return rotations, read + held * bucket_bytes(spec)


def cached_bytes(spec: ModelSpec, precision: Precision) -> int:
    """Bytes of the keys and values of one token, with the scales of int8 ones."""
    heads = spec.attention.key_value_heads or spec.heads
    return spec.layers * spec.attention_layers * heads * _head_bytes(spec, precision)


def bucket_bytes(spec: ModelSpec) -> int:
    """Bytes of the buckets of one token's keys in LSH attention."""
    rounds = spec.attention.hashing.rounds if spec.attention.hashing else 0
    return spec.layers * spec.attention_layers * spec.heads * rounds * BUCKET_BYTES


def source_bytes(spec: ModelSpec, precision: Precision) -> int:
    """Bytes of keys and values of one token of the encoder's input."""
    if crosses(spec):
        return spec.layers * spec.heads * _head_bytes(spec, precision)
    return cached_bytes(spec, precision) if joins(spec) else 0


def _head_bytes(spec: ModelSpec, precision: Precision) -> int:
    scales = SCALE_BYTES if precision.cache == "int8" else 0
    return 2 * (spec.width_of_head * WIDTHS[precision.cache] + scales)


def _read(slot: Slot, kind: str, spec: ModelSpec, batch: int, shares: Sequence[float]) -> float:
    cols = slot.cols
    if slot.name.startswith(("cross.key", "cross.value")):
        return 0  # read once for a source
    if slot.name == "controller.bias":  # its blocks are padded
        cols = cols // padded(slot.group, LANES) * slot.group
    if slot.gguf:
        row = TYPES[slot.gguf].block_bytes * cols / TYPES[slot.gguf].block
        if slot.name == "embedding" and shares_codes(spec):
            return (slot.rows + batch) * row
    elif slot.bits:
        row = cols * slot.bits / 8 + -(-cols // GROUP) * GROUP_BYTES[slot.layout]
    else:
        row = cols * WIDTHS[kind] + (SCALE_BYTES if kind == "int8" else 0)
    if slot.name in ("embedding", "positions"):
        return batch * row
    if slot.name in FREQUENCIES:
        return 0  # computed, not learned
    if slot.name == "head.exact":
        return min(batch * RESCORED, slot.rows) * row
    share = 1.0
    of_chosen = slot.name == "unit_bias" and spec.feed_forward.kind == "sparse"
    if slot.layout in ("units", "residual") or of_chosen:
        share = 1 - (1 - shares[slot.layer]) ** batch
    return slot.rows * row * share
