"""A dense Llama-shaped model of the same size, as an alternative to ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from sparsecli.model.sizes import count_parameters
from sparsecli.spec.attention import AttentionSpec
from sparsecli.spec.feed_forward import DenseFeedForwardSpec
from sparsecli.spec.model import ModelSpec
from sparsecli.spec.vocabulary import DenseVocabularySpec

D_FF_STEP = 32  # the block of q8_0 and q4_0
TILE_ROWS = 4096
TILE_WIDTH = 1024
STANDARD_DEVIATION = 0.02


def llama_shaped(spec: ModelSpec, parameters: int) -> ModelSpec:
    """The dense model with `spec`'s width, depth, heads and vocabulary and about `parameters` parameters.

    Gated SiLU units, RMS norm, rotary positions, no biases, an own head: all of Llama, in our words. `d_ff` is the
    multiple of 32 that comes nearest.
    """

    def shaped(d_ff: int) -> ModelSpec:
        return ModelSpec(
            d_model=spec.d_model,
            layers=spec.layers,
            heads=spec.heads,
            max_positions=spec.max_positions,
            feed_forward=DenseFeedForwardSpec(
                kind="dense", d_ff=d_ff, activation="silu", gated=True, bias=False
            ),
            attention=AttentionSpec(key_value_heads=spec.attention.key_value_heads, bias=False),
            vocabulary=DenseVocabularySpec(kind="dense", size=spec.vocabulary.size),
            normalization="rms",
            positions="rotary",
        )

    smallest = count_parameters(shaped(D_FF_STEP)).total
    step = 3 * D_FF_STEP * spec.d_model * spec.layers
    return shaped(D_FF_STEP * max(1, 1 + round((parameters - smallest) / step)))


def matrices(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Names and shapes (out, in) of a Llama-shaped model's matrices; `N.` in front names the block."""
    d, d_ff, heads = spec.d_model, spec.feed_forward.d_ff, spec.attention.key_value_heads or spec.heads
    keys = d // spec.heads * heads
    block = {
        "query": (d, d),
        "key": (keys, d),
        "value": (keys, d),
        "output": (d, d),
        "gate": (d_ff, d),
        "up": (d_ff, d),
        "down": (d, d_ff),
    }
    shapes = {"embedding": (spec.vocabulary.size, d), "head": (spec.vocabulary.size, d)}
    for index in range(spec.layers):
        shapes |= {f"{index}.{name}": shape for name, shape in block.items()}
    return shapes


def random_tile() -> np.ndarray:
    """Normal numbers (rows, width), float32, of which `repeated` makes matrices of any size."""
    random = np.random.default_rng(0)
    return random.standard_normal((TILE_ROWS, TILE_WIDTH), dtype=np.float32) * np.float32(STANDARD_DEVIATION)


def repeated(tile: np.ndarray, lengths: Mapping[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    """Views (length,) of the flat `tile`, repeated, one after the other and each from another place of it.

    Drawing, quantising and holding a billion numbers would take longer than measuring, and more memory.
    """
    pool = np.resize(tile, max(lengths.values()) + tile.size)
    start = 0
    for name, length in lengths.items():
        yield name, pool[start : start + length]
        start = (start + length + 1) % tile.size
