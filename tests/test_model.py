"""The model as Hugging Face users meet it: every way to decode gives the same logits, every tool works."""

from __future__ import annotations

import copy
import itertools
import re
import sys

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from sparsecli import cli
from sparsecli.console import Failure
from sparsecli.model import DecodeCache, ScalingTransformerConfig, ScalingTransformerForCausalLM, versions
from sparsecli.model.cache import CACHE
from sparsecli.model.huge_pages import move_to_huge_pages
from sparsecli.model.layers.feed_forward import SparseFeedForward, choose
from sparsecli.model.layers.multiplicative import MultiplicativeDense
from sparsecli.model.sizes import count_parameters
from sparsecli.model.tensors import tensor_shapes

VOCABULARY = 96
FEED_FORWARD = {
    "dense": {"kind": "dense", "d_ff": 64},
    "swiglu": {"kind": "dense", "d_ff": 64, "activation": "silu", "gated": True, "bias": False},
    "sparse": {"kind": "sparse", "d_ff": 64, "block_size": 8, "rank": 6},
    "sparse 2 of 16, gated": {
        "kind": "sparse",
        "d_ff": 64,
        "block_size": 16,
        "rank": 6,
        "units_per_block": 2,
        "activation": "silu",
        "gated": True,
        "unit_bias": True,
    },
    "mixture": {"kind": "mixture", "d_ff": 64, "experts": 4, "experts_per_token": 2, "gate": "probability"},
}
ATTENTION = {
    "dense": {"projection": "dense"},
    "grouped": {"projection": "dense", "key_value_heads": 2, "bias": False},
    "multiplicative": {"projection": "multiplicative"},
    "multiplicative_conv": {"projection": "multiplicative_conv", "modules": 8},
    "conv everywhere": {
        "projection": "multiplicative_conv",
        "output_projection": "multiplicative_conv",
        "value_concat": "modules",
    },
    "dense_conv": {"projection": "dense_conv", "kernel": 2},
}
VOCABULARIES = {
    "dense": {"kind": "dense", "size": VOCABULARY},
    "tied": {"kind": "dense", "size": VOCABULARY, "tied": True},
    "multiplicative": {"kind": "multiplicative", "size": VOCABULARY, "modules": 4},
}
# Every choice at least once, in combinations that meet different neighbours.
KINDS = list(
    zip(
        itertools.cycle(FEED_FORWARD),
        ATTENTION,
        itertools.cycle(VOCABULARIES),
        itertools.cycle(["learned", "rotary", "sinusoidal"]),
        itertools.cycle(["layer", "rms"]),
        strict=False,
    )
)


def build(
    feed_forward: str = "sparse",
    attention: str = "multiplicative_conv",
    vocabulary: str = "dense",
    positions: str = "rotary",
    normalization: str = "layer",
    **fields: object,
) -> ScalingTransformerForCausalLM:
    torch.manual_seed(0)
    config = ScalingTransformerConfig(
        d_model=32,
        layers=2,
        heads=4,
        max_positions=64,
        feed_forward=FEED_FORWARD[feed_forward],
        attention=ATTENTION[attention],
        vocabulary=VOCABULARIES[vocabulary],
        positions=positions,
        normalization=normalization,
        pad_token_id=0,
        **fields,
    )
    return ScalingTransformerForCausalLM(config).eval()


def prompt(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "/".join(kind))
@torch.no_grad()
def test_every_way_to_decode_gives_the_same_logits(kind: tuple[str, ...]) -> None:
    model = build(*kind)
    ids = prompt()
    whole = model(ids).logits
    past, steps = None, []
    for chunk in ids.split([5, 1, 1, 2, 1, 1, 1], dim=1):  # a prefill, single tokens and a chunk in between
        output = model(chunk, past_key_values=past, use_cache=True)
        past = output.past_key_values
        steps.append(output.logits)
    assert_same(torch.cat(steps, dim=1), whole)

    generated = model.generate(
        ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    again = model(generated.sequences).logits[:, ids.shape[1] - 1 : -1]
    assert_same(torch.stack(generated.logits, dim=1), again)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "/".join(kind))
@torch.no_grad()
def test_left_padding_changes_nothing(kind: tuple[str, ...]) -> None:
    model = build(*kind)
    ids = prompt()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    assert_same(model(padded, attention_mask=mask).logits[:, 3:], model(ids).logits)
    settings = {"max_new_tokens": 6, "do_sample": False}
    alone = model.generate(ids[1:], **settings)[0, ids.shape[1] :]
    ragged = padded.clone()
    ragged_mask = mask.clone()
    ragged[0, 3:7], ragged_mask[0, 3:7] = 0, 0  # the neighbour is shorter still
    together = model.generate(ragged, attention_mask=ragged_mask, **settings)[1, padded.shape[1] :]
    assert torch.equal(alone, together)


@torch.no_grad()
def test_sampling_is_reproducible_and_random() -> None:
    model, ids = build(), prompt(1)

    def sample(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return model.generate(ids, max_new_tokens=10, do_sample=True)[0].tolist()

    assert sample(0) == sample(0) != sample(1)


@pytest.mark.parametrize("kind", KINDS[:4], ids=lambda kind: "/".join(kind))
@torch.no_grad()
def test_beam_search_equals_search_without_a_cache(kind: tuple[str, ...]) -> None:
    model, ids = build(*kind), prompt()
    settings = {"max_new_tokens": 8, "num_beams": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("attention", ["multiplicative_conv", "conv everywhere"])
@torch.no_grad()
def test_assisted_decoding_equals_greedy(attention: str) -> None:
    """The draft is wrong at times, so the cache, convolution history included, has to be rolled back."""
    model, ids = build(attention=attention), prompt(1)
    draft = build(attention=attention)
    for parameter in draft.parameters():
        parameter.add_(0.1 * parameter.std().nan_to_num() * torch.randn_like(parameter))
    settings = {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert not torch.equal(draft.generate(ids, **settings), expected)
    assert torch.equal(model.generate(ids, assistant_model=draft, **settings), expected)


def test_cache_grows_past_its_capacity() -> None:
    model, ids = build(attention="conv everywhere"), prompt()
    with torch.no_grad():
        small = DecodeCache(model.config.layers, capacity=2)
        steps = [model(ids[:, t : t + 1], past_key_values=small, use_cache=True).logits for t in range(12)]
        assert_same(torch.cat(steps, dim=1), model(ids).logits)
    assert small.get_seq_length() == 12


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_save_and_load_round_trip(vocabulary: str, tmp_path: object) -> None:
    model = build(vocabulary=vocabulary, positions="learned")
    model.save_pretrained(tmp_path)
    loaded = ScalingTransformerForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.spec == model.config.spec
    assert_same(loaded(prompt()).logits, model(prompt()).logits)


def test_auto_classes_and_pipeline(tmp_path: object) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

    model = build()
    model.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(tmp_path)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), ScalingTransformerForCausalLM)
    write = pipeline("text-generation", model=str(tmp_path))
    text = write("w5 w6 w7", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)[0]
    assert [int(word) for word in text.replace("w", " ").split()] == expected.tolist()


def test_gradient_checkpointing_changes_no_gradient() -> None:
    """Noise (Gumbel, hard or soft draws, dropout) must be replayed in the recomputation."""

    def gradients(checkpointing: bool) -> list[Tensor]:
        model = build(dropout=0.1).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(3)
        model(prompt(), labels=prompt()).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert_same(recomputed, plain)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids=lambda kind: "/".join(kind))
@torch.no_grad()
def test_compiles_without_graph_breaks(kind: tuple[str, ...]) -> None:
    model, ids = build(*kind), prompt()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(compiled(ids).logits, model(ids).logits)
    mask = torch.ones_like(ids)
    assert_same(compiled(ids, attention_mask=mask).logits, model(ids).logits)


def test_training_draws() -> None:
    """Hard calls use whole units, soft calls none; about `hard_fraction` of the calls are hard."""
    from sparsecli.model.layers.feed_forward import training_mask

    torch.manual_seed(0)
    logits = torch.randn(4, 6, 8)
    hard = 0
    for _ in range(400):
        mask, is_hard = training_mask(logits, 2, temperature=0.1, hard_fraction=0.3)
        whole = bool(((mask == 0) | ((mask - 1).abs() < 1e-6)).all())
        assert whole == bool(is_hard)
        torch.testing.assert_close(mask.sum(-1), torch.full((4, 6), 2.0))
        hard += whole
    assert 90 <= hard <= 150


def test_gumbel_noise_follows_the_probabilities() -> None:
    """At temperature 1 the noisy argmax draws each unit with its softmax probability."""
    from sparsecli.model.layers.feed_forward import training_mask

    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5]).expand(20000, 1, 4)
    mask, _ = training_mask(logits, 1, temperature=1.0, hard_fraction=1.0)
    torch.testing.assert_close(mask.mean(0)[0], logits[0, 0].softmax(-1), atol=0.015, rtol=0)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("units_per_block", [1, 3])
@pytest.mark.parametrize("tokens", [1, 7])
@torch.no_grad()
def test_gathered_rows_equal_masked_product(gated: bool, units_per_block: int, tokens: int) -> None:
    torch.manual_seed(0)
    layer = SparseFeedForward(16, 96, 8, 5, units_per_block, "gelu", gated, unit_bias=True).eval()
    torch.nn.init.normal_(layer.unit_bias)
    x = torch.randn(tokens, 16)
    chosen = layer.controller(x).topk(units_per_block).indices
    assert_same(layer.evaluate_gathered(x, chosen), layer.evaluate_masked(x, chosen))


@torch.no_grad()
def test_decoding_reads_chosen_rows_alone() -> None:
    """NaN in every unchosen row must not reach the output of a single token."""
    torch.manual_seed(0)
    layer = SparseFeedForward(16, 96, 8, 5, units_per_block=2).eval()
    x = torch.randn(1, 16)
    expected = layer(x)
    chosen = layer.controller(x).topk(2).indices[0] + torch.arange(0, 96, 8)[:, None]
    unchosen = torch.ones(96, dtype=torch.bool).index_fill(0, chosen.flatten(), False)
    layer.up[unchosen] = float("nan")
    layer.down[unchosen] = float("nan")
    assert_same(layer(x), expected)


@torch.no_grad()
def test_multiplicative_paths_agree() -> None:
    torch.manual_seed(0)
    layer = MultiplicativeDense(24, 40, modules=5)
    x = torch.randn(30, 24)
    assert_same(torch.cat([layer(token[None]) for token in x]), layer(x))


def test_sizes_count_what_a_token_reads() -> None:
    model = build()
    sizes = count_parameters(model.config.spec)
    assert sizes.total == sum(parameter.numel() for parameter in model.parameters())
    unread_units = 2 * 2 * 64 * 32 * 7 // 8  # layers, up and down, d_ff, d, 7 of 8 units
    assert sizes.active == sizes.total - unread_units - (VOCABULARY - 1) * 32
    assert sizes.bytes_per_token("bfloat16", 10) == 2 * (sizes.active + 10 * 2 * 2 * 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward": {"kind": "sparse", "d_ff": 60, "block_size": 8, "rank": 4}}, "nearest: 56 and 64"),
        ({"feed_forward": {"kind": "spars", "d_ff": 64}}, "feed_forward"),
        ({"heads": 5}, "nearest: 30 and 35"),
    ],
)
def test_configuration_refuses_what_does_not_fit(change: dict, message: str) -> None:
    fields = {"d_model": 32, "heads": 4, "feed_forward": FEED_FORWARD["sparse"], **change}
    with pytest.raises(Exception, match=message):
        ScalingTransformerConfig(**fields)


def test_too_many_positions_are_refused() -> None:
    model = build(positions="learned")
    with pytest.raises(ValueError, match="65 positions are more than max_positions 64"):
        model(torch.ones(1, 65, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_moving_to_huge_pages_changes_no_weight(dtype: torch.dtype) -> None:
    model, ids = build(vocabulary="tied").to(dtype), prompt()
    expected = model(ids).logits
    move_to_huge_pages(model)
    assert torch.equal(model(ids).logits, expected)
    assert model.head.weight is model.model.embedding.weight
    starts = [parameter.data_ptr() for parameter in model.parameters()]
    assert all(start % 64 == 0 for start in starts)
    assert max(starts) - min(starts) < sum(p.numel() * p.element_size() + 64 for p in model.parameters())


@torch.no_grad()
def test_what_other_models_return_too() -> None:
    model, ids = build(), prompt()
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.layers + 1
    assert_same(model.head(output.hidden_states[-1]), output.logits)
    assert isinstance(model(ids, return_dict=False), tuple)
    assert model(ids).hidden_states is None
    with pytest.raises(ValueError, match="the cache is a DynamicCache; this model keeps a DecodeCache"):
        model(ids, past_key_values=DynamicCache(), use_cache=True)
    model.resize_token_embeddings(VOCABULARY + 4)
    assert model(ids).logits.shape[-1] == model.config.vocab_size == VOCABULARY + 4


@torch.no_grad()
def test_a_cache_has_the_names_of_every_version_of_transformers() -> None:
    model, ids = build(), prompt()
    whole, first = model(ids).logits, model(ids[:, :-1], use_cache=True)
    assert_same(model(ids[:, -1:], cache=copy.deepcopy(first[CACHE])).logits, whole[:, -1:])
    assert_same(model(ids[:, -1:], past_key_values=first[CACHE]).logits, whole[:, -1:])
    with pytest.raises(ValueError, match="two names for one cache"):
        model(ids, past_key_values=first[CACHE], cache=first[CACHE])


def test_a_version_of_transformers_that_is_too_old_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(versions, "OLDEST", "9.1")
    message = f"transformers {transformers.__version__} is older than 9.1: pip install 'transformers>=9.1'"
    with pytest.raises(Failure, match=re.escape(message)):
        build()
    monkeypatch.setattr(sys, "argv", ["sparsecli", "train", "quickstart", "--dry-run"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_cuda_equals_cpu(dtype: torch.dtype) -> None:
    model, ids = build(), prompt()
    expected = model.to(dtype)(ids).logits.float()
    tolerance = 1e-3 if dtype == torch.float32 else 0.2
    actual = model.cuda()(ids.cuda()).logits.float().cpu()
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "/".join(kind))
@torch.no_grad()
def test_bfloat16_runs_and_stays_near_float32(kind: tuple[str, ...]) -> None:
    model, ids = build(*kind), prompt()
    expected = model(ids).logits.softmax(-1)
    actual = model.to(torch.bfloat16)(ids).logits
    assert actual.dtype == torch.bfloat16
    assert (actual.float().softmax(-1) - expected).abs().mean() < 0.01


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "/".join(kind))
def test_tensor_shapes_need_no_model(kind: tuple[str, ...]) -> None:
    model = build(*kind)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert tensor_shapes(model.config.spec) == expected


@pytest.mark.parametrize("value_concat", ["none", "modules", "whole"])
@pytest.mark.parametrize("output_projection", ["none", "dense", "multiplicative", "multiplicative_conv"])
@pytest.mark.parametrize("projection", ["dense_conv", "multiplicative_conv"])
def test_tensor_shapes_of_every_projection(
    projection: str, output_projection: str, value_concat: str
) -> None:
    attention = {
        "projection": projection,
        "output_projection": output_projection,
        "value_concat": value_concat,
        "modules": 8,
    }
    model = ScalingTransformerForCausalLM(
        ScalingTransformerConfig(
            d_model=32,
            layers=1,
            heads=4,
            attention=attention,
            vocabulary={"kind": "dense", "size": 96, "bias": True},
        )
    )
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert tensor_shapes(model.config.spec) == expected


@torch.no_grad()
def test_fields_of_foreign_checkpoints() -> None:
    foreign = {
        "attention": {
            **ATTENTION["grouped"],
            "bias": True,
            "output_bias": False,
            "query_key_norm": True,
        },
        "head_width": 12,
        "rotary_fraction": 0.5,
        "rotary_scaling": {"kind": "linear", "factor": 4.0},
        "parallel": True,
        "embedding_scale": 5.5,
    }
    fields = build("swiglu", normalization="rms").config.to_dict() | foreign
    model = ScalingTransformerForCausalLM(ScalingTransformerConfig(**fields)).eval()
    assert tensor_shapes(model.config.spec) == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    assert count_parameters(model.config.spec).cached_per_position == 2 * 2 * 2 * 12

    ids = prompt()
    expected = model(ids).logits
    embedded = model.get_input_embeddings()(ids)
    assert_same(model(inputs_embeds=embedded).logits, expected)
    first = model(ids[:, :7], use_cache=True)
    rest = model(ids[:, 7:], past_key_values=first.past_key_values)
    assert_same(torch.cat((first.logits, rest.logits), 1), expected)


@pytest.mark.parametrize("count", [1, 3, 5, 16])
def test_of_equal_scores_the_first_units_are_chosen(count: int) -> None:
    scores = torch.tensor([0.0, 1.0] * 8).expand(3, -1)
    expected = [*range(1, 16, 2), *range(0, 16, 2)][:count]
    assert choose(scores, count).tolist() == [expected] * 3
