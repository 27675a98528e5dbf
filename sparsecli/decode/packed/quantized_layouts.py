"""How weights in 3 or 4 bits lie in memory: the panels of native/ops/quantized.inl, and residuals unit by unit."""

from __future__ import annotations

import numpy as np

from sparsecli.model.quantization import GROUP

LANES = 16
LINE = 64


def panel_bytes(cols: int, bits: int) -> int:
    """Bytes of LANES rows: codes, a scale of two bytes and a zero for each group of each row."""
    return _lines(_groups(cols) * LANES * (GROUP * bits // 8 + 3))


def residual_bytes(cols: int, rows: int) -> int:
    """Bytes of a unit's residual of so many rows."""
    return _lines(rows * _groups(cols) * (GROUP // 2 + 2))


def arrange_panels(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """codes (R, 64 G), scale bfloat16 (R, G), zero (R, G) -> panels (R / LANES, bytes), filled up with zeros."""
    rows, groups = scale.shape
    fill = ((0, -rows % LANES), (0, 0))
    by_panel = [
        np.pad(part, fill).reshape(-1, LANES, groups, part.shape[1] // groups)
        for part in (codes, scale, zero)
    ]
    words = (
        _words_of_four(by_panel[0]) if bits == 4 else _words_of_three(by_panel[0])
    )  # (panels, LANES, G, words)
    parts = [
        words.transpose(0, 2, 3, 1),
        by_panel[1].transpose(0, 2, 3, 1),
        by_panel[2].transpose(0, 2, 3, 1),
    ]
    flat = [np.ascontiguousarray(part).reshape(len(part), -1).view(np.uint8) for part in parts]
    return _filled(np.concatenate(flat, axis=1))


def arrange_residual(codes: list[np.ndarray], scale: list[np.ndarray]) -> np.ndarray:
    """codes (units, 32 G) with two in a byte and scale bfloat16 (units, G) of every row of a unit -> (units, bytes)."""
    rows = [part for row in zip(codes, scale, strict=True) for part in row]
    return _filled(np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in rows], axis=1))


def _words_of_four(codes: np.ndarray) -> np.ndarray:
    """codes (..., GROUP) -> eight words: the i-th has inputs 8 i .. 8 i + 7, one pair after the other."""
    pairs = codes.reshape(*codes.shape[:-1], 8, 4, 2).astype(np.uint32)
    shift = 4 * np.arange(4)[:, None] + 16 * np.arange(2)
    return (pairs << shift.astype(np.uint32)).sum(axis=(-2, -1), dtype=np.uint32)


def _words_of_three(codes: np.ndarray) -> np.ndarray:
    """codes (..., GROUP) -> six words: four with two bits of every code, and two with the third."""
    pairs = codes.reshape(*codes.shape[:-1], 4, 8, 2).astype(np.uint32)
    two_shift, one_shift, odd = three_bit_places()
    two = np.where(odd, pairs >> 1, pairs & 3) << two_shift
    one = np.where(odd, pairs & 1, pairs >> 2) << one_shift
    ones = one.sum(
        axis=(-2, -1), dtype=np.uint32
    )  # bits of four words, in different places for even and odd ones
    halves = ones.reshape(*ones.shape[:-1], 2, 2).sum(axis=-1, dtype=np.uint32)
    return np.concatenate((two.sum(axis=(-2, -1), dtype=np.uint32), halves), axis=-1)


def three_bit_places() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the bits of the codes [word][field][half] of a group lie, and which fields are odd.

    A field of two bits and one of one bit together are a code: where the field's number is even the single bit is the
    highest and lies above the two, else it is the lowest and lies below. Odd words keep it two places further on.
    """
    word, field, half = np.ogrid[:4, :8, :2]
    two = 2 * field + 16 * half + 0 * word
    odd = (field % 2).astype(bool)
    one = (two + np.where(odd, -1, 2) + 2 * (word % 2)) % 32
    return two.astype(np.uint32), one.astype(np.uint32), np.broadcast_to(odd, two.shape)


def codes_of(words: np.ndarray, bits: int) -> np.ndarray:
    """words (..., 8 or 6) of 32 bits -> codes (..., 64), as they lie in a lane of native/ops/quantized.inl."""
    if bits == 4:
        shift = 4 * np.arange(4, dtype=np.uint32)[:, None] + 16 * np.arange(2, dtype=np.uint32)
        return (words[..., None, None] >> shift & 15).reshape(*words.shape[:-1], -1)
    two_shift, one_shift, odd = three_bit_places()
    two = words[..., :4, None, None] >> two_shift & 3
    one = words[..., 4:].repeat(2, axis=-1)[..., None, None] >> one_shift & 1
    return np.where(odd, two << 1 | one, two | one << 2).reshape(*words.shape[:-1], -1)


def _groups(cols: int) -> int:
    return -(-cols // GROUP)


def _lines(count: int) -> int:
    return -(-count // LINE) * LINE


def _filled(rows: np.ndarray) -> np.ndarray:
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % LINE)))
