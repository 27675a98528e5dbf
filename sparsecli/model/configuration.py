"""The Hugging Face configurations of our models: a `ModelSpec` or a `VisionSpec` in `config.json`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from sparsecli.model.files import (
    ENCODER_DECODER_TYPE,
    MODEL_TYPE,
    TERRAFORMER_TYPE,
    VISION_TYPE,
    model_type,
)
from sparsecli.model.remote_code import auto_map, write_remote_code
from sparsecli.spec import vision
from sparsecli.spec.model import DEFAULT, ModelSpec
from sparsecli.spec.vision import CHANNELS, VisionSpec
from sparsecli.spec.vocabulary import END, PADDING, START


class _LoadedByTransformers(PreTrainedConfig):
    """A configuration whose folders transformers loads where sparsecli is not imported, with `trust_remote_code`."""

    auto_classes: ClassVar[dict[str, str]]
    """Our classes by the Auto classes of transformers that load them."""

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Write config.json, and the file with our classes."""
        self.auto_map = auto_map(self.auto_classes)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_remote_code(Path(save_directory), self.auto_classes)
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would copy the package's own files into every folder that is saved."""


@strict
class ScalingTransformerConfig(_LoadedByTransformers):
    """Fields and nested blocks of `ModelSpec`, under the same names.

    `origin` says of an imported model where it came from: source, revision, architecture, and its own config.json.

    Raises:
        ValueError: a block does not fit the architecture's closed choices; the message names the field.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "max_position_embeddings": "max_positions",
    }
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "ScalingTransformerConfig",
        "AutoModel": "ScalingTransformerModel",
        "AutoModelForCausalLM": "ScalingTransformerForCausalLM",
    }

    d_model: int = DEFAULT.d_model
    layers: int = DEFAULT.layers
    heads: int = DEFAULT.heads
    head_width: int | None = DEFAULT.head_width
    max_positions: int = DEFAULT.max_positions
    feed_forward: dict | None = None
    attention: dict | None = None
    vocabulary: dict | None = None
    normalization: str = DEFAULT.normalization
    normalization_epsilon: float = DEFAULT.normalization_epsilon
    norm_placement: str = DEFAULT.norm_placement
    positions: str = DEFAULT.positions
    axial: dict | None = None
    rotary_base: float = DEFAULT.rotary_base
    rotary_fraction: float = DEFAULT.rotary_fraction
    rotary_scaling: dict | None = None
    sliding_rotary_base: float | None = DEFAULT.sliding_rotary_base
    rotary_layers: list | None = None
    parallel: bool = DEFAULT.parallel
    shared_norm: bool = DEFAULT.shared_norm
    embedding_scale: float = DEFAULT.embedding_scale
    residual_scale: float = DEFAULT.residual_scale
    logit_scale: float = DEFAULT.logit_scale
    logit_softcap: float | None = DEFAULT.logit_softcap
    residual: str = DEFAULT.residual
    merge: str = DEFAULT.merge
    attention_layers: int = DEFAULT.attention_layers
    sru: dict | None = None
    feed_forward_chunk: int | None = DEFAULT.feed_forward_chunk
    encoder: dict | None = None
    quantization: dict | None = None
    dropout: float = DEFAULT.dropout
    initialization: str = DEFAULT.initialization
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    origin: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for block in ("feed_forward", "attention", "vocabulary", "quantization"):
            if getattr(self, block) is None:
                setattr(self, block, getattr(DEFAULT, block).model_dump())
        self.tie_word_embeddings = bool((self.vocabulary or {}).get("tied", False))
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of transformers' validation."""
        if (asked := model_type(self.spec)) != self.model_type:
            raise ValueError(f"encoder: is that of a {asked}, not of a {self.model_type}")

    @property
    def spec(self) -> ModelSpec:
        """The architecture as typed, checked data."""
        return ModelSpec.from_config({name: getattr(self, name) for name in ModelSpec.model_fields})

    @classmethod
    def from_spec(cls, spec: ModelSpec, **kwargs: Any) -> ScalingTransformerConfig:
        """The configuration of `spec`, of the class that it asks for; `kwargs` are those of any configuration."""
        return CONFIGS[model_type(spec)](**spec.model_dump(), **kwargs)

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, the name transformers looks for."""
        return (self.vocabulary or {})["size"]

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.vocabulary = {**(self.vocabulary or {}), "size": size}

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values, the name transformers looks for."""
        return (self.attention or {}).get("key_value_heads") or self.heads

    @property
    def head_dim(self) -> int:
        """Width of a head, the name transformers looks for."""
        return self.head_width or self.d_model // self.heads

    @property
    def intermediate_size(self) -> int:
        """Units of a feed-forward layer, the name transformers looks for."""
        return (self.feed_forward or {})["d_ff"]


@strict
class ScalingTransformerEncoderDecoderConfig(ScalingTransformerConfig):
    """The same with an encoder, which the decoder reads by cross-attention.

    Tokens by default: 0 is padding and what the decoder starts with, 1 ends a text.
    """

    model_type = ENCODER_DECODER_TYPE
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "ScalingTransformerEncoderDecoderConfig",
        "AutoModel": "ScalingTransformerEncoderDecoderModel",
        "AutoModelForSeq2SeqLM": "ScalingTransformerForConditionalGeneration",
    }

    is_encoder_decoder: bool = True
    pad_token_id: int | None = PADDING
    eos_token_id: int | list[int] | None = END
    decoder_start_token_id: int | None = START

    default_reading: ClassVar[dict[str, Any]] = {"kind": "cross_attention"}

    def __post_init__(self, **kwargs: Any) -> None:
        if self.encoder is None:
            self.encoder = {
                "layers": self.layers,
                "max_positions": self.max_positions,
                "read_by": self.default_reading,
            }
        super().__post_init__(**kwargs)


@strict
class TerraformerConfig(ScalingTransformerEncoderDecoderConfig):
    """Reversible layers, and an encoder's output as a prefix of the target (Terraformer)."""

    model_type = TERRAFORMER_TYPE
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "TerraformerConfig",
        "AutoModel": "TerraformerModel",
        "AutoModelForSeq2SeqLM": "TerraformerForConditionalGeneration",
    }

    residual: str = "reversible"
    attention_layers: int = 2

    default_reading: ClassVar[dict[str, Any]] = {"kind": "prefix"}


CONFIGS: dict[str, type[ScalingTransformerConfig]] = {
    config.model_type: config
    for config in (ScalingTransformerConfig, ScalingTransformerEncoderDecoderConfig, TerraformerConfig)
}


@strict
class ScalingTransformerVisionConfig(_LoadedByTransformers):
    """Fields and nested blocks of `VisionSpec`, under the same names; its classes are those of `id2label`.

    Raises:
        ValueError: a block does not fit the architecture's closed choices; the message names the field.
    """

    model_type = VISION_TYPE
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
    }

    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "ScalingTransformerVisionConfig",
        "AutoModel": "ScalingTransformerVisionModel",
        "AutoModelForImageClassification": "ScalingTransformerForImageClassification",
    }

    image_size: int = vision.DEFAULT.image_size
    patch_size: int = vision.DEFAULT.patch_size
    pooling: str = vision.DEFAULT.pooling
    d_model: int = vision.DEFAULT.d_model
    layers: int = vision.DEFAULT.layers
    heads: int = vision.DEFAULT.heads
    feed_forward: dict | None = None
    attention: dict | None = None
    normalization: str = vision.DEFAULT.normalization
    normalization_epsilon: float = vision.DEFAULT.normalization_epsilon
    dropout: float = vision.DEFAULT.dropout
    initialization: str = vision.DEFAULT.initialization

    def __post_init__(self, **kwargs: Any) -> None:
        for block in ("feed_forward", "attention"):
            if getattr(self, block) is None:
                setattr(self, block, getattr(vision.DEFAULT, block).model_dump())
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of transformers' validation."""
        _ = self.spec

    @property
    def spec(self) -> VisionSpec:
        """The architecture as typed, checked data."""
        names = VisionSpec.model_fields.keys() - {"kind", "classes"}
        return VisionSpec.from_config(
            {name: getattr(self, name) for name in names} | {"id2label": self.id2label}
        )

    @classmethod
    def from_spec(
        cls, spec: VisionSpec, labels: Sequence[str] | None = None
    ) -> ScalingTransformerVisionConfig:
        """The configuration of `spec`; its classes are called `labels`, by default LABEL_0, LABEL_1 and so on."""
        names = labels or [f"LABEL_{index}" for index in range(spec.classes)]
        return cls(
            **spec.model_dump(exclude={"kind", "classes"}),
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )

    @property
    def num_channels(self) -> int:
        """Colours of a pixel, the name transformers looks for."""
        return CHANNELS

    @property
    def intermediate_size(self) -> int:
        """Units of a feed-forward layer, the name transformers looks for."""
        return (self.feed_forward or {})["d_ff"]
