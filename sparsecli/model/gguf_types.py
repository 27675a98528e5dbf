"""GGUF's own weight types: their blocks taken apart, laid out in the engine's panels, and as float32.

A row of a matrix is a sequence of blocks of 32 or 256 weights (`GgufType.block`). Every code and every scale is kept,
in another order: panels of 16 rows, so that a vector lane of the engine is a row (native/ops/gguf.inl). A
panel holds, for every 64 columns (256 of nested types), the codes, then the scales, and is as long as the original
within 3 %.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

LANES = 16
LINE = 64
HEAD_LANES = 16
"""Parts of a vocabulary, each with its own likeliest tokens: every sixteenth panel (native/layers/head.h)."""
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the codes of the IQ4 types stand for: closer together around zero, where most weights are."""
CHUNK = 1 << 21  # weights that are laid out at a time: they stay in the cache


@dataclass(frozen=True)
class GgufType:
    """One type.

    Attributes:
        number: what GGUF calls it.
        block, block_bytes: weights of one of its blocks, and bytes.
        bits: of a code.
        group: weights that share a scale.
        zero: the code of 0; codes of 8 bits are signed.
        minimum: whether a group has a minimum beside its scale.
        table: the values of the codes, times the scale, where they are not evenly apart.
        scales_by_row: whether the scale of the scales is that of a whole row, in front of the panel's blocks.
    """

    name: str
    number: int
    block: int
    block_bytes: int
    bits: int
    group: int = 32
    zero: int = 0
    minimum: bool = False
    table: tuple[int, ...] = ()
    scales_by_row: bool = False

    @property
    def nested(self) -> bool:
        """Whether scales are bytes with a float16 scale of their own (the K types, IQ4_XS and the sketch)."""
        return self.block == 256 or self.scales_by_row

    @property
    def packed_scales(self) -> bool:
        """Whether panels hold scales in six bits, as files do."""
        return self.bits == 3

    @property
    def halves(self) -> slice:
        """The bytes of a block that are float16."""
        return slice(-2, None) if self.group == 16 else slice(0, 4 if self.minimum else 2)

    @property
    def columns(self) -> int:
        """Columns of a block in a panel."""
        return max(self.block, 64)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales and minima of a panel's block."""
        if not self.nested:
            return self.tables * LANES * self.scales_of_block * 2
        return self.tables * LANES * (self.scales_of_block + (0 if self.scales_by_row else 2))

    @property
    def tables(self) -> int:
        """1: scales; 2: scales and minima."""
        return 2 if self.minimum else 1

    @property
    def head_bytes(self) -> int:
        """Bytes of a panel in front of its blocks: the scales of its rows."""
        return self.tables * LANES * 2 if self.scales_by_row else 0

    @property
    def scales_of_block(self) -> int:
        """Numbers that hold the scales of one row of a panel's block."""
        return 12 if self.packed_scales else self.columns // self.group

    @property
    def panel_block_bytes(self) -> int:
        """Bytes of a panel's block: whole cache lines."""
        return -(-(self.columns * LANES * self.bits // 8 + self.scale_bytes) // LINE) * LINE

    def panel_bytes(self, cols: int) -> int:
        """Bytes of 16 rows."""
        return self.head_bytes + -(-cols // self.columns) * self.panel_block_bytes

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row in a GGUF file."""
        return cols // self.block * self.block_bytes

    def panel_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Panels, and bytes of each, of a matrix."""
        return -(-rows // LANES), self.panel_bytes(cols)


TYPES = {
    kind.name: kind
    for kind in (
        GgufType("Q4_0", 2, 32, 18, 4, zero=8),
        GgufType("Q4_1", 3, 32, 20, 4, minimum=True),
        GgufType("Q5_0", 6, 32, 22, 5, zero=16),
        GgufType("Q5_1", 7, 32, 24, 5, minimum=True),
        GgufType("Q8_0", 8, 32, 34, 8),
        GgufType("IQ4_NL", 20, 32, 18, 4, table=IQ4_VALUES),
        GgufType("IQ4_XS", 23, 256, 136, 4, table=IQ4_VALUES),
        GgufType("Q3_K", 11, 256, 110, 3, group=16, zero=4),
        GgufType("Q4_K", 12, 256, 144, 4, minimum=True),
        GgufType("Q5_K", 13, 256, 176, 5, minimum=True),
        GgufType("Q6_K", 14, 256, 210, 6, group=16, zero=32),
    )
}
"""By their names in GGUF."""

SKETCH = GgufType("SKETCH", -1, 32, 10, 2, minimum=True, scales_by_row=True)
"""Not one of GGUF's: the sketch of a head, of which all logits come first: 2.5 bits a weight (docs/conversion.md)."""

PANEL_TYPES = {**TYPES, SKETCH.name: SKETCH}
"""The types that panels may have."""


@dataclass(frozen=True)
class Parts:
    """Some rows, taken apart.

    Attributes:
        codes: (R, cols) uint8, int8 with 8 bits.
        scales: (R, groups): float16; of nested types uint8 with minima, int8 without.
        minima: the same; None where the type has none.
        outer: (R, blocks, 1 or 2) float16 of nested types: the scale of a block's scales and that of its minima.
    """

    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray | None = None
    outer: np.ndarray | None = None


def take_apart(kind: GgufType, raw: np.ndarray) -> Parts:
    """`raw` (R, bytes of a row) uint8, as in a GGUF file."""
    rows = raw.shape[0]
    blocks = raw.reshape(rows, -1, kind.block_bytes)
    if kind.nested:
        return NESTED.get(kind.name, partial(_take_k_apart, kind))(blocks)
    at = 2
    scales, minima = _halves(blocks[..., :2])[..., 0], None
    if kind.minimum:
        minima, at = _halves(blocks[..., 2:4])[..., 0], 4
    if kind.bits == 8:
        return Parts(np.ascontiguousarray(blocks[..., at:]).view(np.int8).reshape(rows, -1), scales)
    fifth = None
    if kind.bits == 5:
        fifth = np.unpackbits(blocks[..., at : at + 4], axis=-1, bitorder="little")
        at += 4
    codes = _nibbles(blocks[..., at:])  # (R, blocks, 2, 16)
    if fifth is not None:
        codes |= fifth.reshape(codes.shape) << 4
    return Parts(codes.reshape(rows, -1), scales, minima)


def _take_k_apart(kind: GgufType, blocks: np.ndarray) -> Parts:
    """Q4_K and Q5_K: eight groups of 32 with 6-bit scales and minima, which share 12 bytes."""
    rows = blocks.shape[0]
    outer = _halves(blocks[..., :4])
    packed = blocks[..., 4:16]
    first, second, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate((first & 63, rest & 15 | first >> 6 << 4), axis=-1)
    minima = np.concatenate((second & 63, rest >> 4 | second >> 6 << 4), axis=-1)
    codes = _nibbles(blocks[..., -128:].reshape(*blocks.shape[:2], 4, 32))  # (R, blocks, 4, 2, 32)
    if kind.bits == 5:
        upper = blocks[..., 16:48, None] >> np.arange(8, dtype=np.uint8) & 1  # (R, blocks, 32, 8)
        codes |= upper.transpose(0, 1, 3, 2).reshape(codes.shape) << 4
    return Parts(codes.reshape(rows, -1), scales.reshape(rows, -1), minima.reshape(rows, -1), outer)


def _take_q6_k_apart(blocks: np.ndarray) -> Parts:
    """Two halves of 128: lower four bits of quarters 0 and 2, then of 1 and 3, in 64 bytes; the others in 32."""
    rows = blocks.shape[0]
    low = _nibbles(blocks[..., :128].reshape(*blocks.shape[:2], 2, 64))  # (R, blocks, halves, 2, 64)
    upper = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    upper = upper >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3  # (R, blocks, halves, quarters, 32)
    codes = low.reshape(upper.shape) | upper << 4
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return Parts(codes.reshape(rows, -1), scales.reshape(rows, -1), None, _halves(blocks[..., 208:]))


def _take_q3_k_apart(blocks: np.ndarray) -> Parts:
    """The third bits of eight groups of 32 in 32 bytes, then two halves of 128: four quarters in 32 bytes."""
    rows = blocks.shape[0]
    third = blocks[..., None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # (R, blocks, 8, 32)
    quarters = blocks[..., 32:96].reshape(*blocks.shape[:2], 2, 1, 32)
    quarters = quarters >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3  # (R, blocks, 2, quarters, 32)
    codes = quarters.reshape(third.shape) | third << 2
    scales = _unpack_scales(blocks[..., 96:108])
    return Parts(codes.reshape(rows, -1), scales.reshape(rows, -1), None, _halves(blocks[..., 108:]))


def _unpack_scales(packed: np.ndarray) -> np.ndarray:
    """(..., 12) uint8 -> (..., 16) int8: four bits of scale j and of j + 8 in a byte, then two bits of every fourth."""
    low = _nibbles(packed[..., :8]).reshape(*packed.shape[:-1], 16)
    upper = packed[..., None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    return (low | upper.reshape(low.shape) << 4).astype(np.int8) - np.int8(32)


def _pack_scales(scales: np.ndarray) -> np.ndarray:
    """The inverse of `_unpack_scales`."""
    codes = (scales + np.int8(32)).astype(np.uint8)
    fours = codes.reshape(*codes.shape[:-1], 4, 4) >> 4 << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    low = codes[..., :8] & 15 | codes[..., 8:] << 4
    return np.concatenate((low, np.bitwise_or.reduce(fours, axis=-2)), axis=-1)


def _take_iq4_xs_apart(blocks: np.ndarray) -> Parts:
    """Eight groups of 32 with 6-bit scales: the upper two bits of all in two bytes, the others in four."""
    rows = blocks.shape[0]
    upper = np.ascontiguousarray(blocks[..., 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = _nibbles(blocks[..., 4:8, None]).reshape(upper.shape)
    scales = (low | upper.astype(np.uint8) << 4).astype(np.int8) - np.int8(32)
    codes = _nibbles(blocks[..., 8:].reshape(*blocks.shape[:2], 8, 16))  # (R, blocks, 8, 2, 16)
    return Parts(codes.reshape(rows, -1), scales.reshape(rows, -1), None, _halves(blocks[..., :2]))


NESTED = {"Q3_K": _take_q3_k_apart, "Q6_K": _take_q6_k_apart, "IQ4_XS": _take_iq4_xs_apart}
"""Nested types without minima."""


def _halves(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view("<f2")


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """(..., n) -> (..., 2, n): the lower four bits, then the upper ones."""
    return np.stack((raw & 15, raw >> 4), axis=-2)


def put_together(kind: GgufType, parts: Parts) -> np.ndarray:
    """The inverse of `take_apart`: rows (R, bytes of a row) uint8, as in a GGUF file."""
    rows = len(parts.codes)
    codes = parts.codes.reshape(rows, -1, kind.block)

    def table(values: np.ndarray | None) -> np.ndarray:
        """Bytes (R, blocks, n) of what every block has."""
        assert values is not None
        return np.ascontiguousarray(values).view(np.uint8).reshape(rows, codes.shape[1], -1)

    if kind.name == "Q6_K":
        quarters = codes.reshape(*codes.shape[:2], 2, 4, 32)
        low = _together(quarters & 15, 64)
        upper = np.bitwise_or.reduce(quarters >> 4 << 2 * np.arange(4, dtype=np.uint8)[:, None], axis=-2)
        fields = [table(low), table(upper), table(parts.scales), table(parts.outer)]
    elif kind.name == "Q3_K":
        eighths = codes.reshape(*codes.shape[:2], 8, 32)
        third = np.bitwise_or.reduce(eighths >> 2 << np.arange(8, dtype=np.uint8)[:, None], axis=-2)
        quarters = eighths.reshape(*codes.shape[:2], 2, 4, 32) & 3
        two = np.bitwise_or.reduce(quarters << 2 * np.arange(4, dtype=np.uint8)[:, None], axis=-2)
        scales = _pack_scales(parts.scales.reshape(*codes.shape[:2], 16))
        fields = [table(third), table(two), table(scales), table(parts.outer)]
    elif kind.name == "IQ4_XS":
        scales = (parts.scales + np.int8(32)).astype(np.uint8).reshape(*codes.shape[:2], 8)
        upper = (scales >> 4).astype("<u2") << np.arange(0, 16, 2, dtype=np.uint16)
        low = scales[..., ::2] & 15 | scales[..., 1::2] << 4
        fields = [table(parts.outer), table(np.bitwise_or.reduce(upper, axis=-1)), table(low)]
        fields.append(table(_together(codes, 16)))
    elif kind.nested:
        assert parts.minima is not None
        scales, minima = (each.reshape(rows, -1, 2, 4) for each in (parts.scales, parts.minima))
        scales, scales_4 = scales[..., 0, :], scales[..., 1, :]
        minima, minima_4 = minima[..., 0, :], minima[..., 1, :]
        packed = (scales | scales_4 >> 4 << 6, minima | minima_4 >> 4 << 6, scales_4 & 15 | minima_4 << 4)
        fields = [table(parts.outer), *map(table, packed)]
        if kind.bits == 5:
            groups = codes.reshape(*codes.shape[:2], 8, 32) >> 4
            fields.append(np.bitwise_or.reduce(groups << np.arange(8, dtype=np.uint8)[:, None], axis=-2))
        fields.append(table(_together(codes & 15, 32)))
    else:
        fields = [table(parts.scales)] + ([] if parts.minima is None else [table(parts.minima)])
        if kind.bits == 5:
            fields.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        fields.append(table(codes if kind.bits == 8 else _together(codes & 15, 16)))
    return np.concatenate(fields, axis=-1).reshape(rows, -1)


def _together(codes: np.ndarray, width: int) -> np.ndarray:
    """The inverse of `_nibbles` for runs of 2 * `width` codes: (R, blocks, bytes)."""
    pairs = codes.reshape(*codes.shape[:2], -1, 2, width)
    return pairs[..., 0, :] | pairs[..., 1, :] << 4


# -- panels ----------------------------------------------------------------------------------------------------


def arrange(kind: GgufType, raw: np.ndarray, cols: int) -> np.ndarray:
    """`raw` (R, bytes of a row) uint8, as in a GGUF file, as panels (ceil(R / 16), bytes)."""
    rows = raw.shape[0]
    panels = np.zeros((-(-rows // LANES), kind.panel_bytes(cols)), np.uint8)

    def fill(first: int) -> None:
        some = raw[first * LANES : (first + step) * LANES]
        if short := -len(some) % LANES:
            some = _with_rows(some, short)
        _write_panels(kind, take_apart(kind, some), panels[first : first + step])

    step = max(1, CHUNK // (LANES * cols))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill, range(0, len(panels), step)))
    return panels


def panels_of(kind: GgufType, parts: Parts) -> np.ndarray:
    """The parts of all rows as panels (ceil(R / 16), bytes)."""
    rows, cols = parts.codes.shape
    panels = np.zeros(kind.panel_shape(rows, cols), np.uint8)
    if short := -rows % LANES:
        tables = (parts.codes, parts.scales, parts.minima, parts.outer)
        parts = Parts(*(None if t is None else _with_rows(t, short) for t in tables))  # type: ignore[arg-type]
    step = max(1, CHUNK // (LANES * cols))
    for first in range(0, len(panels), step):
        rows_of = slice(first * LANES, (first + step) * LANES)
        tables = (parts.codes, parts.scales, parts.minima, parts.outer)
        some = Parts(*(None if t is None else t[rows_of] for t in tables))  # type: ignore[arg-type]
        _write_panels(kind, some, panels[first : first + step])
    return panels


def _with_rows(table: np.ndarray, count: int) -> np.ndarray:
    """`count` rows of zeros added."""
    return np.pad(table, ((0, count), *((0, 0),) * (table.ndim - 1)))


def _write_panels(kind: GgufType, parts: Parts, panels: np.ndarray) -> None:
    count = len(panels)
    blocks = panels[:, kind.head_bytes :].reshape(count, -1, kind.panel_block_bytes)
    code_bytes = kind.columns * LANES * kind.bits // 8
    codes = _whole(parts.codes, kind.columns).reshape(
        count, LANES, -1, 8, 4
    )  # (P, lane, 32 columns, quad, 4)
    words = _words(kind, codes)  # (P, 32 columns, word, lane, 4)
    blocks[..., :code_bytes] = words.reshape(count, blocks.shape[1], code_bytes)
    at = code_bytes
    scales, per_block = parts.scales, kind.scales_of_block
    if kind.packed_scales:
        scales = _pack_scales(scales.reshape(len(scales), -1, 16)).reshape(len(scales), -1)
    for table in [scales] + ([] if parts.minima is None else [parts.minima]):
        by_lane = _whole(table, per_block).reshape(count, LANES, -1, per_block)
        flat = np.ascontiguousarray(by_lane.transpose(0, 2, 3, 1)).view(np.uint8)
        size = flat.size // (count * blocks.shape[1])
        blocks[..., at : at + size] = flat.reshape(count, -1, size)
        at += size
    if parts.outer is not None:
        outer = parts.outer.reshape(count, LANES, -1, parts.outer.shape[-1])
        flat = np.ascontiguousarray(outer.transpose(0, 2, 3, 1)).view(np.uint8)
        if kind.scales_by_row:
            panels[:, : kind.head_bytes] = flat.reshape(count, -1)
            return
        size = flat.size // (count * blocks.shape[1])
        blocks[..., at : at + size] = flat.reshape(count, -1, size)


def _whole(table: np.ndarray, step: int) -> np.ndarray:
    """Filled up with zeros to a multiple of `step` columns."""
    short = -table.shape[1] % step
    return np.pad(table, ((0, 0), (0, short))) if short else table


def _words(kind: GgufType, codes: np.ndarray) -> np.ndarray:
    """codes (P, lane, G, quad, 4) -> bytes (P, G, word, lane, 4)."""
    if kind.bits == 8:
        return codes.view(np.uint8).transpose(0, 2, 3, 1, 4)

    def fields(values: np.ndarray, bits: int) -> np.ndarray:
        """Values of all quads, several in a byte."""
        shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
        return np.bitwise_or.reduce(values.reshape(*codes.shape[:3], bits, -1, 4) << shifts, axis=-2)

    if kind.bits < 4:
        words = [fields(codes & 3, 2)] + ([fields(codes >> 2, 1)] if kind.bits == 3 else [])
    else:
        low = codes & 15
        words = [low[..., :4, :] | low[..., 4:, :] << 4]
        if kind.bits > 4:
            words.append(fields(codes >> 4, kind.bits - 4))
    return np.concatenate(words, axis=-2).transpose(0, 2, 3, 1, 4)


def restore(kind: GgufType, panels: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """The inverse of `arrange`: rows (`rows`, bytes of a row) uint8, as in a GGUF file."""
    result = np.empty((len(panels) * LANES, cols // kind.block * kind.block_bytes), np.uint8)
    step = max(1, CHUNK // (LANES * cols))

    def fill(first: int) -> None:
        some = put_together(kind, read_parts(kind, panels[first : first + step], cols))
        result[first * LANES : first * LANES + len(some)] = some

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill, range(0, len(panels), step)))
    return result[:rows]


# -- values ----------------------------------------------------------------------------------------------------


def row_values(kind: GgufType, raw: np.ndarray) -> np.ndarray:
    """`raw` (R, bytes of a row) uint8, as in a GGUF file, as float32 weights (R, cols)."""
    rows, cols = len(raw), raw.shape[1] // kind.block_bytes * kind.block
    result = np.empty((rows, cols), np.float32)
    step = max(1, CHUNK // cols)

    def fill(first: int) -> None:
        result[first : first + step] = weights_of(kind, take_apart(kind, raw[first : first + step]))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill, range(0, rows, step)))
    return result


def values(kind: GgufType, panels: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Panels as float32 weights (rows, cols), those that the package `gguf` gives."""
    result = np.empty((len(panels) * LANES, cols), np.float32)
    step = max(1, CHUNK // (LANES * cols))

    def fill(first: int) -> None:
        some = panels[first : first + step]
        result[first * LANES : first * LANES + len(some) * LANES] = weights_of(
            kind, read_parts(kind, some, cols)
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill, range(0, len(panels), step)))
    return result[:rows]


def read_parts(kind: GgufType, panels: np.ndarray, cols: int) -> Parts:
    """The inverse of `arrange` and `take_apart`: the parts of all rows of some panels."""
    count = len(panels)
    blocks = panels[:, kind.head_bytes :].reshape(count, -1, kind.panel_block_bytes)
    code_bytes, per_block = kind.columns * LANES * kind.bits // 8, kind.scales_of_block
    words = blocks[..., :code_bytes].reshape(count, -1, kind.bits, LANES, 4)  # (P, G, word, lane, 4)
    codes = _codes(kind, words).transpose(0, 3, 1, 2, 4).reshape(count * LANES, -1)[:, :cols]

    def table(at: int, groups: int, dtype: str) -> np.ndarray:
        size = groups * LANES * np.dtype(dtype).itemsize
        found = np.ascontiguousarray(blocks[..., at : at + size]).view(dtype)
        by_lane = found.reshape(count, -1, groups, LANES).transpose(0, 3, 1, 2)
        return by_lane.reshape(count * LANES, -1)

    of_groups = -(-cols // kind.group)
    if not kind.nested:
        size = per_block * LANES * 2
        minima = table(code_bytes + size, per_block, "<f2")[:, :of_groups] if kind.minimum else None
        return Parts(codes, table(code_bytes, per_block, "<f2")[:, :of_groups], minima)
    size, tables = per_block * LANES, kind.tables
    if kind.scales_by_row:
        scales, minima = (table(code_bytes + at * size, per_block, "u1")[:, :of_groups] for at in range(2))
        outer = np.ascontiguousarray(panels[:, : kind.head_bytes]).view("<f2").reshape(count, tables, LANES)
        return Parts(codes, scales, minima, outer.transpose(0, 2, 1).reshape(count * LANES, 1, tables))
    minima = table(code_bytes + size, per_block, "u1") if kind.minimum else None
    outer = table(code_bytes + tables * size, tables, "<f2").reshape(count * LANES, -1, tables)
    scales = table(code_bytes, per_block, "u1" if kind.minimum or kind.packed_scales else "i1")
    if kind.packed_scales:
        scales = _unpack_scales(scales.reshape(len(scales), -1, 12)).reshape(len(scales), -1)
    return Parts(codes, scales, minima, outer)


def _codes(kind: GgufType, words: np.ndarray) -> np.ndarray:
    """bytes (P, G, word, lane, 4) -> codes (P, G, quad, lane, 4)."""
    if kind.bits == 8:
        return words.view(np.int8)

    def fields(some: np.ndarray, bits: int) -> np.ndarray:
        """Values of all quads, of which several are in a byte."""
        shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None, None]
        values = some[:, :, :, None] >> shifts & (1 << bits) - 1
        return values.reshape(*words.shape[:2], 8, *words.shape[3:])

    if kind.bits < 4:
        low = fields(words[:, :, :2], 2)
        return low | fields(words[:, :, 2:], 1) << 2 if kind.bits == 3 else low
    low = words[:, :, :4]
    codes = np.concatenate((low & 15, low >> 4), axis=2)
    return codes | fields(words[:, :, 4:], kind.bits - 4) << 4 if kind.bits > 4 else codes


def weights_of(kind: GgufType, parts: Parts) -> np.ndarray:
    """float32 (R, cols), in the order of operations of the package `gguf`."""
    rows, cols = parts.codes.shape
    codes = np.array(kind.table, np.float32)[parts.codes] if kind.table else parts.codes.astype(np.float32)
    codes = codes.reshape(rows, -1, kind.group)
    scales = parts.scales.astype(np.float32)
    if kind.zero:
        codes -= kind.zero
    minima = None if parts.minima is None else parts.minima.astype(np.float32)
    if parts.outer is not None:
        outer = parts.outer.astype(np.float32).repeat(scales.shape[1] // parts.outer.shape[1], axis=1)
        scales = outer[..., 0] * scales
        minima = None if minima is None else -(outer[..., 1] * minima)
    codes *= scales[..., None]
    if minima is not None:
        codes += minima[..., None]
    return codes.reshape(rows, cols)
