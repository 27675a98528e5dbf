"""Our models in one place: their classes, what transformers knows of them, and which one a spec asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from sparsecli.model.cache import DecodeCache as DecodeCache
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM, ScalingTransformerModel
from sparsecli.model.configuration import (
    ScalingTransformerConfig,
    ScalingTransformerEncoderDecoderConfig,
    ScalingTransformerVisionConfig,
    TerraformerConfig,
)
from sparsecli.model.encoder_decoder import (
    ConditionalGeneration,
    ScalingTransformerEncoderDecoderModel,
    ScalingTransformerForConditionalGeneration,
)
from sparsecli.model.terraformer import TerraformerForConditionalGeneration, TerraformerModel
from sparsecli.model.vision import ScalingTransformerForImageClassification, ScalingTransformerVisionModel
from sparsecli.spec.model import ModelSpec
from sparsecli.spec.vision import AnySpec, VisionSpec

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

AutoConfig.register("scaling_transformer_vision", ScalingTransformerVisionConfig)
AutoModel.register(ScalingTransformerVisionConfig, ScalingTransformerVisionModel)
AutoModelForImageClassification.register(
    ScalingTransformerVisionConfig, ScalingTransformerForImageClassification
)

# The Trainer, pipelines and lm_eval look a model's kind up by its name: the Trainer smooths labels shifted or not.
for _type, _network in NETWORKS.items():
    _names = (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        if issubclass(_network, ConditionalGeneration)
        else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    _names[_type] = _network.__name__
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["scaling_transformer_vision"] = (
    ScalingTransformerForImageClassification.__name__
)


def build_network(spec: ModelSpec, **tokens: Any) -> Network:
    """The model of `spec` with fresh weights; `tokens` are further fields of its configuration."""
    config = ScalingTransformerConfig.from_spec(spec, **tokens)
    return NETWORKS[config.model_type](config)


def build_classifier(
    spec: VisionSpec, labels: Sequence[str] | None = None
) -> ScalingTransformerForImageClassification:
    """The model of images of `spec` with fresh weights; `labels` are the names of its classes."""
    return ScalingTransformerForImageClassification(ScalingTransformerVisionConfig.from_spec(spec, labels))


def build(spec: AnySpec) -> Network | ScalingTransformerForImageClassification:
    """The model of `spec`, of text or of images, with fresh weights."""
    return build_classifier(spec) if isinstance(spec, VisionSpec) else build_network(spec)
