"""What keys are hashed on when a decoder with hashed attention reads some of them: the model's own rotations."""

from __future__ import annotations

import numpy as np

from sparsecli.model.layers.lsh import factors_of, fixed_rotations
from sparsecli.spec.model import ModelSpec


def levels(spec: ModelSpec, positions: int) -> range:
    """Texts of at most 2^level positions hash alike; the levels of those that hash, of at most `positions`."""
    hashing = spec.attention.hashing
    if hashing is None or positions <= hashing.most_keys:
        return range(0)
    return range(hashing.most_keys.bit_length(), (positions - 1).bit_length() + 1)


def factors_at(spec: ModelSpec, level: int) -> list[int]:
    """Factors of the number of buckets."""
    hashing = spec.attention.hashing
    assert hashing
    return factors_of(hashing, 1 << level)


def rotations_of(spec: ModelSpec, layer_idx: int, level: int) -> np.ndarray:
    """Axes (heads, d_head, rounds, sum of factors / 2) of an attention layer, counted in the order of the caches."""
    hashing = spec.attention.hashing
    assert hashing
    block, index = divmod(layer_idx, spec.attention_layers)
    layer = index * spec.layers + block  # as model/transformer_layers.py counts
    factors = tuple(factors_at(spec, level))
    return fixed_rotations(layer, spec.heads, spec.width_of_head, hashing.rounds, factors)[0].numpy()
