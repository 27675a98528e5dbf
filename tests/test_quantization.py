"""Quantized weights: how near they are, and how they lie in bytes."""

from __future__ import annotations

import numpy as np
import pytest

from sparsecli.model.quantization import (
    GROUP,
    dequantize_groups,
    dequantize_residual,
    from_bfloat16,
    pack_nibbles,
    quantize_groups,
    quantize_residual,
    unpack_nibbles,
)


def some_rows(rows: int = 20, cols: int = 150) -> np.ndarray:
    """Rows that are all above zero, all below, zero, tiny, and otherwise normal."""
    values = np.random.default_rng(0).standard_normal((rows, cols)).astype(np.float32)
    values[0] = np.abs(values[0]) + 1
    values[1] = -np.abs(values[1]) - 1
    values[2] = 0
    values[3] *= 1e-38
    return values


@pytest.mark.parametrize("bits", [3, 4])
def test_groups_are_near_and_hold_zero_in_padding(bits: int) -> None:
    rows = some_rows()
    codes, scale, zero = quantize_groups(rows, bits)
    assert codes.shape == (20, 3 * GROUP)
    assert scale.shape == zero.shape == (20, 3)
    assert (codes.dtype, scale.dtype, zero.dtype) == (np.uint8, np.uint16, np.uint8)
    assert codes.max() == 2**bits - 1
    assert not codes[:, 150:].any()
    error = dequantize_groups(codes, scale, zero, 150) - rows
    relative = np.sqrt(np.square(error[4:]).sum() / np.square(rows[4:]).sum())
    assert relative < {3: 0.19, 4: 0.092}[bits]
    assert np.abs(error[:2]).max() < 0.5
    assert not error[2].any()
    assert np.abs(error[3]).max() < 1e-36


def test_codes_are_the_nearest_with_what_is_stored() -> None:
    rows = some_rows()[4:]
    codes, scale, zero = quantize_groups(rows, 4)
    step = from_bfloat16(scale).repeat(GROUP, axis=1)[:, :150]
    error = dequantize_groups(codes, scale, zero, 150) - rows
    inside = (codes[:, :150] > 0) & (codes[:, :150] < 15)
    assert (np.abs(error) <= step * 0.501)[inside].all()


def test_a_group_by_hand() -> None:
    """-3 to 12 in steps of one; what needs no cutting is not cut."""
    codes, scale, zero = quantize_groups(np.tile(np.arange(-3, 13, dtype=np.float32), 4)[None], 4)
    assert codes[0].tolist() == list(range(16)) * 4
    assert from_bfloat16(scale).tolist() == [[1.0]]
    assert zero.tolist() == [[48]]


def test_residuals_are_symmetric() -> None:
    rows = some_rows()
    codes, scale = quantize_residual(rows)
    error = dequantize_residual(codes, scale, 150) - rows
    assert np.sqrt(np.square(error).sum() / np.square(rows).sum()) < 0.11
    assert (codes[2, :150] == 8).all()
    assert not error[2].any()
    assert not codes[:, 150:].any()


def test_two_codes_lie_in_a_byte() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (5, 2 * GROUP)).astype(np.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (5, GROUP)
    assert packed[0, 3] == codes[0, 3] + 16 * codes[0, 35]
    assert packed[0, 32] == codes[0, 64] + 16 * codes[0, 96]
    np.testing.assert_array_equal(unpack_nibbles(packed), codes)
