"""The three models in one place: their classes, what transformers knows of them, and which one a spec asks for."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from sparsecli.model.cache import DecodeCache as DecodeCache
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM, ScalingTransformerModel
from sparsecli.model.configuration import (
    ScalingTransformerConfig,
    ScalingTransformerEncoderDecoderConfig,
    TerraformerConfig,
)
from sparsecli.model.encoder_decoder import (
    ConditionalGeneration,
    ScalingTransformerEncoderDecoderModel,
    ScalingTransformerForConditionalGeneration,
)
from sparsecli.model.terraformer import TerraformerForConditionalGeneration, TerraformerModel
from sparsecli.spec.model import ModelSpec

Network = ScalingTransformerForCausalLM | ConditionalGeneration
NETWORKS: dict[str, type[Network]] = {
    network.config_class.model_type: network
    for network in (
        ScalingTransformerForCausalLM,
        ScalingTransformerForConditionalGeneration,
        TerraformerForConditionalGeneration,
    )
}

AutoConfig.register("scaling_transformer", ScalingTransformerConfig)
AutoModel.register(ScalingTransformerConfig, ScalingTransformerModel)
AutoModelForCausalLM.register(ScalingTransformerConfig, ScalingTransformerForCausalLM)

AutoConfig.register("scaling_transformer_encoder_decoder", ScalingTransformerEncoderDecoderConfig)
AutoModel.register(ScalingTransformerEncoderDecoderConfig, ScalingTransformerEncoderDecoderModel)
AutoModelForSeq2SeqLM.register(
    ScalingTransformerEncoderDecoderConfig, ScalingTransformerForConditionalGeneration
)

AutoConfig.register("terraformer", TerraformerConfig)
AutoModel.register(TerraformerConfig, TerraformerModel)
AutoModelForSeq2SeqLM.register(TerraformerConfig, TerraformerForConditionalGeneration)

# The Trainer, pipelines and lm_eval look a model's kind up by its name: the Trainer smooths labels shifted or not.
for _type, _network in NETWORKS.items():
    _names = (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        if issubclass(_network, ConditionalGeneration)
        else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    _names[_type] = _network.__name__


def build_network(spec: ModelSpec, **tokens: Any) -> Network:
    """The model of `spec` with fresh weights; `tokens` are further fields of its configuration."""
    config = ScalingTransformerConfig.from_spec(spec, **tokens)
    return NETWORKS[config.model_type](config)
