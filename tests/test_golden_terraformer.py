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

from sparsecli.model import ScalingTransformerEncoderDecoderConfig, ScalingTransformerForConditionalGeneration

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
        else:
            self.linear(made.query, made.key, made.value, layer.output)

    def feed_forward(self, layer: nn.Module) -> None:
        if hasattr(layer, "controller"):
            fill_sparse(layer, {key: self.take() for key in ("C1", "C2", "cb", "W1", "W2", "b2")})
        else:
            self.linear(layer.up, layer.down)

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
    for block in model.encoder.blocks:
        weights.norm(block.attention_norm)
        weights.attention(block.attention)
        weights.norm(block.feed_forward_norm)
        weights.feed_forward(block.feed_forward)
    weights.norm(model.encoder.norm)
    fill(model.position_embedding.weight, weights.take())
    for block in model.blocks:
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
