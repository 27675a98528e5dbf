"""Other attention on request: fits of low rank and multiplicative ones, and the architectures that they give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsecli.convert.candidates import with_attention
from sparsecli.convert.methods.attention import fit_projection, low_rank_factors, output_error, repeat_heads
from sparsecli.convert.methods.rounding import second_moment
from sparsecli.model.layers.attention import LowRank
from sparsecli.model.layers.multiplicative import MultiplicativeDense
from sparsecli.model.sizes import count_parameters
from sparsecli.recipe.schema import LowRankAttention, MultiplicativeAttention
from sparsecli.spec.attention import AttentionSpec
from sparsecli.spec.model import DEFAULT, ModelSpec

WIDTH = 32


def inputs(tokens: int = 2000) -> Tensor:
    """Inputs that spread less and less along WIDTH directions, as real ones do."""
    torch.manual_seed(1)
    axes = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    return (torch.randn(tokens, WIDTH) * 3 * 0.8 ** torch.arange(WIDTH)) @ axes


def linear(rows: int = WIDTH) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, rows)


@torch.no_grad()
def lost(made: nn.Module, wanted: Tensor, bias: Tensor, x: Tensor) -> float:
    """Squared error relative to `wanted`, biases apart."""
    return ((made(x) - wanted).square().sum() / (wanted - bias).square().sum()).item()


# -- fits ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_error_falls_with_rank_and_a_full_rank_is_exact() -> None:
    x, dense = inputs(), linear(24)
    errors = []
    for rank in (2, 6, 12, 24):
        made = LowRank(WIDTH, 24, rank, bias=True, bits=None)
        told = fit_projection(made, dense, second_moment(x))
        errors.append(lost(made, dense(x), dense.bias, x))
        assert told == pytest.approx(errors[-1], rel=1e-3, abs=1e-6)
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.1
    torch.testing.assert_close(made(x), dense(x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_inputs_decide_what_low_rank_keeps() -> None:
    x, weight = inputs(), linear().weight
    first, second = low_rank_factors(weight, second_moment(x), 8)
    left, size, right = torch.linalg.svd(weight)
    plain = left[:, :8] * size[:8] @ right[:8]
    moment = second_moment(x)
    assert output_error(second @ first, weight, moment) < 0.3 * output_error(plain, weight, moment)


@torch.no_grad()
def test_quantized_low_rank_is_nearly_as_good() -> None:
    x, dense = inputs(), linear(24)
    exact, rounded = (LowRank(WIDTH, 24, 12, bias=True, bits=bits) for bits in (None, 4))
    best = fit_projection(exact, dense, second_moment(x))
    told = fit_projection(rounded, dense, second_moment(x))
    assert best < told < best + 0.02
    assert lost(rounded, dense(x), dense.bias, x) == pytest.approx(told, rel=1e-2)


@torch.no_grad()
def test_a_multiplicative_map_is_found_again() -> None:
    x, dense = inputs(), linear()
    hidden = MultiplicativeDense(WIDTH, WIDTH, 4)
    dense.weight.copy_(hidden.matrix)
    made = MultiplicativeDense(WIDTH, WIDTH, 4)
    assert fit_projection(made, dense, second_moment(x)) < 1e-6
    torch.testing.assert_close(made(x), dense(x), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_multiplicative_fit_sees_the_inputs() -> None:
    x, dense = inputs(), linear()
    moment = second_moment(x)
    blind, made = MultiplicativeDense(WIDTH, WIDTH, 4), MultiplicativeDense(WIDTH, WIDTH, 4)
    fit_projection(blind, dense, torch.eye(WIDTH, dtype=torch.float64))
    error = fit_projection(made, dense, moment)
    assert error < 0.7 * output_error(blind.matrix, dense.weight, moment)
    assert error == pytest.approx(lost(made, dense(x), dense.bias, x), rel=1e-3)


@torch.no_grad()
def test_grouped_heads_are_repeat_heads() -> None:
    dense = linear(16)  # two heads, for four of queries
    made = MultiplicativeDense(WIDTH, WIDTH, 4)
    fit_projection(made, dense, second_moment(inputs()))
    torch.testing.assert_close(made.bias, dense.bias.view(2, 8).repeat_interleave(2, 0).flatten())
    heads = repeat_heads(dense.weight, 4, 8).view(4, 8, WIDTH)
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[2], dense.weight[8:])


# -- architectures -------------------------------------------------------------------------------------------


def test_keys_keep_as_large_a_share_as_queries() -> None:
    attention = AttentionSpec(key_value_heads=3, query_key_rank=96)
    fields = DEFAULT.model_dump() | {"d_model": 576, "heads": 9, "attention": attention.model_dump()}
    spec = ModelSpec.model_validate(fields)
    assert (spec.query_rank, spec.key_rank) == (96, 48)
    whole = spec.model_copy(update={"attention": AttentionSpec(key_value_heads=3)})
    saved = (count_parameters(whole).active - count_parameters(spec).active) / spec.layers
    assert saved == pytest.approx((1 - 1 / 3) * 576 * (576 + 192))


def test_other_attention_keeps_the_rest() -> None:
    attention = AttentionSpec(key_value_heads=2, bias=False, output_bias=True)
    spec = ModelSpec.model_validate(DEFAULT.model_dump() | {"attention": attention.model_dump()})
    low = with_attention(spec, LowRankAttention(kind="low_rank", rank=5)).attention
    assert low == attention.model_copy(update={"query_key_rank": 5})
    made = with_attention(spec, MultiplicativeAttention(kind="multiplicative")).attention
    assert (made.projection, made.output, made.output_bias) == ("multiplicative", "dense", True)
    assert made.key_value_heads is None
