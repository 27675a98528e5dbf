"""Adapters of peft on our layers: they train, and a merged model computes what the adapted one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM
from sparsecli.model.loading import load_network

peft = pytest.importorskip("peft")

DENSE = {"kind": "dense", "d_ff": 64, "gated": True, "activation": "silu"}
SPARSE = {"kind": "sparse", "d_ff": 64, "block_size": 8, "units_per_block": 2, "rank": 6}
ATTENTION = ["projection.query", "projection.key", "projection.value", "attention.output"]
IDS = torch.arange(2, 20)[None]


def build(feed_forward: dict[str, Any], tied: bool = False, **fields: Any) -> ScalingTransformerForCausalLM:
    torch.manual_seed(0)
    vocabulary = {"kind": "dense", "size": 64, "tied": tied}
    sizes = {"d_model": 32, "layers": 2, "heads": 4, "max_positions": 40}
    config = ScalingTransformerConfig(**sizes, feed_forward=feed_forward, vocabulary=vocabulary, **fields)
    return ScalingTransformerForCausalLM(config).eval()


def adapted(model: ScalingTransformerForCausalLM, **targets: Any) -> Any:
    """The model with adapters that change something."""
    result = peft.get_peft_model(model, peft.LoraConfig(r=4, **targets)).eval()
    for name, parameter in result.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    return result


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("fields", "targets"),
    [
        pytest.param({"feed_forward": DENSE}, {"target_modules": ATTENTION}, id="attention"),
        pytest.param(
            {"feed_forward": DENSE},
            {"target_modules": ["feed_forward.up", "feed_forward.down", "feed_forward.gate"]},
            id="dense feed-forward",
        ),
        pytest.param({"feed_forward": SPARSE}, {"target_modules": "all-linear"}, id="all-linear"),
        pytest.param(
            {"feed_forward": SPARSE},
            {"target_modules": ATTENTION, "target_parameters": ["feed_forward.up", "feed_forward.down"]},
            id="sparse units",
        ),
        pytest.param(
            {"feed_forward": SPARSE, "attention": {"projection": "multiplicative_conv"}},
            {"target_modules": [], "target_parameters": ["D", "E"]},
            id="multiplicative",
        ),
        pytest.param(
            {"feed_forward": DENSE}, {"target_modules": ["embedding", "head"]}, id="untied vocabulary"
        ),
    ],
)
def test_a_merged_adapter_computes_the_same(
    fields: dict[str, Any], targets: dict[str, Any], tmp_path: Path
) -> None:
    plain = logits(build(**fields))
    model = adapted(build(**fields), **targets)
    before = logits(model)
    assert (before - plain).abs().max() > 0.01
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    merged = model.eval().merge_and_unload()
    torch.testing.assert_close(logits(merged), before, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_network(tmp_path)), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", [["embedding"], ["head"], ["embedding", "head"]])
def test_an_adapter_of_tied_weights_is_refused_until_they_are_untied(
    targets: list[str], tmp_path: Path
) -> None:
    model = build(DENSE, tied=True)
    plain = logits(model)
    with pytest.raises(ValueError, match=r"since they are tied; call untie\(\) on the model before"):
        logits(adapted(model, target_modules=targets))
    with pytest.raises(ValueError, match="since they are tied"):
        logits(
            peft.get_peft_model(
                build(DENSE, tied=True), peft.LoraConfig(target_modules=ATTENTION, modules_to_save=["head"])
            )
        )
    model = build(DENSE, tied=True)
    model.untie()
    assert torch.equal(logits(model), plain)
    model = adapted(model, target_modules=targets)
    before = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path)
    again = load_network(tmp_path)
    assert not again.config.spec.tied
    torch.testing.assert_close(logits(again), before, atol=1e-5, rtol=1e-5)
