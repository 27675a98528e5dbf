"""The vision Transformer, a Hugging Face model of image classification like any other."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from sparsecli.model.configuration import ScalingTransformerVisionConfig
from sparsecli.model.decoder import ScalingTransformerPreTrainedModel
from sparsecli.model.layers.dropout import shared_dropout
from sparsecli.model.layers.patches import PatchEmbedding, PatchGrid
from sparsecli.model.layers.positions import LearnedPositions
from sparsecli.model.transformer_layers import EncoderLayer, build_norm
from sparsecli.model.versions import check_transformers
from sparsecli.spec.vision import CHANNELS


class VisionPreTrainedModel(PreTrainedModel):
    """What transformers asks of every model. Attention weights are never formed (`output_attentions`)."""

    config_class = ScalingTransformerVisionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["EncoderLayer"]
    _init_weights = ScalingTransformerPreTrainedModel._init_weights

    def __init__(self, config: ScalingTransformerVisionConfig) -> None:
        """Raises Failure: a version of transformers that was never tried."""
        check_transformers(transformers.__version__)
        super().__init__(config)


class ScalingTransformerVisionModel(VisionPreTrainedModel):
    """Patches, positions, layers and the final norm."""

    def __init__(self, config: ScalingTransformerVisionConfig) -> None:
        super().__init__(config)
        spec = config.spec
        self.embedding = PatchEmbedding(CHANNELS, spec.patch_size, spec.d_model, spec.leading > 0)
        self.position_embedding = LearnedPositions(spec.positions, spec.d_model)
        grid = PatchGrid(spec.side, spec.leading)
        self.layers = nn.ModuleList(
            EncoderLayer(spec.stack, layer_idx, grid) for layer_idx in range(spec.layers)
        )
        self.norm = build_norm(spec.stack)
        self.pooling, self.dropout = spec.pooling, spec.dropout
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.projection

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Hidden states (B, T, d) of pixel_values (B, 3, image_size, image_size), and what the classes are read from.

        Args:
            output_hidden_states: also return the stream before each layer and what comes after the norm.
        Raises:
            ValueError: images of another size.
        """
        size = self.config.image_size
        if pixel_values.shape[1:] != (CHANNELS, size, size):
            given = " x ".join(map(str, pixel_values.shape[1:]))
            raise ValueError(
                f"images are {given}, this model reads {CHANNELS} x {size} x {size}; its image processor resizes them"
            )
        x = self.embedding(pixel_values)
        x = x + self.position_embedding(torch.arange(x.shape[1], device=x.device)).to(x.dtype)
        x = shared_dropout(x, self.dropout, self.training, (-2,))
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        streams = []
        for layer in self.layers:
            if asked:
                streams.append(x)
            x = layer(x)
        x = self.norm(x)
        return BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=x[:, 0] if self.pooling == "class_token" else x.mean(dim=1),
            hidden_states=(*streams, x) if asked else None,
        )


class ScalingTransformerForImageClassification(VisionPreTrainedModel):
    """The model with its classes."""

    def __init__(self, config: ScalingTransformerVisionConfig) -> None:
        super().__init__(config)
        self.model = ScalingTransformerVisionModel(config)
        self.head = nn.Linear(config.d_model, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Logits (B, classes) of pixel_values (B, 3, image_size, image_size).

        Args:
            labels: (B,), the classes; with them the mean cross-entropy in nats is returned.
            output_hidden_states: see `ScalingTransformerVisionModel.forward`.
        """
        output = self.model(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.head(output.pooler_output)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
