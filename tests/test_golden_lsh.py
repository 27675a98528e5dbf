"""Attention with shared queries and keys, and by hashing, against the outputs of the original implementation."""

from __future__ import annotations

import pytest
import torch
from test_golden import assert_same, fill, fill_convolution, fill_linear, fill_multiplicative, load
from torch import Tensor, nn

from sparsecli.model.layers.attention import Attention, dense_projection
from sparsecli.model.layers.lsh import LshAttention, hash_buckets
from sparsecli.model.layers.multiplicative import ConvolutionProjection, MultiplicativeDense
from sparsecli.model.layers.shared_query_key import unit_keys
from sparsecli.spec.attention import LshSpec


def attention(projection: str, output: str, bias: bool, **kwargs: object) -> Attention:
    heads, modules = 2, 4
    shares = bool(kwargs.get("share_query_key"))
    if projection == "dense":
        made = dense_projection(
            16, heads=heads, key_value_heads=heads, head_width=8, bias=bias, share_query_key=shares
        )
    else:
        shared = MultiplicativeDense(16, 16, modules)
        made = ConvolutionProjection(shared, 16, modules=modules, kernel=3, share_query_key=shares)
    last = nn.Linear(16, 16, bias) if output == "dense" else None
    return Attention(made, last, heads=heads, **kwargs).eval()


def fill_heads(layer: Attention, g: dict[str, Tensor]) -> Attention:
    """Weights of each head (heads, d, d_head) as one map; outputs of heads are summed, as one map does too."""
    for part in ("query", "key", "value"):
        name = {"query": "W_qk" if "W_qk" in g else "W_q", "key": "W_k", "value": "W_v"}[part]
        if name in g:
            fill(getattr(layer.projection, part).weight, g[name].transpose(1, 2).flatten(0, 1))
    fill(layer.output.weight, g["W_o"].flatten(0, 1).T)
    return layer


def hashing(g: dict[str, Tensor], spec: LshSpec) -> LshAttention:
    """Hash with the rotations of the file."""
    layer = LshAttention(spec)
    rotations = g["rotations"].unflatten(0, (2, 2))  # (batch * heads, ...) -> (batch, heads, ...)
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "rotations": rotations}), with_kwargs=True
    )
    return layer


@pytest.mark.parametrize("name", ["selfattn_causal", "selfattn_causal_shareqk"])
def test_causal(name: str) -> None:
    g = load(name)
    layer = fill_heads(attention("dense", "dense", False, share_query_key="W_qk" in g), g)
    assert_same(layer(g["x"]), g["y"])


def test_encoder() -> None:
    g = load("selfattn_encoder_masked")
    layer = fill_heads(attention("dense", "dense", False, causal=False), g)
    actual = layer(g["x"], mask=g["mask"][:, None, None])
    assert_same(actual[g["mask"]], g["y"][g["mask"]])


def lsh_spec(g: dict[str, Tensor]) -> LshSpec:
    return LshSpec(
        rounds=int(g["n_hashes"]),
        chunk_length=int(g["chunk_len"]),
        chunks_before=int(g["n_chunks_before"]),
        chunks_after=int(g["n_chunks_after"]),
        buckets=g["n_buckets"].tolist(),
    )


def lonely(g: dict[str, Tensor], chunk_length: int = 8) -> Tensor:
    """Tokens (B, T) that see themselves alone in some head, by the buckets of the file and one chunk before."""
    length = g["x"].shape[1]
    positions = g["buckets"].argsort(dim=-1, stable=True).remainder(length).unflatten(1, (-1, chunk_length))
    seen = torch.cat((positions.roll(1, dims=1), positions), dim=2)
    others = (seen.unsqueeze(2) < positions.unsqueeze(3)).any(-1).flatten(1)  # (B * H, rounds * T)
    found = torch.zeros(len(others), length).scatter_add_(1, positions.flatten(1), others.float())
    return (found == 0).unflatten(0, (2, 2)).any(1)


def assert_same_but_for_lonely(y: Tensor, g: dict[str, Tensor]) -> None:
    """Weights of tokens that see themselves alone come in steps of 2^-7 from the original's scores of -1e5."""
    alone = lonely(g)
    assert 0 < alone.sum() <= alone.numel() // 8
    assert_same(y[~alone], g["y"][~alone])
    torch.testing.assert_close(y[alone], g["y"][alone], atol=6e-3, rtol=4e-3)


HASHED = ["lsh_causal_1hash", "lsh_causal_2hash"]


@pytest.mark.parametrize("name", HASHED)
def test_hashed(name: str) -> None:
    g = load(name)
    layer = attention("dense", "dense", False, share_query_key=True, lsh=hashing(g, lsh_spec(g)))
    assert_same_but_for_lonely(fill_heads(layer, g)(g["x"]), g)


@pytest.mark.parametrize("name", HASHED)
def test_buckets(name: str) -> None:
    g = load(name)
    layer = fill_heads(attention("dense", "dense", False, share_query_key=True), g)
    q = layer.projection(g["x"])[0].unflatten(-1, (2, 8)).transpose(1, 2)
    factors = g["n_buckets"].tolist()
    rotations = g["rotations"].unflatten(0, (2, 2))
    buckets = hash_buckets(q, rotations, factors)
    assert torch.equal(buckets, hash_buckets(unit_keys(q), rotations, factors))  # only directions count
    # The original numbers the buckets of all rounds together.
    offset = torch.arange(int(g["n_hashes"]))[:, None] * int(torch.tensor(factors).prod())
    assert torch.equal((buckets + offset).flatten(0, 1).flatten(1), g["buckets"].long())


@pytest.mark.parametrize("projection", ["model", "sparse"])
def test_projections_of_a_trained_model(projection: str) -> None:
    """Three projections, as a full-attention model has them: the mean of queries and keys is shared."""
    g = load(f"purelsh_{projection}_3w")
    spec = LshSpec(rounds=2, chunk_length=8, buckets=4)
    weights = iter([value for key, value in g.items() if key.startswith("w_")])
    take = lambda: next(weights)  # noqa: E731
    if projection == "model":
        layer = attention("dense", "dense", True, lsh=hashing(g, spec))
        for part in (layer.projection.query, layer.projection.key, layer.projection.value, layer.output):
            fill_linear(part, take(), take())
    else:
        layer = attention("multiplicative_conv", "none", True, lsh=hashing(g, spec))
        fill_multiplicative(layer.projection.shared, take(), take(), take())
        for part in (layer.projection.query, layer.projection.key, layer.projection.value):
            fill_convolution(part, take(), take())
    assert next(weights, None) is None
    assert_same_but_for_lonely(layer(g["x"]), g)
