"""How many weights a model has and how many of them a token reads, without allocating any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparsecli.model.architecture import ModelSpec
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.layers.feed_forward import ChosenUnits, MixtureFeedForward
from sparsecli.model.layers.low_bit import LowBitMatrix, Selector

BYTES = {"float32": 4, "bfloat16": 2}
TOLERANCE = 0.01
"""Models of which the largest has at most this share more parameters count as equally large."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, those that one decoded token reads, and cached values per position."""

    total: int
    active: int
    cached_per_position: int

    def bytes_per_token(self, dtype: str, context: int) -> int:
        """Bytes a token reads at `context` cached positions: active weights, keys and values."""
        return BYTES[dtype] * (self.active + context * self.cached_per_position)


def count_parameters(spec: ModelSpec) -> Sizes:
    """Sizes of `spec`, counted on the meta device (exact, and free at any size)."""
    with torch.device("meta"):
        model = ScalingTransformerForCausalLM(ScalingTransformerConfig.from_spec(spec))
    total = sum(parameter.numel() for parameter in model.parameters())
    low_bit = [module for module in model.modules() if isinstance(module, LowBitMatrix)]
    # A copy that only selects units adds reading, not parameters; what rounding left over is no parameter either.
    copies = {
        id(matrix) for layer in model.modules() if isinstance(layer, Selector) for matrix in layer.children()
    }
    total += sum(matrix.rows * matrix.cols for matrix in low_bit if id(matrix) not in copies)
    key_value_heads = spec.attention.key_value_heads or spec.heads
    return Sizes(
        total=total,
        active=total - sum(_skipped(module) for module in model.modules()) - _unread_tables(model),
        cached_per_position=2 * spec.layers * key_value_heads * spec.width_of_head,
    )


def disagreement(models: Sequence[Sizes]) -> float:
    """How many more parameters the largest of `models` has than the smallest, as a share."""
    counts = [sizes.total for sizes in models]
    return max(counts) / min(counts) - 1


def _skipped(module: nn.Module) -> int:
    """Weights of units that a token does not choose."""
    if isinstance(module, ChosenUnits):
        weights = [weight.numel() for weight in (module.gate, module.up, module.down) if weight is not None]
        return sum(weights) * (module.block_size - module.units_per_block) // module.block_size
    if isinstance(module, MixtureFeedForward):
        unread = module.experts - module.experts_per_token
        return (module.up.numel() + module.down.numel()) * unread // module.experts
    return 0


def _unread_tables(model: ScalingTransformerForCausalLM) -> int:
    """Rows of the embedding and position tables that a token does not look up; a tied table is read as the head."""
    spec = model.config.spec
    unread = 0 if model.config.tie_word_embeddings else (spec.vocabulary.size - 1) * spec.d_model
    if spec.positions == "learned":
        unread += (spec.max_positions - 1) * spec.d_model
    return unread
