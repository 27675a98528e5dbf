"""A model of images as data: `VisionSpec`, a vision Transformer whose layers are those of the models of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from sparsecli.spec.attention import AttentionSpec
from sparsecli.spec.base import Depth, Size, Spec, Width, check_multiple, fault
from sparsecli.spec.feed_forward import FeedForwardSpec
from sparsecli.spec.model import ModelSpec
from sparsecli.spec.vocabulary import DenseVocabularySpec

CHANNELS = 3
"""Colours of a pixel. Grey images have the same value in all of them, as hub pipelines hand them over."""
FEED_FORWARDS = ("dense", "sparse", "mixture")


class VisionSpec(Spec):
    """A vision Transformer: square patches of an image as a sequence, pre-norm layers that look both ways, classes."""

    kind: Literal["vision"]
    image_size: Size
    """Pixels of a side of the image, which is square; other images are resized."""
    patch_size: Size
    """Pixels of a side of a patch."""
    classes: Width
    """Number of classes."""
    pooling: Literal["class_token", "mean"] = "class_token"
    """What the classes are computed from: a trained token before the patches, or the mean of all patches."""
    d_model: Width
    """Width of the residual stream."""
    layers: Depth
    """Number of layers."""
    heads: Width
    """Attention heads."""
    feed_forward: FeedForwardSpec
    """The feed-forward part of every layer: dense, sparse or a mixture."""
    attention: AttentionSpec = AttentionSpec()
    """The attention part of every layer. The convolution of a `_conv` projection covers `kernel` x `kernel`
    neighbouring patches."""
    normalization: Literal["layer", "rms"] = "layer"
    """Layer norm or RMS norm."""
    normalization_epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the variance before the square root."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of embeddings, attention and feed-forward outputs."""
    initialization: Literal["fan", "paper"] = "fan"
    """`fan` counts the convolution's kernel area in its fan; `paper` does not, as the original implementation."""

    @model_validator(mode="after")
    def _check(self) -> VisionSpec:
        check_multiple("image_size", self.image_size, "patch_size", self.patch_size)
        if self.feed_forward.kind not in FEED_FORWARDS:
            raise fault("feed_forward.kind", f"{self.feed_forward.kind} is for models of text")
        attention = self.attention
        for field, given in {
            "kind": attention.kind != "full",
            "share_query_key": attention.share_query_key,
            "value_concat": attention.value_concat != "none",
            "query_key_rank": attention.query_key_rank is not None,
            **attention.plain_softmax,
        }.items():
            if given:
                raise fault(f"attention.{field}", "is for models of text")
        if attention.output == "multiplicative_conv":
            raise fault("attention.output_projection", "multiplicative_conv is for models of text")
        if attention.projection.endswith("_conv") and attention.kernel % 2 == 0:
            raise fault("attention.kernel", f"{attention.kernel} is even; it has a patch in its middle")
        try:
            _ = self.stack
        except ValidationError as error:  # a fault of the layers, such as heads that do not divide d_model
            context = error.errors()[0]["ctx"]
            raise fault(context["field"], context["message"]) from None
        return self

    @property
    def side(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def leading(self) -> int:
        """Tokens before the patches: the class token, if there is one."""
        return 1 if self.pooling == "class_token" else 0

    @property
    def positions(self) -> int:
        """Tokens of the sequence: patches, and the class token."""
        return self.leading + self.side**2

    @property
    def stack(self) -> ModelSpec:
        """The layers, as those of a model of text with the classes as its vocabulary: what builds, counts and names
        layers reads them there."""
        shared = {name: value for name, value in self if name in ModelSpec.model_fields}
        vocabulary = DenseVocabularySpec(kind="dense", size=self.classes, bias=True)
        return ModelSpec(**shared, max_positions=self.positions, vocabulary=vocabulary)

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> VisionSpec:
        """The architecture that the fields of a `config.json` describe; the classes are those of its `id2label`.

        Raises:
            ValueError: one line that names the field.
        """
        given = {name: fields[name] for name in cls.model_fields if fields.get(name) is not None}
        labels = fields.get("id2label")
        classes = len(labels) if isinstance(labels, dict) else DEFAULT.classes
        try:
            return cls.model_validate({**DEFAULT.model_dump(), **given, "classes": classes})
        except ValidationError as error:
            first = error.errors()[0]
            parts = [*first["loc"], *([first["ctx"]["field"]] if first["type"] == "fault" else [])]
            place = ".".join(str(part) for part in parts) or "model"
            raise ValueError(f"{place}: {first['msg']}") from error


DEFAULT = VisionSpec.model_validate(
    {
        "kind": "vision",
        "image_size": 32,
        "patch_size": 4,
        "classes": 2,
        "d_model": 64,
        "layers": 2,
        "heads": 4,
        "feed_forward": {"kind": "sparse", "d_ff": 256, "block_size": 16, "rank": 16},
    }
)
"""The architecture of a configuration that says nothing."""

AnySpec = ModelSpec | VisionSpec
