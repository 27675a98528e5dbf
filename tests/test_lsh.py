"""Attention among tokens that hash alike: against readable twins, exact attention, and itself step by step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from sparsecli.console import Failure, RecipeError
from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM
from sparsecli.model.cache import DecodeLayer
from sparsecli.model.configuration import TerraformerConfig
from sparsecli.model.files import read_description
from sparsecli.model.layers.chunk_attention import attend_chunks
from sparsecli.model.layers.lsh import LshAttention, attend_alike, default_buckets
from sparsecli.model.layers.reversible import Half, plain_stack, reversible_stack
from sparsecli.model.layers.shared_query_key import attend_shared, unit_keys
from sparsecli.model.loading import load_network
from sparsecli.model.terraformer import TerraformerForConditionalGeneration
from sparsecli.recipe.loader import load
from sparsecli.spec.attention import LshSpec
from sparsecli.train.command import run

HEADS, WIDTH = 2, 8


def tokens(length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, T, d_head)."""
    generator = torch.Generator().manual_seed(seed)
    q, v = (2 * torch.randn(batch, HEADS, length, WIDTH, generator=generator) for _ in range(2))
    return q, unit_keys(q), v


def in_chunks(q, k, v, order, chunk_length, before, after, causal, hidden, keep) -> Tensor:
    """`attend_chunks` written out, for one row of batch and heads: order (rounds, T), hidden (T)."""
    sorted_positions = order.flatten().view(-1, chunk_length)
    outputs: dict[int, list[tuple[Tensor, Tensor]]] = {int(position): [] for position in order[0]}
    for index, chunk in enumerate(sorted_positions):
        around = [(index + offset) % len(sorted_positions) for offset in range(-before, after + 1)]
        window = sorted_positions[around].flatten()
        for row, query in enumerate(chunk):
            seen = (window != query) & ~hidden[window]
            if causal:
                seen &= window < query
            weights = (k[window] @ q[query]).exp() * seen
            factors = keep[row] if keep is not None else torch.ones(len(window))
            outputs[int(query)].append(((weights * factors) @ v[window], weights.sum()))
    rows = []
    for position in range(len(q)):
        found, mass = (sum(part) for part in zip(*outputs[position], strict=True))
        rows.append(found / mass if mass > 0 else v[position])
    return torch.stack(rows)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(
    ("rounds", "chunk_length", "before", "after", "causal"),
    [(2, 4, 1, 0, True), (1, 8, 1, 1, False), (3, 4, 2, 1, True), (2, 8, 0, 0, False)],
)
def test_chunks_and_their_gradients(rounds, chunk_length, before, after, causal, dropout) -> None:
    length = 24
    q, k, v = (x.requires_grad_() for x in tokens(length))
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(2, HEADS, rounds, length, generator=generator).argsort(-1)
    hidden = torch.zeros(2, length, dtype=torch.bool)
    hidden[1, -5:] = True
    window = (before + 1 + after) * chunk_length
    keep = 2.0 * (torch.rand(chunk_length, window, generator=generator) < 0.5) if dropout else None
    actual = attend_chunks(q, k, v, order, chunk_length, before, after, causal, hidden, keep)
    expected = torch.stack(
        [
            torch.stack(
                [
                    in_chunks(
                        *(x[b, h] for x in (q, k, v, order)),
                        *(chunk_length, before, after, causal, hidden[b], keep),
                    )
                    for h in range(HEADS)
                ]
            )
            for b in range(2)
        ]
    )
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(actual.shape, generator=generator)
    found = torch.autograd.grad(actual, (q, k, v), upstream)
    for gradient, twin in zip(found, torch.autograd.grad(expected, (q, k, v), upstream), strict=True):
        torch.testing.assert_close(gradient, twin, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [5, 8, 9, 31, 32])
@pytest.mark.parametrize("rounds", [1, 3])
def test_windows_over_everything_are_exact(rounds, length, causal) -> None:
    """Lengths up to one chunk, no multiple of it, and with padding on either side."""
    q, k, v = tokens(length)
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, :2], valid[1, -3:] = False, False
    layer = LshAttention(LshSpec(rounds=rounds, chunk_length=8, chunks_before=100), causal=causal).eval()
    expected = attend_shared(q, k, v, valid[:, None, None], causal)
    actual = layer(q, k, v, valid)
    assert actual.isfinite().all()
    for b in range(2):
        torch.testing.assert_close(actual[b, :, valid[b]], expected[b, :, valid[b]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(q, k, v), attend_shared(q, k, v, None, causal), atol=1e-5, rtol=1e-5)


def test_rows_of_padding_alone_are_finite() -> None:
    layer = LshAttention(LshSpec(chunk_length=4)).eval()
    assert layer(*tokens(10), torch.zeros(2, 10, dtype=torch.bool)).isfinite().all()


def test_a_token_reads_nothing_after_it() -> None:
    q, k, v = tokens(48, batch=1)
    v.requires_grad_()
    y = LshAttention(LshSpec(chunk_length=8)).eval()(q, k, v)
    for position in (0, 20, 47):
        (gradient,) = torch.autograd.grad(y[:, :, position].sum(), v, retain_graph=True)
        assert not gradient[:, :, position + 1 :].any()
        assert gradient[:, :, : position + 1].any()


def test_rotations_of_evaluation_are_fixed_and_those_of_training_are_not() -> None:
    q, k, v = tokens(64)
    layer, other = LshAttention(LshSpec(chunk_length=8), layer=1), LshAttention(LshSpec(chunk_length=8))
    state = torch.get_rng_state()
    once = layer.eval()(q, k, v)
    assert torch.equal(once, layer(q, k, v))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(once, other.eval()(q, k, v))
    torch.testing.assert_close(once[:1], layer(q[:1], k[:1], v[:1]))  # whatever else is in the batch
    torch.manual_seed(0)
    drawn = [layer.train()(q, k, v) for _ in range(2)]
    assert not torch.equal(*drawn)
    torch.manual_seed(0)
    assert torch.equal(layer(q, k, v), drawn[0])


@pytest.mark.parametrize(
    ("length", "factors"), [(64, [2]), (64 * 64, [128]), (64 * 128, [16, 16]), (65536, [46, 46])]
)
def test_two_buckets_for_a_chunk(length, factors) -> None:
    assert default_buckets(length, 64) == factors
    assert math.prod(factors) >= 2 * length // 64


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        (7, "7 is odd"),
        ([4, 5], "5 is odd"),
        ([2**15, 2**15, 2], "2147483648 in all are more than 1073741824"),
        (2**20, "less than or equal to 32768"),
        (0, "greater than or equal to 2"),
        ([], "at least 1 item"),
    ],
)
def test_buckets_that_do_not_fit(buckets: int | list[int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LshSpec(buckets=buckets)


def test_more_buckets_than_tokens() -> None:
    q, k, v = tokens(40)
    layer = LshAttention(LshSpec(chunk_length=8, buckets=[64, 64])).eval()
    assert layer(q, k, v).isfinite().all()


def test_alike_keys_first_then_recent_ones() -> None:
    q, k, v = tokens(40, batch=2)
    generator = torch.Generator().manual_seed(2)
    buckets = torch.randint(0, 4, (2, 40, 2, HEADS), generator=generator)
    hidden = torch.zeros(2, 40, dtype=torch.bool)
    hidden[0, :3] = True
    most, new = 12, 3
    actual = attend_alike(q[:, :, -new:], k, v, buckets, hidden, most)
    for b, h, row in [(b, h, row) for b in range(2) for h in range(HEADS) for row in range(new)]:
        query = 40 - new + row
        seen = [key for key in range(query + 1) if not hidden[b, key]]
        alike = {key: bool((buckets[b, key, :, h] == buckets[b, query, :, h]).any()) for key in seen}
        chosen = [key for _, key in sorted((alike[key], key) for key in seen)][-most:]
        chosen.remove(query)  # itself weighs nothing beside others
        weights = (k[b, h, chosen] @ q[b, h, query]).softmax(0)
        torch.testing.assert_close(actual[b, h, row], weights @ v[b, h, chosen], atol=1e-5, rtol=1e-5)


def test_buckets_of_held_keys_are_those_of_their_number() -> None:
    """Growing token by token, through lengths at which all are hashed again, and after going back."""
    layer = LshAttention(LshSpec(rounds=2, chunk_length=2, chunks_before=0)).eval()
    q, k, v = tokens(40)

    def run(start: int, stop: int, memory: DecodeLayer) -> Tensor:
        held = memory.update(k[:, :, start:stop], v[:, :, start:stop])
        return layer(q[:, :, start:stop], *held, layer_cache=memory)

    memory = DecodeLayer(capacity=4)
    steps = [run(t, t + 1, memory) for t in range(40)]
    memory.crop(-20)
    torch.testing.assert_close(
        torch.cat([run(t, t + 1, memory) for t in range(20, 40)], 2), torch.cat(steps[20:], 2)
    )
    at_once = DecodeLayer()
    run(0, 36, at_once)  # prefix: hashed when the first token is decoded
    torch.testing.assert_close(run(36, 40, at_once), torch.cat(steps[36:], 2))


@pytest.mark.parametrize("kept", [0, 3])
def test_keys_are_not_looked_up_under_the_buckets_of_a_text_before_them(kept: int) -> None:
    """A memory that was reset or cropped, to where a query reads all keys unhashed, is like a fresh one."""
    layer = LshAttention(LshSpec(rounds=2, chunk_length=2, chunks_before=0, buckets=8)).eval()
    old, new = tokens(24), tokens(24, seed=1)

    def write(text: tuple[Tensor, ...], start: int, stop: int, memory: DecodeLayer) -> Tensor:
        steps = []
        for t in range(start, stop):
            q, k, v = (x[:, :, t : t + 1] for x in text)
            steps.append(layer(q, *memory.update(k, v), layer_cache=memory))
        return torch.cat(steps, 2) if steps else torch.empty(0)

    used, fresh = DecodeLayer(), DecodeLayer()
    write(old, 0, 24, used)
    if kept:
        used.crop(kept - 24)
    else:
        used.reset()
    write(old, 0, kept, fresh)
    torch.testing.assert_close(write(new, kept, 24, used), write(new, kept, 24, fresh))


MODEL: dict[str, Any] = {
    "d_model": 16,
    "layers": 2,
    "heads": 2,
    "max_positions": 64,
    "feed_forward": {"kind": "sparse", "d_ff": 32, "block_size": 8, "rank": 4},
    "vocabulary": {"kind": "dense", "size": 11},
}
LSH = {"kind": "lsh", "lsh": {"rounds": 2, "chunk_length": 8}}


def language_model(attention: dict[str, Any], **fields: Any) -> ScalingTransformerForCausalLM:
    torch.manual_seed(0)
    config = ScalingTransformerConfig(**MODEL | {"attention": attention} | fields)
    return ScalingTransformerForCausalLM(config).eval()


SHARED = {"share_query_key": True}
ATTENTIONS = {
    "full, shared": SHARED,
    "full, shared, convolved": SHARED | {"projection": "multiplicative_conv"},
    "lsh": LSH,
    "lsh, shared, multiplicative": LSH | SHARED | {"projection": "multiplicative"},
    "lsh, convolved": LSH | {"projection": "multiplicative_conv"},
}


@pytest.mark.parametrize("fields", [{}, {"residual": "reversible", "positions": "rotary"}], ids=["", "rev"])
@pytest.mark.parametrize("name", list(ATTENTIONS))
def test_cached_decoding_is_the_full_forward(name, fields) -> None:
    """As long as a token reads all that there is: two rounds of a chunk and the one before it."""
    model = language_model(ATTENTIONS[name], **fields)
    ids = torch.randint(0, 11, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = model(ids, attention_mask=mask).logits
    past, steps = None, []
    for start, stop in ((0, 4), (4, 5), (5, 8)):
        output = model(ids[:, start:stop], mask[:, :stop], past_key_values=past, use_cache=True)
        past = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1)[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)


def test_generation_does_not_depend_on_padding() -> None:
    model = language_model(LSH)
    prompts = [torch.randint(2, 11, (1, length)) for length in (3, 7)]
    alone = [model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0) for ids in prompts]
    batch = torch.cat([torch.nn.functional.pad(ids, (7 - ids.shape[1], 0)) for ids in prompts])
    made = model.generate(batch, attention_mask=(batch > 0).long(), max_new_tokens=12, pad_token_id=0)
    assert [row[-12:].tolist() for row in made] == [row[0, -12:].tolist() for row in alone]


def test_hashing_a_trained_models_projections_needs_no_new_weights() -> None:
    full, hashed = language_model({}), language_model(LSH)
    assert full.state_dict().keys() == hashed.state_dict().keys()
    shared = language_model(SHARED)
    assert {name for name in full.state_dict() if name not in shared.state_dict()} == {
        f"model.layers.{block}.attention.projection.key.{part}"
        for block in range(2)
        for part in ("weight", "bias")
    }


def terraformer(chunk_length: int) -> TerraformerForConditionalGeneration:
    torch.manual_seed(0)
    lsh = {"kind": "lsh", "lsh": {"rounds": 2, "chunk_length": chunk_length, "chunks_after": 1}}
    encoder = {"layers": 2, "max_positions": 64, "attention": lsh, "read_by": {"kind": "prefix"}}
    decoder = {"attention": lsh | {"projection": "multiplicative_conv"}, "attention_layers": 2, "sru": {}}
    fields = MODEL | decoder | {"encoder": encoder, "residual": "reversible", "positions": "digits"}
    return TerraformerForConditionalGeneration(TerraformerConfig(**fields)).eval()


SOURCES = torch.randint(2, 11, (3, 40), generator=torch.Generator().manual_seed(1))
SOURCES[1, 30:], SOURCES[2, 2:] = 0, 0


def test_terraformer_writes_what_it_says_with_its_own_words_before() -> None:
    model = terraformer(chunk_length=64)
    mask = (SOURCES > 0).long()
    written = model.generate(SOURCES, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=-1)
    assert written.shape == (3, 10)
    logits = model(SOURCES, attention_mask=mask, decoder_input_ids=written[:, :-1]).logits
    assert torch.equal(logits.argmax(-1), written[:, 1:])


def test_terraformer_trains_on_sources_of_many_chunks() -> None:
    model = terraformer(chunk_length=4).train()
    labels = torch.randint(2, 11, (3, 7))
    model(SOURCES, attention_mask=(SOURCES > 0).long(), labels=labels).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
    written = model.eval().generate(SOURCES, attention_mask=(SOURCES > 0).long(), max_new_tokens=5)
    assert written.shape[0] == 3


RECIPE = """
model: {d_model: 16, layers: 1, heads: 2, max_positions: 48, feed_forward: {kind: dense, d_ff: 32},
        vocabulary: {kind: dense, size: 300}}
data: {source: files, paths: ["FOLDER/text.txt"], sequence_length: 48, held_out_tokens: 480,
       tokenizer: {kind: bpe, vocabulary_size: 270}}
train: {max_steps: 2, per_device_train_batch_size: 4, logging_steps: 1, save_steps: 1}
"""


def test_a_model_with_full_attention_goes_on_with_hashing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSECLI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(" ".join(str(number * number % 97) for number in range(3000)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("FOLDER", str(tmp_path)))
    run(load(str(recipe)), output=tmp_path / "full")
    start = f"train.init_from={tmp_path / 'full'}"
    hashing = "model.attention={kind: lsh, lsh: {chunk_length: 8, rounds: 4}}"
    result = run(load(str(recipe), [start, hashing]), output=tmp_path / "hashed")
    assert result is not None
    assert math.isfinite(result.held_out_loss)
    spec = read_description(tmp_path / "hashed" / "model").spec
    assert spec.attention.hashing == LshSpec(chunk_length=8, rounds=4)
    network = load_network(tmp_path / "full" / "model", spec=spec)
    assert network.model.layers[0].attention.lsh is not None
    full = load_network(tmp_path / "full" / "model").state_dict()
    assert all(torch.equal(tensor, full[name]) for name, tensor in network.state_dict().items())

    shared = "model.attention={kind: lsh, share_query_key: true}"  # has fewer weights
    with pytest.raises(
        RecipeError,
        match=r"init_from .*: model\.attention\.share_query_key: false in the model, true in the recipe;",
    ):
        run(load(str(recipe), [start, shared]), output=tmp_path / "shared")
    fewer = "model.attention={kind: lsh, lsh: {chunk_length: 8, rounds: 2}}"
    with pytest.raises(Failure, match=r"another recipe: model\.attention\.lsh\.rounds \(4 then, 2 now\)"):
        run(load(str(recipe), [start, fewer]), output=tmp_path / "hashed", resume="auto")


def test_gradients_through_a_reversible_stack() -> None:
    """Rotations, dropout and buckets are those of the forward pass when it is computed again."""
    layer = LshAttention(LshSpec(chunk_length=4)).train()
    weight = torch.nn.Parameter(torch.randn(WIDTH * HEADS, WIDTH * HEADS) / 4)

    def attend(x: Tensor) -> Tensor:
        q = (x @ weight).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return layer(q, unit_keys(q), q, dropout=0.3).transpose(1, 2).flatten(-2)

    halves = [Half(attend, [weight]) for _ in range(3)]
    x = torch.randn(2, 18, WIDTH * HEADS, requires_grad=True)
    found = []
    for stack in (plain_stack, reversible_stack):
        torch.manual_seed(3)
        a, b = stack(halves, x, x)
        found.append(torch.autograd.grad((a * b).mean(), (x, weight)))
    for plain, reversible in zip(*found, strict=True):
        torch.testing.assert_close(reversible, plain, atol=1e-5, rtol=1e-4)


def test_training_in_bfloat16_and_with_blocks_computed_again() -> None:
    model = language_model(LSH | SHARED, dropout=0.1).train()
    ids = torch.randint(0, 11, (2, 50))
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids).loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    gradients = []
    for change in (model.activation_checkpointing_enable, model.activation_checkpointing_disable):
        change()
        model.zero_grad()
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
