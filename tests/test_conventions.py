"""What tools and users of transformers expect of a model of any class: outputs, configuration, checkpointing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_trainers import CLASSES, SIZES, VOCABULARY
from torch import Tensor
from transformers import PreTrainedModel

from sparsecli.model import (
    ScalingTransformerConfig,
    ScalingTransformerForCausalLM,
    ScalingTransformerForConditionalGeneration,
    TerraformerForConditionalGeneration,
)
from sparsecli.model.cache import CACHE

KINDS = pytest.mark.parametrize("kind", CLASSES)
LAYERS = SIZES["layers"]


def build(kind: type[PreTrainedModel], **fields: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(CLASSES[kind](**SIZES | fields)).eval()


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    ids = torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids[:, :5] if model.config.is_encoder_decoder else ids}


@KINDS
def test_the_configuration_decides_what_is_returned(kind: type[PreTrainedModel]) -> None:
    model = build(kind, output_hidden_states=True)
    names = ["hidden_states"]
    if model.config.is_encoder_decoder:
        names = ["encoder_hidden_states", "decoder_hidden_states"]
    output = model(**inputs(model))
    lengths = {"hidden_states": 9, "encoder_hidden_states": 9, "decoder_hidden_states": 5}
    for name in names:
        assert len(output[name]) == LAYERS + 1
        assert all(held.shape[:2] == (2, lengths[name]) for held in output[name])
        assert output[name][0].shape[2] == model.config.hidden_size
        assert name not in model(**inputs(model), output_hidden_states=False)
    torch.testing.assert_close(model.head(output[names[-1]][-1]), output.logits)
    if model.config.is_encoder_decoder:
        assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)
    assert output[CACHE].get_seq_length() == lengths[names[-1]]
    assert CACHE not in model(**inputs(model), use_cache=False)
    model.config.use_cache = False
    assert CACHE not in model(**inputs(model))
    model.config.use_cache = True
    assert CACHE not in model.train()(**inputs(model))


@KINDS
def test_generate_returns_hidden_states(kind: type[PreTrainedModel]) -> None:
    model = build(kind)
    output = model.generate(
        inputs(model)["input_ids"],
        max_new_tokens=3,
        min_new_tokens=3,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    name = "decoder_hidden_states" if model.config.is_encoder_decoder else "hidden_states"
    assert [len(step) for step in output[name]] == [LAYERS + 1] * 3
    assert output[name][-1][0].shape == (2, 1, model.config.hidden_size)
    if model.config.is_encoder_decoder:
        assert len(output.encoder_hidden_states) == LAYERS + 1


@KINDS
def test_hidden_states_keep_gradients(kind: type[PreTrainedModel]) -> None:
    """All of them, but between reversible blocks the first and the last alone."""
    model = build(kind, output_hidden_states=True)
    output = model(**inputs(model))
    states = output.get("hidden_states") or output.decoder_hidden_states
    if kind is TerraformerForConditionalGeneration:
        states = [states[0], states[-1], output.encoder_hidden_states[0]]
    elif model.config.is_encoder_decoder:
        states = [*states, *output.encoder_hidden_states]
    for state in states:
        state.retain_grad()
    output.loss.backward()
    assert all(state.grad is not None and state.grad.abs().sum() > 0 for state in states)


def test_the_configuration_knows_its_heads() -> None:
    grouped = {"projection": "dense", "key_value_heads": 2}
    config = ScalingTransformerConfig(d_model=32, heads=4, head_width=6, attention=grouped)
    assert (config.num_key_value_heads, config.head_dim) == (2, 6)
    config = ScalingTransformerConfig(d_model=32, heads=4)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [ScalingTransformerForCausalLM, ScalingTransformerForConditionalGeneration])
def test_checkpoints_of_both_kinds_change_no_gradient(kind: type[PreTrainedModel], reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = build(kind, dropout=0.1).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        model(**inputs(model), use_cache=True).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-5, rtol=1e-5)


def test_blocks_that_are_computed_again_extend_no_cache() -> None:
    model = build(ScalingTransformerForCausalLM)
    cache = model(**inputs(model))[CACHE]
    model.train().activation_checkpointing_enable()
    with pytest.raises(ValueError, match="computes again"):
        model(**inputs(model), past_key_values=cache)


@KINDS
def test_a_model_with_nothing_to_checkpoint_says_so(kind: type[PreTrainedModel]) -> None:
    model = build(kind)
    assert kind.supports_gradient_checkpointing == model.supports_gradient_checkpointing
    assert model.supports_gradient_checkpointing == (kind is not TerraformerForConditionalGeneration)


@pytest.mark.parametrize(
    ("kind", "residual"),
    [
        (ScalingTransformerForCausalLM, "single"),
        (ScalingTransformerForCausalLM, "reversible"),
        (ScalingTransformerForConditionalGeneration, "single"),
        (TerraformerForConditionalGeneration, "reversible"),
    ],
)
def test_blocks_that_stay_whole_can_be_wrapped(kind: type[PreTrainedModel], residual: str) -> None:
    """FSDP gathers a block's weights when its forward is called."""
    model = build(kind, residual=residual)
    called = dict.fromkeys(model._no_split_modules, 0)

    def count(name: str, *_: object) -> None:
        called[name] += 1

    for module in model.modules():
        if type(module).__name__ in called:
            module.register_forward_hook(partial(count, type(module).__name__))
    model(**inputs(model))
    assert all(count == LAYERS for count in called.values())
    assert bool(called) == (residual == "single")
