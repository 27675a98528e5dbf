"""Decoders of the original implementation's Terraformers as state dicts of ours, for the tests of the engine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from test_golden import load

from sparsecli.spec.model import ModelSpec

SPARSE = {"kind": "sparse", "d_ff": 32, "block_size": 8, "rank": 5}
TERRAFORMER = {
    "d_model": 16,
    "layers": 2,
    "heads": 2,
    "max_positions": 64,
    "feed_forward": SPARSE,
    "attention": {"projection": "multiplicative_conv", "modules": 4},
    "vocabulary": {"kind": "multiplicative", "size": 20, "modules": 4},
    "residual": "reversible",
    "attention_layers": 2,
    "sru": {"layers": 1, "width": 4},
    "encoder": {"layers": 2, "max_positions": 64, "read_by": {"kind": "prefix"}},
}
FIRST_DECODER_WEIGHT = {"terraformer_sparse_rev": "w_7.", "terraformer_sparse_nonrev_enc": "w_8."}


def terraformer(name: str) -> tuple[ModelSpec, dict[str, np.ndarray]]:
    """The model of a golden file without its encoder."""
    streams = 2 if name.endswith("_rev") else 1
    read_by = {"kind": "prefix", "streams": streams}
    encoder = {**TERRAFORMER["encoder"], "read_by": read_by}
    spec = ModelSpec.model_validate({**TERRAFORMER, "encoder": encoder})
    g = {key: value.numpy() for key, value in load(name).items()}
    keys = [key for key in g if key.startswith("w_")]
    first = next(at for at, key in enumerate(keys) if key.startswith(FIRST_DECODER_WEIGHT[name]))
    rest = iter([g[key] for key in keys[first:]])
    weights = {
        "model.embedding.weight": g[keys[0]],
        "model.position_embedding.weight": g[keys[2]],
    }
    for layer in range(spec.layers):
        block = f"model.layers.{layer}"
        for attention in ("attention", "second_attention"):
            weights |= _norm(f"{block}.{attention}_norm", rest)
            weights |= _sparse_attention(f"{block}.{attention}.projection", rest)
        weights |= _norm(f"{block}.feed_forward_norm", rest)
        weights |= _sparse_feed_forward(f"{block}.feed_forward", rest)
        weights |= _norm(f"{block}.sru.norm", rest)
        for part in ("enter", "cells.0.projection", "leave"):
            weights |= {
                f"{block}.sru.{part}.weight": next(rest).T.copy(),
                f"{block}.sru.{part}.bias": next(rest),
            }
    weights |= _norm("model.norm", rest)
    weights |= _multiplicative("head", rest)
    assert next(rest, None) is None
    return spec, weights


def _norm(name: str, rest: Iterator[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{name}.weight": next(rest), f"{name}.bias": next(rest)}


def _multiplicative(name: str, rest: Iterator[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{name}.D": next(rest), f"{name}.E": next(rest).T.copy(), f"{name}.bias": next(rest)}


def _sparse_attention(name: str, rest: Iterator[np.ndarray]) -> dict[str, np.ndarray]:
    weights = _multiplicative(f"{name}.shared", rest)
    for part in ("query", "key", "value"):
        kernel = next(rest)  # (F_h, F_w, M_in, M_out)
        weights |= {f"{name}.{part}.weight": kernel.transpose(3, 0, 1, 2).copy()}
        weights |= {f"{name}.{part}.bias": next(rest)}
    return weights


def _sparse_feed_forward(name: str, rest: Iterator[np.ndarray]) -> dict[str, np.ndarray]:
    c1, c2, cb, w1, w2, b2 = (next(rest) for _ in range(6))
    return {
        f"{name}.controller.first": c1.T.copy(),
        f"{name}.controller.second": c2.reshape(c2.shape[0], -1).T.copy(),
        f"{name}.controller.bias": cb.reshape(-1),
        f"{name}.up": w1.reshape(w1.shape[0], -1).T.copy(),  # (d, block, unit) -> (block unit, d)
        f"{name}.down": w2.transpose(1, 0, 2).reshape(-1, w2.shape[2]),  # (unit, block, d) -> (block unit, d)
        f"{name}.bias": b2,
    }
