"""Bytes that a decode step reads: its active weights in their packed types, and cached keys and values."""

from __future__ import annotations

from collections.abc import Sequence

from sparsecli.bench.random_weights import planned
from sparsecli.decode.packed.layouts import Slot, padded
from sparsecli.decode.packed.precision import RESCORED, Precision
from sparsecli.decode.packed.tensor_file import WIDTHS
from sparsecli.decode.packed.tensors import FREQUENCIES, chooses, crosses, joins, shares_codes
from sparsecli.model.gguf_types import LANES, PANEL_TYPES
from sparsecli.model.quantization import GROUP
from sparsecli.spec.model import ModelSpec

SCALE_BYTES = 4
BUCKET_BYTES = 4
GROUP_BYTES = {"quantized": 3, "residual": 2}  # the scale of a group of quantized weights, and its zero
LOOKED_UP = ("embedding", "positions")
"""Tables of which a token reads one row; logits may read the embedding's codes whole."""


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
    shares = shares or _planned_shares(spec)
    tensors = _typed(spec, precision, vectors)
    weights = sum(_read(slot, kind, spec, batch, shares) for slot, kind in tensors)
    weights += sum(batch * _row_bytes(slot, kind) for slot, kind in tensors if slot.name in LOOKED_UP)
    rotations, cached = _cache_read(spec, precision, context + source * joins(spec))
    attended = source * source_bytes(spec, precision) if crosses(spec) else 0
    return round((weights + rotations + batch * (cached + attended)) / batch)


def bits_per_weight(
    spec: ModelSpec, precision: Precision, vectors: str = "float32", shares: Sequence[float] | None = None
) -> float:
    """Bits a weight: the bytes of weights that a decoded token reads, times 8, over the number of these weights.

    Every weight that is read counts once. Scales and zeros, the finer part of units that are read in full, units that
    are read again after their sketch, and rows of the head that score again are bytes, but no weights. Biases and
    normalisation weights count. Rows that are looked up (of tokens and positions) and the cache do not count at all.

    Args:
        vectors, shares: see `bytes_per_token`.
    """
    shares = shares or _planned_shares(spec)
    tensors = _typed(spec, precision, vectors)
    read = sum(_read(slot, kind, spec, 1, shares) for slot, kind in tensors)
    return 8 * read / sum(_weights(slot, spec, shares) for slot, _ in tensors)


def weights_per_token(spec: ModelSpec) -> float:
    """The number of weights that a decoded token reads, as `bits_per_weight` counts them."""
    slots = _typed(spec, Precision.of("float32"), "float32")
    return sum(_weights(slot, spec, _planned_shares(spec)) for slot, _ in slots)


def _planned_shares(spec: ModelSpec) -> list[float]:
    return [spec.chosen_share(layer) for layer in range(spec.layers)]


def _typed(spec: ModelSpec, precision: Precision, vectors: str) -> list[tuple[Slot, str]]:
    """The tensors of a packed model; `vectors` is the type of those that are no part of `Precision`."""
    return [
        (slot, kind if slot.part or slot.bits or slot.gguf else vectors)
        for slot, kind in planned(spec, precision)
    ]


def chosen_unit_bytes(spec: ModelSpec, precision: Precision, batch: int = 1) -> int:
    """Bytes per sequence of the rows of chosen units in one step of `batch` sequences."""
    shares = _planned_shares(spec)
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
    """Bytes of a tensor that a step of `batch` sequences reads, without rows that are looked up."""
    return _rows_read(slot, spec, batch, shares) * _row_bytes(slot, kind)


def _rows_read(slot: Slot, spec: ModelSpec, batch: int, shares: Sequence[float]) -> float:
    if slot.name.startswith(("cross.key", "cross.value")):
        return 0  # read once for a source
    if slot.name in FREQUENCIES:
        return 0  # computed, not learned
    sketched = spec.quantization.head_candidates
    if slot.name == "head.exact" or (slot.name == "embedding" and shares_codes(spec) and sketched):
        return min(batch * (sketched or RESCORED), slot.rows)
    if slot.name in LOOKED_UP:
        return slot.rows if slot.name == "embedding" and shares_codes(spec) else 0
    of_chosen = slot.name == "unit_bias" and spec.feed_forward.kind == "sparse"
    if slot.layout in ("units", "residual") or of_chosen:
        return slot.rows * (1 - (1 - shares[slot.layer]) ** batch)
    return slot.rows


def _row_bytes(slot: Slot, kind: str) -> float:
    if slot.gguf:
        stored = PANEL_TYPES[slot.gguf]
        return stored.block_bytes * slot.cols / stored.block + stored.head_bytes / LANES
    if slot.bits:
        return slot.cols * slot.bits / 8 + -(-slot.cols // GROUP) * GROUP_BYTES[slot.layout]
    return _row_weights(slot) * WIDTHS[kind] + (SCALE_BYTES if kind == "int8" else 0)


def _row_weights(slot: Slot) -> int:
    if slot.name == "controller.bias":  # its blocks are padded
        return slot.cols // padded(slot.group, LANES) * slot.group
    return slot.cols


def _weights(slot: Slot, spec: ModelSpec, shares: Sequence[float]) -> float:
    """Weights of a tensor that a token reads and that no other tensor has: see `bits_per_weight`."""
    if slot.layout == "residual" or slot.name == "head.exact":
        return 0
    if slot.name == "embedding" and spec.quantization.head_candidates:
        return 0
    rows = _rows_read(slot, spec, 1, shares)
    if slot.layout == "units" and spec.feed_forward.kind == "selector" and chooses(spec, slot.layer):
        rows /= len(slot.sources)  # the sketch has the others, and each unit has one row of W_down
    return rows * _row_weights(slot)
