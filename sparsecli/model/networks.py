"""The network that a spec asks for: which of the models it is."""

from __future__ import annotations

from typing import Any

from sparsecli.model.architecture import ModelSpec
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.encoder_decoder import ConditionalGeneration, ScalingTransformerForConditionalGeneration
from sparsecli.model.terraformer import TerraformerForConditionalGeneration

Network = ScalingTransformerForCausalLM | ConditionalGeneration
NETWORKS: dict[str, type[Network]] = {
    network.config_class.model_type: network
    for network in (
        ScalingTransformerForCausalLM,
        ScalingTransformerForConditionalGeneration,
        TerraformerForConditionalGeneration,
    )
}


def build_network(spec: ModelSpec, **tokens: Any) -> Network:
    """The model of `spec` with fresh weights; `tokens` are further fields of its configuration."""
    config = ScalingTransformerConfig.from_spec(spec, **tokens)
    return NETWORKS[config.model_type](config)
