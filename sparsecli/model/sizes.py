"""How many weights a model has and how many of them a token reads, without allocating any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparsecli.model.auto import Network, build
from sparsecli.model.encoder_decoder import EncoderDecoder
from sparsecli.model.layers.cross_attention import CrossAttention
from sparsecli.model.layers.feed_forward import ChosenUnits, MixtureFeedForward
from sparsecli.model.layers.gguf import GgufWeight
from sparsecli.model.layers.quantized import QuantizedMatrix, Sketch
from sparsecli.model.layers.spark import SparkFeedForward
from sparsecli.spec.vision import AnySpec, VisionSpec

BYTES = {"float32": 4, "bfloat16": 2}
TOLERANCE = 0.01
"""Models of which the largest has at most this share more parameters count as equally large."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, those that one decoded token reads, and cached values per position."""

    total: int
    active: int
    cached_per_position: int
    cached_per_encoder_position: int = 0

    def bytes_per_token(self, dtype: str, context: int, source: int = 0) -> int:
        """Bytes a token reads after `context` positions and a `source`: active weights, keys and values."""
        cached = context * self.cached_per_position + source * self.cached_per_encoder_position
        return BYTES[dtype] * (self.active + cached)


def count_parameters(spec: AnySpec) -> Sizes:
    """Sizes of `spec`, counted on the meta device (exact, and free at any size). Of a model of images, the tokens are
    patches."""
    with torch.device("meta"):
        model = build(spec)
    total = sum(parameter.numel() for parameter in model.parameters())
    quantized = [module for module in model.modules() if isinstance(module, QuantizedMatrix)]
    # A sketch that only selects units adds reading, not parameters; what rounding left over is no parameter either.
    sketches = {
        id(matrix) for layer in model.modules() if isinstance(layer, Sketch) for matrix in layer.children()
    }
    total += sum(matrix.rows * matrix.cols for matrix in quantized if id(matrix) not in sketches)
    total += sum(module.rows * module.cols for module in model.modules() if isinstance(module, GgufWeight))
    if isinstance(spec, VisionSpec):
        skipped = sum(map(_skipped, model.modules())) + (spec.positions - 1) * spec.d_model
        return Sizes(total, total - skipped, 0)
    assert isinstance(model, Network)
    unread = _read_once(model)
    passed = {id(module) for part in unread for module in part.modules()}
    skipped = sum(_skipped(module) for module in model.modules() if id(module) not in passed)
    once = sum(parameter.numel() for part in unread for parameter in part.parameters())
    cached = 2 * spec.layers * spec.attention_layers * spec.key_width
    per_encoder_position = 0
    if spec.encoder:
        prefix = spec.encoder.read_by.kind == "prefix"
        per_encoder_position = cached if prefix else 2 * spec.layers * spec.attention_width
    return Sizes(total, total - once - skipped - _unread_tables(model), cached, per_encoder_position)


def disagreement(models: Sequence[Sizes]) -> float:
    """How many more parameters the largest of `models` has than the smallest, as a share."""
    counts = [sizes.total for sizes in models]
    return max(counts) / min(counts) - 1


def unequal(models: Mapping[str, Sizes], tolerance: float) -> str | None:
    """What is wrong if the numbers of parameters differ by more than `tolerance`, a share; None if nothing is."""
    share = disagreement(list(models.values()))
    if share <= tolerance:
        return None
    smallest = min(models, key=lambda name: models[name].total)
    largest = max(models, key=lambda name: models[name].total)
    return (
        f"{largest} has {models[largest].total:,} parameters, {smallest} {models[smallest].total:,}: "
        f"{share:.1%} more, {tolerance:.1%} are allowed"
    )


def _read_once(model: Network) -> list[nn.Module]:
    """Parts that a source is read with, before the first token is decoded."""
    if not isinstance(model.model, EncoderDecoder):
        return []
    crossed = [module.projection for module in model.modules() if isinstance(module, CrossAttention)]
    return [model.model.encoder, *(part for made in crossed for part in (made.key, made.value))]


def _skipped(module: nn.Module) -> int:
    """Weights of units that a token does not choose."""
    if isinstance(module, ChosenUnits):
        weights = [weight.numel() for weight in (module.gate, module.up, module.down) if weight is not None]
        return sum(weights) * (module.block_size - module.units_per_block) // module.block_size
    if isinstance(module, MixtureFeedForward):
        unread = module.experts - module.experts_per_token
        weights = [weight.numel() for weight in (module.gate, module.up, module.down) if weight is not None]
        return sum(weights) * unread // module.experts
    if isinstance(module, SparkFeedForward):
        units = len(module.up)
        return (module.up.numel() + module.down.numel()) // units * (units - module.active_units)
    return 0


def _unread_tables(model: Network) -> int:
    """Rows of the embedding and position tables that a token does not look up; a tied table is read as the head."""
    spec = model.config.spec
    unread = 0 if model.config.tie_word_embeddings else (spec.vocabulary.size - 1) * spec.d_model
    if spec.positions == "learned":
        unread += (spec.max_positions - 1) * spec.d_model
    elif spec.positions == "axial":
        assert spec.axial
        axes = zip(spec.axial.shape, spec.axial.widths, strict=True)
        unread += sum((size - 1) * width for size, width in axes)
    return unread
