"""The Hugging Face configuration of a Scaling Transformer: a `ModelSpec` in `config.json`."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from sparsecli.model.architecture import DEFAULT, ModelSpec
from sparsecli.model.folder import MODEL_TYPE


@strict
class ScalingTransformerConfig(PreTrainedConfig):
    """Fields and nested blocks of `ModelSpec`, under the same names.

    `origin` says of an imported model where it came from: source, revision, architecture, and its own config.json.

    Raises:
        ValueError: a block does not fit the architecture's closed choices; the message names the field.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "max_position_embeddings": "max_positions",
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
    positions: str = DEFAULT.positions
    axial: dict | None = None
    rotary_base: float = DEFAULT.rotary_base
    rotary_fraction: float = DEFAULT.rotary_fraction
    rotary_scaling: dict | None = None
    parallel: bool = DEFAULT.parallel
    embedding_scale: float = DEFAULT.embedding_scale
    residual: str = DEFAULT.residual
    merge: str = DEFAULT.merge
    attention_layers: int = DEFAULT.attention_layers
    sru: dict | None = None
    feed_forward_chunk: int | None = DEFAULT.feed_forward_chunk
    encoder: dict | None = None
    low_bit: dict | None = None
    dropout: float = DEFAULT.dropout
    initialization: str = DEFAULT.initialization
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    origin: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for block in ("feed_forward", "attention", "vocabulary", "low_bit"):
            if getattr(self, block) is None:
                setattr(self, block, getattr(DEFAULT, block).model_dump())
        self.tie_word_embeddings = bool((self.vocabulary or {}).get("tied", False))
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of transformers' validation."""
        _ = self.spec

    @property
    def spec(self) -> ModelSpec:
        """The architecture as typed, checked data."""
        return ModelSpec.from_config({name: getattr(self, name) for name in ModelSpec.model_fields})

    @classmethod
    def from_spec(cls, spec: ModelSpec, **kwargs: Any) -> ScalingTransformerConfig:
        """The configuration of `spec`; keyword arguments are those of any transformers configuration."""
        return cls(**spec.model_dump(), **kwargs)

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, the name transformers looks for."""
        return (self.vocabulary or {})["size"]

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.vocabulary = {**(self.vocabulary or {}), "size": size}

    @property
    def intermediate_size(self) -> int:
        """Units of a feed-forward layer, the name transformers looks for."""
        return (self.feed_forward or {})["d_ff"]


AutoConfig.register(ScalingTransformerConfig.model_type, ScalingTransformerConfig, exist_ok=True)
