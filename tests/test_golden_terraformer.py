"""The encoder-decoder models against outputs and gradients of the original implementation, at 1e-5 in float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_golden import (
    assert_same,
    fill,
    fill_convolution,
    fill_linear,
    fill_multiplicative,
    fill_sparse,
    load,
)
from torch import Tensor, nn

from sparsecli.model import (
    ScalingTransformerEncoderDecoderConfig,
    ScalingTransformerForConditionalGeneration,
    TerraformerConfig,
    TerraformerForConditionalGeneration,
)
from sparsecli.model.layers.positions import DigitPositions

SPARSE = {"kind": "sparse", "d_ff": 32, "block_size": 8, "rank": 5}
DENSE = {"kind": "dense", "d_ff": 32}
PARTS = {
    "dense": {
        "feed_forward": DENSE,
        "attention": {"projection": "dense"},
        "vocabulary": {"kind": "dense", "size": 20, "bias": True},
    },
    "sparse": {
        "feed_forward": SPARSE,
        "attention": {"projection": "multiplicative_conv", "modules": 4},
        "vocabulary": {"kind": "multiplicative", "size": 20, "modules": 4},
    },
}
SIZES = {"d_model": 16, "layers": 2, "heads": 2, "positions": "learned"}


class Weights:
    """The weights of a file, taken in the order in which the original stores its layers."""

    def __init__(self, values: Iterator[Tensor]) -> None:
        self.values = values

    def take(self) -> Tensor:
        return next(self.values)

    def norm(self, layer: nn.Module) -> None:
        fill(layer.weight, self.take())
        fill(layer.bias, self.take())

    def linear(self, *layers: nn.Module) -> None:
        for layer in layers:
            fill_linear(layer, self.take(), self.take())

    def attention(self, layer: nn.Module) -> None:
        made = layer.projection
        if hasattr(made, "shared"):
            fill_multiplicative(made.shared, self.take(), self.take(), self.take())
            for part in (made.query, made.key, made.value):
                fill_convolution(part, self.take(), self.take())
        elif made.query.bias is None:
            for part in (made.query, made.key, made.value):
                fill(part.weight, self.take().transpose(1, 2).flatten(0, 1))  # (head, d, d_head)
            fill(layer.output.weight, self.take().flatten(0, 1).T)  # (head, d_head, d)
        else:
            self.linear(made.query, made.key, made.value, layer.output)

    def feed_forward(self, layer: nn.Module) -> None:
        if hasattr(layer, "controller"):
            fill_sparse(layer, {key: self.take() for key in ("C1", "C2", "cb", "W1", "W2", "b2")})
        else:
            self.linear(layer.up, layer.down)

    def units(self, block: nn.Module) -> None:
        self.norm(block.feed_forward_norm)
        self.feed_forward(block.feed_forward)
        if block.sru is not None:
            self.norm(block.sru.norm)
            self.linear(block.sru.enter, block.sru.cells[0].projection, block.sru.leave)

    def positions(self, layer: nn.Module) -> None:
        if isinstance(layer, DigitPositions):
            digits = [self.take() for _ in range(32)]  # base by base, digit by digit
            fill(layer.weight, torch.stack(digits).view(layer.weight.shape))
            fill(layer.start, self.take().flatten())
        else:
            fill(layer.weight, self.take())

    def head(self, layer: nn.Module) -> None:
        if isinstance(layer, nn.Linear):
            self.linear(layer)
        else:
            fill_multiplicative(layer, self.take(), self.take(), self.take())


def tokens(g: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's source, and its target shifted right by one, as the original does within its model."""
    source = g["tok_e"].long()
    target = nn.functional.pad(g["tok_d"].long(), (1, 0))[:, :-1]
    return {"input_ids": source, "attention_mask": (source != 0).long(), "decoder_input_ids": target}


def encoder_decoder(kind: str, g: dict[str, Tensor]) -> ScalingTransformerForConditionalGeneration:
    encoder = {"layers": 2, "max_positions": 32}
    config = ScalingTransformerEncoderDecoderConfig(**SIZES, **PARTS[kind], max_positions=32, encoder=encoder)
    whole = ScalingTransformerForConditionalGeneration(config).eval()
    model, weights = whole.model, Weights(iter([value for key, value in g.items() if key.startswith("w_")]))
    fill(model.embedding.weight, weights.take())
    fill(model.encoder.position_embedding.weight, weights.take())
    for block in model.encoder.layers:
        weights.norm(block.attention_norm)
        weights.attention(block.attention)
        weights.norm(block.feed_forward_norm)
        weights.feed_forward(block.feed_forward)
    weights.norm(model.encoder.norm)
    fill(model.position_embedding.weight, weights.take())
    for block in model.layers:
        weights.norm(block.attention_norm)
        weights.attention(block.attention)
        weights.norm(block.cross_attention_norm)
        weights.attention(block.cross_attention)
        weights.norm(block.feed_forward_norm)
        weights.feed_forward(block.feed_forward)
    weights.norm(model.norm)
    weights.head(whole.head)
    assert next(weights.values, None) is None
    return whole


@pytest.mark.parametrize("kind", PARTS)
def test_encoder_decoder(kind: str) -> None:
    g = load(f"transformer_encdec_{kind}")
    assert_same(encoder_decoder(kind, g)(**tokens(g)).logits, g["logits"])


@pytest.mark.parametrize("kind", PARTS)
@torch.no_grad()
def test_encoder_decoder_decodes_step_by_step(kind: str) -> None:
    g = load(f"transformer_encdec_{kind}")
    model, given = encoder_decoder(kind, g), tokens(g)
    given["encoder_outputs"] = model.model.encode(given.pop("input_ids"), given["attention_mask"])
    past, steps = None, []
    for token in given.pop("decoder_input_ids").split(1, dim=1):
        output = model(**given, decoder_input_ids=token, past_key_values=past, use_cache=True)
        past = output.past_key_values
        steps.append(output.logits)
    assert_same(torch.cat(steps, dim=1), g["logits"])


PER_HEAD = {"projection": "dense", "bias": False}
TERRAFORMERS: dict[str, dict] = {
    "sparse_rev": {},
    "sparse_nonrev_enc": {"encoder": {"read_by": {"kind": "prefix", "streams": 1}}},
    "selfattn_dense": {
        **PARTS["dense"],
        "attention": PER_HEAD,
        "encoder": {"attention": PER_HEAD, "read_by": {"kind": "prefix", "streams": 1}},
        "attention_layers": 1,
        "positions": "digits",
        "sru": None,
    },
    "train_grad_hard": {"feed_forward": {**SPARSE, "hard_fraction": 1.0, "temperature": 0.0}},
}


def fill_terraformer(name: str, values: Iterator[Tensor]) -> TerraformerForConditionalGeneration:
    """A model of the file's shape with `values`, which are in the order of its weights."""
    given = {**SIZES, **PARTS["sparse"], "max_positions": 64, "attention_layers": 2, "sru": {"width": 4}}
    given |= TERRAFORMERS[name]
    encoder = {"layers": 2, "max_positions": 64, "read_by": {"kind": "prefix"}}
    given["encoder"] = encoder | TERRAFORMERS[name].get("encoder", {})
    whole = TerraformerForConditionalGeneration(TerraformerConfig(**given)).eval()
    model, weights = whole.model, Weights(values)
    fill(model.embedding.weight, weights.take())
    for layer in (model.encoder.position_embedding, model.position_embedding):
        weights.positions(layer)
    for block in model.encoder.layers:
        weights.norm(block.attention_norm)
        weights.attention(block.attention)
        weights.units(block)
    if model.encoder.merge is not None:
        weights.linear(model.encoder.merge)
        weights.norm(model.encoder.norm)
    for block in model.layers:
        for attention in ("attention", "second_attention")[: given["attention_layers"]]:
            weights.norm(getattr(block, f"{attention}_norm"))
            weights.attention(getattr(block, attention))
        weights.units(block)
    weights.norm(model.norm)
    weights.head(whole.head)
    assert next(weights.values, None) is None
    return whole


def terraformer(name: str, g: dict[str, Tensor]) -> TerraformerForConditionalGeneration:
    return fill_terraformer(name, iter([value for key, value in g.items() if key.startswith("w_")]))


@pytest.mark.parametrize("name", [name for name in TERRAFORMERS if name != "train_grad_hard"])
@torch.no_grad()
def test_terraformer(name: str) -> None:
    g = load(f"terraformer_{name}")
    assert_same(terraformer(name, g)(**tokens(g)).logits, g["logits"])


@torch.no_grad()
def test_terraformer_joins_what_the_original_joins() -> None:
    """The encoder's two streams, at the rows of the source that are not padding."""
    g = load("terraformer_sparse_rev")
    given = tokens(g)
    made = terraformer("sparse_rev", g).model.encode(given["input_ids"], given["attention_mask"])
    valid = given["attention_mask"].bool()
    for stream, name in zip(made.last_hidden_state.chunk(2, dim=-1), ("stage4_0", "stage4_1"), strict=True):
        assert_same(stream[valid], g[name][valid])


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("name", ["sparse_rev", "sparse_nonrev_enc"])
@torch.no_grad()
def test_terraformer_writes_what_the_original_writes(name: str, row: int) -> None:
    """Greedy decoding, token by token: of one row as the original does it, and of it beside a longer one."""
    g, trace = load(f"terraformer_{name}"), load(f"terraformer_{name}_predict_row{row}")
    model = terraformer(name, g)
    model.generation_config.eos_token_id = None  # the original went on
    steps = trace["generated"].shape[1]
    settings = {"max_new_tokens": steps, "output_logits": True, "return_dict_in_generate": True}
    alone = trace["tok_e"].long()
    for source, at in ((alone, 0), (g["tok_e"].long(), row)):
        written = model.generate(source, attention_mask=(source != 0).long(), **settings)
        assert written.sequences[at, 1:].tolist() == trace["generated"][0].tolist()
        assert_same(torch.stack(written.logits, dim=1)[at], trace["logits_step"][0])


def test_terraformer_gradients() -> None:
    """Loss and every gradient through both reversible stacks, which store no activations."""
    g = load("terraformer_train_grad_hard")
    model, given = terraformer("train_grad_hard", g).train(), tokens(g)
    del given["decoder_input_ids"]
    output = model(**given, labels=g["tok_d"].long())
    assert_same(output.logits, g["logits"])
    assert_same(output.loss, g["loss"])
    output.loss.backward()
    gradients = iter([value for key, value in g.items() if key.startswith("g_")])
    expected = fill_terraformer("train_grad_hard", gradients)
    for (label, parameter), gradient in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient.data, atol=1e-5, rtol=1e-5, msg=label)
