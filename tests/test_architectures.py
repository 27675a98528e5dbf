"""Every architecture that a recipe may ask for can be built, run, trained, saved, loaded and packed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_models import INSTRUCTION_SETS, random_weights, weights_of

from sparsecli.bench.variants import part, with_positions
from sparsecli.console import Failure, RecipeError
from sparsecli.decode.engine import Engine
from sparsecli.decode.packed.pack import pack
from sparsecli.decode.packed.precision import Precision
from sparsecli.model import ScalingTransformerConfig
from sparsecli.model.auto import Network, build_network
from sparsecli.model.loading import load_network, read_config
from sparsecli.model.tensors import tensor_shapes
from sparsecli.recipe import loader
from sparsecli.spec.model import ModelSpec

SMALL: dict[str, Any] = {
    "d_model": 24,
    "layers": 2,
    "heads": 4,
    "max_positions": 16,
    "feed_forward": {"kind": "dense", "d_ff": 16},
    "vocabulary": {"kind": "dense", "size": 20},
}
LONGROPE = {
    "kind": "longrope",
    "original_positions": 8,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.0, 2.0, 3.0],
}
CHOOSING = {"kind": "sparse", "d_ff": 16, "block_size": 4, "rank": 3}


def load(model: dict[str, Any]) -> ModelSpec:
    spec = loader.parse(yaml.dump({"model": model}, sort_keys=False), "r.yaml").model
    assert spec
    return spec


# -- parts that do not fit ---------------------------------------------------------------------------------------


def encoder(**fields: Any) -> dict[str, Any]:
    return {"encoder": {"layers": 3, "max_positions": 16, **fields}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            encoder(attention={"projection": "multiplicative", "modules": 5}),
            "model.d_model: 24 is not a multiple of encoder.attention.modules 5; nearest: 20 and 25",
        ),
        (
            encoder(attention={"key_value_heads": 3}),
            "model.heads: 4 is not a multiple of encoder.attention.key_value_heads 3; nearest: 3 and 6",
        ),
        (
            encoder(read_by={"kind": "cross_attention", "query_modules": 7}),
            "model.d_model: 24 is not a multiple of encoder.read_by.query_modules 7; nearest: 21 and 28",
        ),
        (
            {"head_width": 5, **encoder(read_by={"kind": "cross_attention", "query_modules": 4})},
            "model.head_width: heads that are not d_model wide together exclude encoder.read_by.query_modules",
        ),
        (
            {"head_width": 5, **encoder(attention={"projection": "multiplicative"})},
            "model.head_width: heads that are not d_model wide together need dense projections in encoder.attention",
        ),
        (
            {"head_width": 5, "attention": {"output_projection": "none"}},
            "model.head_width: heads that are not d_model wide together need dense projections in attention",
        ),
        (
            {"shared_norm": True},
            "model.shared_norm: needs parallel: true, and no encoder",
        ),
        (
            {"feed_forward": {"kind": "mixture", "d_ff": 16, "experts": 4, "normalize_probabilities": True}},
            "model.feed_forward.normalize_probabilities: needs a gate, which multiplies by them",
        ),
        (
            {"positions": "rotary", "rotary_scaling": {**LONGROPE, "long_factor": [1.0]}},
            "model.rotary_scaling.long_factor: 1 numbers for 3 pairs of a head",
        ),
        (
            {"positions": "rotary", "rotary_scaling": LONGROPE, "attention": {"kind": "lsh"}},
            "model.rotary_scaling.kind: longrope computes a long text anew, "
            "which excludes attention.kind: lsh and an encoder",
        ),
        (
            {
                "positions": "rotary",
                "rotary_scaling": {
                    **{"kind": "yarn", "factor": 4.0, "original_positions": 16},
                    **{"beta_fast": 1.0, "beta_slow": 2.0},
                },
            },
            "model.rotary_scaling.beta_slow: 2.0 is not below beta_fast 1.0",
        ),
        (
            encoder(feed_forward={**CHOOSING, "units_per_block": [1, 2]}),
            "model.encoder.feed_forward.units_per_block: 2 numbers for 3 layers",
        ),
        (
            {"feed_forward": {**CHOOSING, "units_per_block": [1, 2]}, **encoder()},
            "model.encoder.feed_forward: missing; the decoder's has numbers for 2 layers, the encoder has 3",
        ),
        (
            {"attention": {"window": 4, "sliding_layers": [True]}},
            "model.attention.sliding_layers: 1 values for 2 layers",
        ),
        ({"attention": {"sliding_layers": [True, True]}}, "model.attention.sliding_layers: needs a window"),
        ({"attention": {"window": 4, "kind": "lsh"}}, "model.attention.window: needs kind: full"),
        (
            {"attention": {"logit_softcap": 4.0, "share_query_key": True}},
            "model.attention.logit_softcap: goes with plain projections of queries and keys",
        ),
        (
            {"attention": {"scale": 0.5, "projection": "multiplicative_conv"}},
            "model.attention.scale: needs dense projections",
        ),
        (
            {"attention": {"query_key_norm_over": "projection"}},
            "model.attention.query_key_norm_over: needs query_key_norm: true",
        ),
        (encoder(attention={"window": 4}), "model.encoder.attention.window: is for decoders"),
        (
            {"attention": {"window": 4}, **encoder()},
            "model.attention.window: is for models without an encoder",
        ),
        (
            {"attention": {"window": 4}, "residual": "reversible"},
            "model.attention.window: needs residual: single",
        ),
        (
            {"norm_placement": "after", "residual": "reversible"},
            "model.norm_placement: needs residual: single",
        ),
        ({"residual_scale": 0.5, **encoder()}, "model.residual_scale: is for models without an encoder"),
        (
            {"norm_placement": "around", "parallel": True},
            "model.norm_placement: needs attention and feed-forward layers in sequence, not parallel",
        ),
        (
            {"residual_scale": 0.5, "sru": {"width": 3}},
            "model.residual_scale: goes with feed-forward layers that have no recurrent branch (sru)",
        ),
        ({"rotary_layers": [True, False]}, "model.rotary_layers: needs positions: rotary"),
        (
            {"rotary_layers": [True], "positions": "rotary"},
            "model.rotary_layers: 1 values for 2 layers",
        ),
        (
            {"sliding_rotary_base": 1e4, "positions": "rotary"},
            "model.sliding_rotary_base: needs attention.window",
        ),
    ],
)
def test_parts_that_do_not_fit_are_told_at_their_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load({**SMALL, **fields})
    assert caught.value.message.partition(": ")[2] == message
    with pytest.raises(Exception, match=message.partition(": ")[2].partition(" ")[0]):  # of transformers
        ScalingTransformerConfig(**{**SMALL, **fields})


def test_a_configuration_that_says_two_things(tmp_path: Path) -> None:
    ScalingTransformerConfig(**SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 32}))
    with pytest.raises(Failure, match=r"config\.json: d_model: another field"):
        read_config(tmp_path)


def test_defaults_are_those_of_recipes() -> None:
    assert load(SMALL) == ScalingTransformerConfig(**SMALL).spec
    required = {name for name, field in ModelSpec.model_fields.items() if field.is_required()}
    config = ScalingTransformerConfig().spec
    assert ModelSpec(**{name: getattr(config, name) for name in required}) == config


def test_a_bench_of_fewer_layers_keeps_what_each_layer_has() -> None:
    attention = {"window": 4, "sliding_layers": [False, True]}
    spec = load({**SMALL, "positions": "rotary", "rotary_layers": [True, False], "attention": attention})
    shorter = part(spec, 1)
    assert load(shorter.model_dump(exclude_none=True)) == shorter
    assert (shorter.window(0), shorter.rotary_table(0)) == (None, "full")


def test_a_bench_gives_every_kind_of_positions_more_room() -> None:
    axial = {"positions": "axial", "axial": {"shape": [4, 4], "widths": [10, 14]}}
    for fields in ({}, axial, {"positions": "digits"}, {"positions": "rotary"}):
        grown = with_positions(load({**SMALL, **fields}), 50)
        assert load(grown.model_dump(exclude_none=True)) == grown
        pack(grown, random_weights(grown), Precision.of("float32"))
    assert with_positions(load({**SMALL, **axial}), 50).axial.shape == [13, 4]


# -- parts that do ----------------------------------------------------------------------------------------------


class Drawn(random.Random):
    """Draws the fields of an architecture."""

    def fields(self, share: float, **choices: list[Any]) -> dict[str, Any]:
        """Some of the fields, each with one of its values."""
        return {name: self.choice(values) for name, values in choices.items() if self.random() < share}

    def feed_forward(self, layers: int) -> dict[str, Any]:
        kind = self.choice(["dense", "sparse", "selector", "precision", "mixture"])
        made = {"kind": kind, "d_ff": self.choice([16, 24, 48])}
        made |= self.fields(0.4, activation=["relu", "gelu", "gelu_tanh", "silu"])
        if kind == "dense":
            return made | self.fields(0.4, gated=[True], bias=[False])
        if kind == "mixture":
            return (
                made
                | {"experts": 4}
                | self.fields(
                    *(0.5,),
                    experts_per_token=[2, 3],
                    gate=["probability", "output_probability"],
                    normalize_probabilities=[True],
                    gated=[True],
                    bias=[False],
                    load_balancing=[0],
                )
            )
        made |= {
            "block_size": self.choice([4, 8]),
            **({"rank": self.choice([1, 5])} if kind == "sparse" else {}),
        }
        made |= self.fields(0.4, gated=[True], unit_bias=[True], units_per_block=[1, 2, [3] * layers])
        return made | (
            self.fields(0.4, bits=[3, 4]) if kind != "sparse" else self.fields(0.4, gate=["probability"])
        )

    def attention(self) -> dict[str, Any]:
        kinds = ["none", "dense", "multiplicative", "multiplicative_conv"]
        return self.fields(
            0.2,
            projection=["multiplicative", "dense_conv", "multiplicative_conv"],
            output_projection=kinds,
            modules=[2, 3, 8],
            kernel=[1, 4],
            value_concat=["modules", "whole"],
            key_value_heads=[1, 2],
            bias=[False],
            output_bias=[True, False],
            query_key_norm=[True, "width"],
            query_key_rank=[1, 7],
            share_query_key=[True],
            kind=["lsh"],
        )

    def model(self) -> dict[str, Any]:
        layers = self.choice([1, 2])
        reversible = self.random() < 0.4
        made = {**SMALL, "layers": layers, "feed_forward": self.feed_forward(layers)}
        made |= {"attention": self.attention()}
        made |= self.fields(
            0.2,
            heads=[1, 2, 6],
            head_width=[2, 8],
            vocabulary=[
                {"kind": "multiplicative", "size": 20, "modules": 4},
                {"kind": "dense", "size": 20, "tied": True, "bias": True},
            ],
            normalization=["rms"],
            rotary_fraction=[0.5],
            parallel=[True],
            shared_norm=[True],
            embedding_scale=[1.5],
            sru=[{"layers": 2, "width": 3}],
            feed_forward_chunk=[3],
            quantization=[{"projection": 3}, {"head": 4}],
            dropout=[0.1],
            initialization=["paper"],
        )
        made |= self.fields(0.7, positions=["sinusoidal", "rotary", "digits", "axial"])
        made |= self.fields(0.2, logit_scale=[0.5], logit_softcap=[2.0])
        if not reversible:
            made |= self.fields(0.1, norm_placement=["around", "after"], residual_scale=[0.5])
            made["attention"] |= self.fields(0.1, window=[1, 3], scale=[0.2], logit_softcap=[2.0])
        made |= {"axial": {"shape": [4, 4], "widths": [10, 14]}} if made.get("positions") == "axial" else {}
        if reversible:
            made |= {
                "residual": "reversible",
                **self.fields(0.4, merge=["concatenate"], attention_layers=[2]),
            }
        if self.random() < 0.5:
            read_by = {"kind": "prefix", **self.fields(0.5, streams=[1])}
            if not reversible:
                read_by = {"kind": "cross_attention", **self.fields(0.5, query_modules=[3, 4])}
            layers = self.choice([1, 3])
            parts = {"attention": self.attention()} | ({"feed_forward": self.feed_forward(layers)})
            made |= encoder(layers=layers, read_by=read_by, **parts)
        return made


def logits(network: Network, ids: torch.Tensor) -> torch.Tensor:
    source = {"input_ids": ids + 2, "decoder_input_ids": ids}
    return network(**(source if network.config.spec.encoder else {"input_ids": ids})).logits


def step(network: Network, ids: torch.Tensor, precision: str) -> np.ndarray:
    """Logits of the native engine after the first of ids (1, T)."""
    spec = network.config.spec
    engine = Engine(pack(spec, weights_of(network), Precision.of(precision)), 1, poison=True)
    sequence = engine.sequence(1, ids.shape[1] if spec.encoder else 0)
    if spec.encoder:
        rows = network.model.encode(ids + 2).last_hidden_state[0]
        engine.read_source(sequence, torch.stack(rows.split(spec.d_model, dim=-1)).numpy())
    return engine.step(sequence, int(ids[0, 0]))


def run(spec: ModelSpec, folder: Path) -> None:
    torch.manual_seed(0)
    network = build_network(spec)
    assert tensor_shapes(spec) == {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    ids = torch.randint(2, spec.vocabulary.size - 2, (1, 7))
    inputs = {"input_ids": ids, "labels": ids}
    network.train()
    loss = network(**inputs).loss
    loss.backward()
    assert torch.isfinite(loss)
    network.eval()
    with torch.no_grad():
        expected = logits(network, ids)
        assert torch.isfinite(expected).all()
        network.save_pretrained(folder)
        assert torch.equal(logits(load_network(folder), ids), expected)
        for precision in ("float32", "int8", "int4") if INSTRUCTION_SETS else ():
            assert np.isfinite(step(network, ids, precision)).all()


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_what_the_loader_takes_can_be_used(first: int, tmp_path: Path) -> None:
    taken = 0
    for seed in range(first, first + 100):
        model = Drawn(seed).model()
        try:
            spec = load(model)
        except RecipeError:
            continue
        taken += 1
        try:
            run(spec, tmp_path / str(seed))
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}: {json.dumps(model)}") from error
    assert taken >= 3
