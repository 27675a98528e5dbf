"""Models that read a source and write a target, as Hugging Face users meet them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSeq2SeqLM

from sparsecli.console import Failure
from sparsecli.model import DecodeCache, decoder, encoder
from sparsecli.model.auto import Network, build_network
from sparsecli.model.cache import CACHE
from sparsecli.model.layers.reversible import plain_stack, reversible_stack
from sparsecli.model.loading import load_network
from sparsecli.model.sizes import count_parameters
from sparsecli.model.tensors import tensor_shapes
from sparsecli.spec.model import ModelSpec

VOCABULARY = 96
SPARSE = {"kind": "sparse", "d_ff": 64, "block_size": 8, "rank": 6}
COMMON = {
    "d_model": 32,
    "layers": 2,
    "heads": 4,
    "max_positions": 40,
    "feed_forward": SPARSE,
    "attention": {"projection": "multiplicative_conv", "modules": 8},
    "vocabulary": {"kind": "multiplicative", "size": VOCABULARY, "modules": 4},
    "positions": "learned",
    "encoder": {"layers": 2, "max_positions": 24},
}
MODELS: dict[str, dict] = {
    "cross-attention": {},
    "dense, tied, rotary": {
        "feed_forward": {"kind": "dense", "d_ff": 64},
        "attention": {"projection": "dense", "key_value_heads": 2},
        "vocabulary": {"kind": "dense", "size": VOCABULARY, "tied": True},
        "positions": "rotary",
        "encoder": {"layers": 1, "max_positions": 24, "feed_forward": {"kind": "dense", "d_ff": 32}},
    },
    "convolved queries, recurrent": {
        "encoder": {
            "layers": 2,
            "max_positions": 24,
            "read_by": {"kind": "cross_attention", "query_modules": 8},
        },
        "sru": {"width": 8},
        "vocabulary": {"kind": "dense", "size": VOCABULARY},
        "normalization": "rms",
    },
    "Terraformer": {
        "residual": "reversible",
        "attention_layers": 2,
        "sru": {"width": 8},
        "encoder": {"layers": 2, "max_positions": 24, "read_by": {"kind": "prefix"}},
    },
    "Terraformer, one stream, digits": {
        "residual": "reversible",
        "sru": {"width": 8, "layers": 2},
        "encoder": {"layers": 1, "max_positions": 24, "read_by": {"kind": "prefix", "streams": 1}},
        "positions": "digits",
        "feed_forward": {"kind": "dense", "d_ff": 64},
        "vocabulary": {"kind": "dense", "size": VOCABULARY, "tied": True},
    },
    "Terraformer, one swap, rotary, side by side": {
        "residual": "reversible",
        "merge": "concatenate",
        "encoder": {"layers": 3, "max_positions": 24, "read_by": {"kind": "prefix"}, "two_swaps": False},
        "attention": {"projection": "dense", "share_query_key": True},
        "positions": "rotary",
        "vocabulary": {"kind": "dense", "size": VOCABULARY},
    },
}


def build(name: str, **fields: object) -> Network:
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return build_network(ModelSpec.model_validate({**COMMON, **MODELS[name], **fields}), **tokens).eval()


def sources(*lengths: int, width: int | None = None) -> dict[str, Tensor]:
    """Random sources of these lengths, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    width = width or max(lengths)
    ids = torch.randint(2, VOCABULARY, (len(lengths), 64), generator=generator)[:, :width]
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def targets(rows: int, length: int) -> Tensor:
    ids = torch.randint(2, VOCABULARY - 1, (rows, length), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 0
    return ids


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_way_to_decode_gives_the_same_logits(name: str) -> None:
    model, given, ids = build(name), sources(11, 3), targets(2, 12)
    whole = model(**given, decoder_input_ids=ids).logits
    encoded = model.model.encode(**given)
    past, steps = None, []
    for chunk in ids.split([4, 1, 1, 3, 1, 2], dim=1):  # a prefill, single tokens and chunks in between
        output = model(
            attention_mask=given["attention_mask"],
            encoder_outputs=encoded,
            decoder_input_ids=chunk,
            past_key_values=past,
            use_cache=True,
        )
        past = output.past_key_values
        steps.append(output.logits)
    assert_same(torch.cat(steps, dim=1), whole)

    written = model.generate(**given, max_new_tokens=8, output_logits=True, return_dict_in_generate=True)
    again = model(**given, decoder_input_ids=written.sequences).logits[:, :-1]
    assert_same(torch.stack(written.logits, dim=1), again)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_padding_and_neighbours_change_nothing(name: str) -> None:
    """Sources of different lengths, one of a single token, with ever more padding behind them."""
    model, lengths, ids = build(name), (11, 1, 7), targets(3, 6)
    together, wider = (
        model(**sources(*lengths, width=width), decoder_input_ids=ids).logits for width in (11, 20)
    )
    assert_same(wider, together)
    for row, length in enumerate(lengths):
        alone = {key: value[row : row + 1, :length] for key, value in sources(*lengths).items()}
        assert_same(model(**alone, decoder_input_ids=ids[row : row + 1]).logits, together[row : row + 1])
        one = model.generate(**alone, max_new_tokens=5)[0]
        assert one.tolist() == model.generate(**sources(*lengths), max_new_tokens=5)[row, : len(one)].tolist()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_source_of_padding_alone_counts_as_none(name: str) -> None:
    model, ids = build(name), targets(2, 4)
    logits = model(**sources(5, 0), decoder_input_ids=ids).logits
    assert logits.isfinite().all()
    assert_same(model(**sources(0, 0, width=9), decoder_input_ids=ids).logits[1], logits[1])
    assert model.generate(**sources(5, 0), max_new_tokens=3).shape == (2, 4)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_beam_search_equals_search_without_a_cache(name: str) -> None:
    model, given = build(name), sources(9, 4)
    settings = {"max_new_tokens": 7, "num_beams": 3, "do_sample": False}
    assert torch.equal(
        model.generate(**given, **settings), model.generate(**given, use_cache=False, **settings)
    )


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_text_goes_on_from_the_cache_of_what_was_written(name: str) -> None:
    model, given = build(name), sources(11, 3)
    settings = {
        "do_sample": False,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    whole = model.generate(**given, max_new_tokens=9, **settings)
    first = model.generate(**given, max_new_tokens=4, **settings)
    assert first[CACHE].get_seq_length() == 4  # the start token and all written ones but the last
    going_on = {
        "decoder_input_ids": first.sequences,
        "decoder_attention_mask": torch.ones_like(
            first.sequences
        ),  # tells generate that these are all tokens
        CACHE: first[CACHE],
    }
    rest = model.generate(**given, **going_on, max_new_tokens=5, **settings)
    assert torch.equal(rest.sequences, whole.sequences)
    assert_same(torch.stack(rest.logits), torch.stack(whole.logits[4:]))


def test_a_cache_behind_another_source_is_refused() -> None:
    model, ids = build("Terraformer"), targets(1, 2)
    cache = model(**sources(9), decoder_input_ids=ids, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="has a prefix of 9 tokens, not of 8"):
        model(**sources(8), decoder_input_ids=ids, past_key_values=cache)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_assisted_decoding_equals_greedy(name: str) -> None:
    """The draft is wrong at times, so that the cache has to be rolled back, recurrent states included."""
    model, draft, given = build(name), build(name), sources(9)
    for parameter in draft.parameters():
        parameter.add_(0.3 * parameter.std().nan_to_num() * torch.randn_like(parameter))
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**given, **settings)
    assert not torch.equal(draft.generate(**given, **settings), expected)
    assert torch.equal(model.generate(**given, assistant_model=draft, **settings), expected)


@torch.no_grad()
def test_sampling_is_reproducible_and_random() -> None:
    model, given = build("cross-attention"), sources(9)

    def sample(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return model.generate(**given, max_new_tokens=10, do_sample=True)[0].tolist()

    assert sample(0) == sample(0) != sample(1)


@pytest.mark.parametrize("name", MODELS)
def test_loss_leaves_out_padding_and_trains_every_weight(name: str) -> None:
    model, given = build(name, dropout=0.1), sources(9, 4)
    labels = targets(2, 5) + 1
    with torch.no_grad():
        plain = model(**given, labels=labels).loss
        for filler in (0, -100):
            padded = torch.nn.functional.pad(labels, (0, 3), value=filler)
            assert_same(model(**given, labels=padded).loss, plain)
        shifted = torch.nn.functional.pad(labels, (1, 0))[:, :-1]
        logits = model(**given, decoder_input_ids=shifted).logits
        assert_same(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), plain)
    model.train()
    model(**given, labels=labels).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load_round_trip(name: str, tmp_path: Path) -> None:
    model, given, ids = build(name), sources(9, 4), targets(2, 5)
    expected = model(**given, decoder_input_ids=ids).logits
    model.save_pretrained(tmp_path)
    for load in (load_network, AutoModelForSeq2SeqLM.from_pretrained):
        loaded = load(tmp_path).eval()
        assert type(loaded) is type(model)
        assert loaded.config.spec == model.config.spec
        assert_same(loaded(**given, decoder_input_ids=ids).logits, expected)
    assert type(AutoModel.from_pretrained(tmp_path)) is type(model.model)
    text = (tmp_path / "config.json").read_text()
    wrong = "scaling_transformer" if model.config.model_type == "terraformer" else "terraformer"
    (tmp_path / "config.json").write_text(text.replace(f'"{model.config.model_type}"', f'"{wrong}"'))
    with pytest.raises(Failure, match=f"model type {wrong} does not fit its encoder"):
        load_network(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_tensor_shapes_and_sizes_need_no_model(name: str) -> None:
    model = build(name)
    assert tensor_shapes(model.config.spec) == {
        key: tuple(tensor.shape) for key, tensor in model.state_dict().items()
    }
    sizes = count_parameters(model.config.spec)
    assert sizes.total == sum(parameter.numel() for parameter in model.parameters())
    encoder = sum(parameter.numel() for parameter in model.model.encoder.parameters())
    assert 0 < sizes.active <= sizes.total - encoder


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_cannot_be_read_is_refused_in_one_line(name: str) -> None:
    model, ids = build(name), targets(1, 3)
    with pytest.raises(ValueError, match="the source has no tokens"):
        model(input_ids=ids[:, :0], decoder_input_ids=ids)
    with pytest.raises(ValueError, match="attention_mask is 1 x 4, the source 1 x 3"):
        model(input_ids=ids, attention_mask=torch.ones(1, 4), decoder_input_ids=ids)
    with pytest.raises(ValueError, match="pass input_ids or inputs_embeds"):
        model(decoder_input_ids=ids)
    for given in ({}, {"decoder_input_ids": ids, "decoder_inputs_embeds": torch.zeros(1, 3, 32)}):
        with pytest.raises(
            ValueError, match=r"^the target is missing or there twice: pass .* `generate` needs none"
        ):
            model(input_ids=ids, **given)
    if model.model.position_embedding is not None:
        with pytest.raises(
            ValueError, match="a source of 25 tokens is longer than the encoder's max_positions 24"
        ):
            model(**sources(25), decoder_input_ids=ids)
        with pytest.raises(ValueError, match="41 positions are more than max_positions 40"):
            model(**sources(5), decoder_input_ids=targets(1, 41))
        with pytest.raises(
            ValueError, match=r"more than max_positions 40; .* `generate` adds \(max_new_tokens\) may"
        ):
            model.generate(**sources(5), min_new_tokens=60, max_new_tokens=60)


@torch.no_grad()
def test_labels_that_count_nothing_give_no_number_as_in_t5() -> None:
    model = build("cross-attention")
    assert model(**sources(5), labels=torch.full((1, 3), -100)).loss.isnan()


def test_axial_positions_reach_as_far_as_the_source() -> None:
    axial = {"shape": [6, 4], "widths": [16, 16]}
    fields = COMMON | {"max_positions": 12, "positions": "axial", "axial": axial}
    model = build_network(ModelSpec.model_validate(fields))
    assert model(**sources(24), decoder_input_ids=targets(1, 3)).logits.isfinite().all()
    encoder = {"layers": 1, "max_positions": 25}
    with pytest.raises(ValueError, match="24 positions are fewer than max_positions 25"):
        ModelSpec.model_validate(fields | {"encoder": encoder})


@torch.no_grad()
def test_cache_makes_keys_and_values_of_the_source_once() -> None:
    model, given, ids = build("cross-attention"), sources(9, 4), targets(2, 2)
    cache = DecodeCache.for_model(model.config.spec)
    model(**given, decoder_input_ids=ids, past_key_values=cache)
    made = cache.layers[0].fixed["cross_attention"][0]
    model(**given, decoder_input_ids=ids, past_key_values=cache)
    assert cache.layers[0].fixed["cross_attention"][0] is made
    cache.reset()
    assert cache.layers[0].fixed == {}


@torch.no_grad()
def test_the_papers_encoder_decoders_have_its_sizes() -> None:
    """The shapes of Table 1 (800M): millions of parameters of the original implementation's arrays."""
    sizes = {"d_model": 1024, "layers": 24, "heads": 16, "max_positions": 512, "positions": "learned"}
    sizes["encoder"] = {"layers": 24, "max_positions": 512}
    dense = {"kind": "dense", "size": 32000, "bias": True}
    head = {"kind": "multiplicative", "size": 32000, "modules": 4}
    sparse_attention = {"projection": "multiplicative_conv", "modules": 16}

    def millions(d_ff: int, sparse: bool, attention: dict, vocabulary: dict) -> float:
        feed_forward: dict = {"kind": "dense", "d_ff": d_ff}
        if sparse:
            feed_forward = {"kind": "sparse", "d_ff": d_ff, "block_size": 64, "rank": d_ff // 64}
        parts = {"feed_forward": feed_forward, "attention": attention, "vocabulary": vocabulary}
        return round(count_parameters(ModelSpec.model_validate({**sizes, **parts})).total / 1e6, 1)

    assert millions(4096, False, {}, dense) == 772.1
    assert millions(4096, True, {}, dense) == 787.8
    assert millions(6144, False, sparse_attention, dense) == 876.8
    assert millions(6144, True, sparse_attention, dense) == 909.8
    assert millions(6144, True, sparse_attention, head) == 885.2


def hashed(chunk_length: int, **fields: object) -> Network:
    """Terraformer whose encoder and decoder attend among tokens that hash alike."""
    lsh = {"rounds": 2, "chunk_length": chunk_length, "buckets": 4}
    attention = {"kind": "lsh", "lsh": lsh}
    encoder = {
        "layers": 2,
        "max_positions": 64,
        "attention": {**attention, "lsh": {**lsh, "chunks_after": 1}},
        "read_by": {"kind": "prefix"},
    }
    fields |= {"encoder": encoder, "attention": {**COMMON["attention"], **attention}, "max_positions": 64}
    return build("Terraformer", **fields)


@torch.no_grad()
def test_hashing_within_one_chunk_is_exact_when_decoding_too() -> None:
    model, given, ids = hashed(chunk_length=32), sources(11, 3), targets(2, 8)
    whole = model(**given, decoder_input_ids=ids).logits
    past, steps = None, []
    for token in ids.split(1, dim=1):
        output = model(**given, decoder_input_ids=token, past_key_values=past, use_cache=True)
        past = output.past_key_values
        steps.append(output.logits)
    assert_same(torch.cat(steps, dim=1), whole)


@torch.no_grad()
def test_hashing_sees_no_padding() -> None:
    """Up to whole chunks, of which the number matters: the first chunk sees the last one too."""
    model, ids = hashed(chunk_length=8), targets(2, 8)
    narrow, wide = (model(**sources(20, 6, width=width), decoder_input_ids=ids).logits for width in (20, 24))
    assert narrow.isfinite().all()
    assert_same(wide, narrow)
    assert model.generate(**sources(20, 6), max_new_tokens=12).shape == (2, 13)


@torch.no_grad()
def test_padding_of_a_hashed_target_takes_no_place_in_chunks() -> None:
    """Up to whole chunks again, so that the loss of a target is that beside a longer one."""
    model, given, labels = hashed(chunk_length=8), sources(20, 6), targets(2, 8) + 1
    labels[1, 5:] = -100
    plain = model(**given, labels=labels).loss
    for filler in (0, -100):
        padded = torch.nn.functional.pad(labels, (0, 4), value=filler)
        assert_same(model(**given, labels=padded).loss, plain)


@pytest.mark.parametrize("hashes", [False, True])
def test_storing_no_activations_changes_no_gradient(hashes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout, noise, hard and soft choices and hash buckets come out the same in the backward pass."""

    def gradients(stack: object) -> list[Tensor]:
        for module in (decoder, encoder):
            monkeypatch.setattr(module, "reversible_stack", stack)
        model = hashed(8, dropout=0.1) if hashes else build("Terraformer", dropout=0.1)
        model.train()
        torch.manual_seed(3)
        model(**sources(21, 6), labels=targets(2, 9) + 1).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    for actual, expected in zip(gradients(reversible_stack), gradients(plain_stack), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["convolved queries, recurrent", "Terraformer"])
@torch.no_grad()
def test_compiles_without_graph_breaks(name: str) -> None:
    model, given, ids = build(name), sources(9, 4), targets(2, 5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(compiled(**given, decoder_input_ids=ids).logits, model(**given, decoder_input_ids=ids).logits)


@pytest.mark.parametrize("name", ["cross-attention", "convolved queries, recurrent"])
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = build(name, dropout=0.1).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(3)
        model(**sources(9, 4), labels=targets(2, 5) + 1).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert_same(recomputed, plain)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_bfloat16_runs_and_stays_near_float32(name: str) -> None:
    model, given, ids = build(name), sources(9, 4), targets(2, 5)
    expected = model(**given, decoder_input_ids=ids).logits.softmax(-1)
    actual = model.to(torch.bfloat16)(**given, decoder_input_ids=ids).logits
    assert actual.dtype == torch.bfloat16
    assert (actual.float().softmax(-1) - expected).abs().mean() < 0.01
    model.generate(**given, max_new_tokens=3)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_other_models_return_too(name: str) -> None:
    model, given, ids = build(name), sources(9, 4), targets(2, 5)
    output = model(**given, decoder_input_ids=ids, output_hidden_states=True)
    assert len(output.decoder_hidden_states) == model.config.layers + 1
    assert all(stream.shape[1] == 5 for stream in output.decoder_hidden_states)
    assert_same(model.head(output.decoder_hidden_states[-1]), output.logits)
    again = model(
        attention_mask=given["attention_mask"],
        encoder_outputs=(output.encoder_last_hidden_state,),
        decoder_input_ids=ids,
        logits_to_keep=2,
        return_dict=False,
    )
    assert_same(again[0], output.logits[:, -2:])
    embedded = model.get_input_embeddings()(given["input_ids"])
    assert_same(
        model(inputs_embeds=embedded, attention_mask=given["attention_mask"], decoder_input_ids=ids).logits,
        output.logits,
    )


def test_the_papers_terraformer_has_its_size() -> None:
    """terraformer_c4_medium, and the large template of its authors: parameters of the original's arrays."""
    sparse = {"kind": "sparse", "d_ff": 6144, "block_size": 64, "rank": 96}
    medium = {
        "d_model": 1024,
        "layers": 24,
        "heads": 16,
        "max_positions": 32768,
        "feed_forward": sparse,
        "attention": {"projection": "multiplicative_conv", "modules": 16},
        "vocabulary": {"kind": "multiplicative", "size": 32000, "modules": 4},
        "residual": "reversible",
        "attention_layers": 2,
        "sru": {"width": 32},
        "encoder": {"layers": 24, "max_positions": 32768, "read_by": {"kind": "prefix"}},
    }

    def parameters(**fields: object) -> int:
        return count_parameters(ModelSpec.model_validate(medium | fields)).total

    assert round(parameters() / 1e6, 1) == 858.0
    short = {**medium["encoder"], "max_positions": 512}
    assert round(parameters(max_positions=512, encoder=short) / 1e6, 1) == 792.0
