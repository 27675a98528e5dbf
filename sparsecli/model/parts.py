"""The layers that a model may be made of, as inert data: closed choices and their sizes.

These field types are shared by the recipe schema and by the Hugging Face configuration, so that a word means
the same in YAML, in `config.json` and in Python. Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
Probability = Annotated[float, Field(ge=0, le=1)]


def _at_most(limit: int) -> AfterValidator:
    """Far beyond any model, so that nothing that grows with a number is begun for one that is damaged."""

    def check(value: int) -> int:
        if value > limit:
            message = f"{value} is more than {limit}, the most that is taken"
            raise PydanticCustomError("limit", "{message}", {"message": message})
        return value

    return AfterValidator(check)


MOST_LAYERS = 2**10
DEEP, WIDE, MANY = _at_most(MOST_LAYERS), _at_most(2**20), _at_most(2**24)
"""Limits of layers and what else is gone through one by one; of vectors and the parts that they are cut into; of the
rows of matrices that have many."""
Whole = Annotated[int, _at_most(2**31 - 1)]
Size = Annotated[Whole, Field(gt=0)]
Count = Annotated[Whole, Field(ge=0)]
Depth = Annotated[int, Field(gt=0), DEEP]
Width = Annotated[int, Field(gt=0), WIDE]
Units = Annotated[int, Field(gt=0), MANY]
UnitsPerBlock = Size | Annotated[list[Annotated[Whole, Field(ge=0)]], Field(min_length=1)]
"""One number, or a list with one for every block of the model, from the first to the last."""
Factor = Annotated[Whole, Field(ge=2, le=2**15)]
"""Hash values that one set of axes gives."""
MOST_BUCKETS = 2**30
"""Hash values of tokens are kept as 32-bit numbers."""
DIGIT_BASES, DIGITS = (11, 13, 14, 15), 8
"""Bases in which `positions: digits` writes a position, and how many digits."""


class Block(BaseModel):
    """A frozen block of a recipe: unknown keys are errors, every field's docstring is its documentation."""

    # A validator is built on first use: a command reads few of the blocks.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


def fault(field: str, message: str) -> PydanticCustomError:
    """An error of one block that names the field to look at (`field`), for checks that span several fields."""
    return PydanticCustomError("fault", "{message}", {"field": field, "message": message})


def check_multiple(field: str, value: int, of: str, factor: int) -> None:
    """Raise a `fault` unless `value` is a multiple of `factor`, naming the nearest values that are."""
    if value % factor:
        below = value // factor * factor
        nearest = f"{below} and {below + factor}" if below else f"{factor}"
        raise fault(field, f"{value} is not a multiple of {of} {factor}; nearest: {nearest}")


class ChoosingSpec(Protocol):
    """A feed-forward layer that chooses units in blocks."""

    d_ff: int
    block_size: int
    units_per_block: int | list[int]


def check_choice(spec: ChoosingSpec, least: int, most: int | None = None) -> None:
    """Raise a `fault` unless blocks divide the units and every k lies between `least` and `most` (the block)."""
    check_multiple("d_ff", spec.d_ff, "block_size", spec.block_size)
    most = spec.block_size if most is None else most
    for k in spec.units_per_block if isinstance(spec.units_per_block, list) else [spec.units_per_block]:
        if k < least:
            raise fault("units_per_block", f"{k} of {spec.block_size} units computes nothing")
        if k > most:
            what = "leaves nothing to skip" if k == spec.block_size else "are more than there are"
            raise fault("units_per_block", f"{k} of {spec.block_size} units {what}")


class DenseFeedForwardSpec(Block):
    """Two matrices (three when gated) and an activation."""

    kind: Literal["dense"]
    d_ff: Units
    """Number of units."""
    activation: Activation = "relu"
    """Non-linearity of a unit."""
    gated: bool = False
    """Multiply the activated gate by a second, linear branch (SwiGLU-like)."""
    bias: bool = True
    """Biases on every matrix; the paper's dense layer has them."""


class SparseFeedForwardSpec(Block):
    """Sparse FF (paper section 3.1): a low-rank controller picks `units_per_block` of every `block_size` units."""

    kind: Literal["sparse"]
    d_ff: Units
    """Number of units in all; a token uses `d_ff * units_per_block / block_size` of them."""
    block_size: Annotated[Whole, Field(ge=2)]
    """N: units that compete with one another."""
    rank: Width
    """r: inner width of the controller."""
    units_per_block: UnitsPerBlock = 1
    """k: units chosen in each block (paper: 1)."""
    activation: Activation = "relu"
    """Non-linearity of a unit."""
    gated: bool = False
    """Multiply the activated gate by a second, linear branch (SwiGLU-like)."""
    unit_bias: bool = False
    """A bias on every unit before its activation; the paper's layer has none, a converted dense one may."""
    hard_fraction: Probability = 0.3
    """Share of training calls that use the hard choice; the others use the soft one (paper: 0.3)."""
    temperature: Annotated[float, Field(ge=0)] = 0.1
    """Scale of the Gumbel noise that is added to the log-probabilities when training."""
    gate: Literal["none", "probability"] = "none"
    """`probability` multiplies a chosen unit by its controller probability."""

    @model_validator(mode="after")
    def _check(self) -> SparseFeedForwardSpec:
        check_choice(self, least=1, most=self.block_size - 1 if type(self.units_per_block) is int else None)
        return self


class SelectorFeedForwardSpec(Block):
    """Units chosen by a low-bit copy of their own weights, which every token reads; the rest as for Sparse FF."""

    kind: Literal["selector"]
    d_ff: Units
    """Number of units in all."""
    block_size: Annotated[Whole, Field(ge=2)] = 16
    """N: units that compete with one another."""
    units_per_block: UnitsPerBlock = 4
    """k: units chosen in each block; not used by the choice `positive`."""
    choice: Literal["top", "positive"] = "top"
    """`top` takes the k units that add most; `positive` those whose activation is not predicted to be zero (ReLU)."""
    bits: Literal[3, 4] = 3
    """Bits of a weight of the copy, in groups of 64 inputs that share a scale."""
    activation: Activation = "relu"
    """Non-linearity of a unit."""
    gated: bool = False
    """Multiply the activated gate by a second, linear branch (SwiGLU-like)."""
    unit_bias: bool = False
    """A bias on every unit before its activation."""
    bypass: Annotated[int, Field(ge=0), WIDE] = 0
    """Rank of a linear map beside the units that stands in for those left out; 0 is none."""

    @model_validator(mode="after")
    def _check(self) -> SelectorFeedForwardSpec:
        check_choice(self, least=1)
        if self.choice == "positive" and (self.activation != "relu" or self.gated):
            raise fault("choice", "positive needs a ReLU without a gate, whose units are exactly zero")
        return self


class PrecisionFeedForwardSpec(Block):
    """Every unit in few bits; the chosen ones are read again with the bits that were left out.

    The low-bit pass is the selector. No unit is dropped: a choice adds precision.
    """

    kind: Literal["precision"]
    d_ff: Units
    """Number of units."""
    block_size: Annotated[Whole, Field(ge=2)] = 16
    """N: units that compete for more bits."""
    units_per_block: Annotated[Whole, Field(ge=0)] | list[Annotated[Whole, Field(ge=0)]] = 1
    """k: units of each block that are read in full; 0 is plain low-bit weights. One number, or one for every block
    of the model."""
    bits: Literal[3, 4] = 4
    """Bits of a weight that every token reads, in groups of 64 inputs that share a scale."""
    activation: Activation = "silu"
    """Non-linearity of a unit."""
    gated: bool = False
    """Multiply the activated gate by a second, linear branch (SwiGLU-like)."""
    unit_bias: bool = False
    """A bias on every unit before its activation."""

    @model_validator(mode="after")
    def _check(self) -> PrecisionFeedForwardSpec:
        check_choice(self, least=0)
        return self


class MixtureFeedForwardSpec(Block):
    """Mixture of experts: a router picks whole slices of consecutive units."""

    kind: Literal["mixture"]
    d_ff: Units
    """Number of units of all experts together."""
    experts: Annotated[int, Field(ge=2), WIDE]
    """Number of equal slices."""
    experts_per_token: Literal[1, 2] = 1
    """Experts that a token uses."""
    activation: Activation = "relu"
    """Non-linearity of a unit."""
    hard_fraction: Probability = 0.5
    """Share of training calls that use the hard choice."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """Scale of the Gumbel noise that is added to the log-probabilities when training."""
    gate: Literal["none", "probability"] = "none"
    """`probability` multiplies an expert by its router probability (as in Switch Transformer)."""
    load_balancing: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the loss that keeps all experts in use when training (as in Switch Transformer); 0 is none."""

    @model_validator(mode="after")
    def _check(self) -> MixtureFeedForwardSpec:
        check_multiple("d_ff", self.d_ff, "experts", self.experts)
        if self.experts_per_token >= self.experts:
            raise fault(
                "experts_per_token", f"{self.experts_per_token} of {self.experts} experts leaves none to skip"
            )
        return self


class LshSpec(Block):
    """Attention within chunks of tokens that were sorted by a hash of their shared query and key (Reformer)."""

    rounds: Depth = 2
    """Hash rounds; each attends on its own, and they are weighed by the mass they found."""
    chunk_length: Width = 64
    """Tokens of a chunk."""
    chunks_before: Annotated[int, Field(ge=0), DEEP] = 1
    """Chunks before its own that a token sees too, around the end."""
    chunks_after: Annotated[int, Field(ge=0), DEEP] = 0
    """Chunks after its own that a token sees too, around the end."""
    buckets: Factor | Annotated[list[Factor], Field(min_length=1)] | None = None
    """Hash values, or factors of their number; by default two for every chunk, in two factors above 128."""

    @property
    def most_keys(self) -> int:
        """Keys that a token reads, itself among them, where others are held already."""
        return self.rounds * self.chunk_length * (1 + self.chunks_before)

    @model_validator(mode="after")
    def _check(self) -> LshSpec:
        factors = self.buckets if isinstance(self.buckets, list) else [self.buckets or 2]
        for factor in factors:
            if factor % 2:
                raise fault("buckets", f"{factor} is odd; a rotation and its opposite give two values")
        if (buckets := math.prod(factors)) > MOST_BUCKETS:
            raise fault("buckets", f"{buckets} in all are more than {MOST_BUCKETS}")
        return self


class AttentionSpec(Block):
    """Attention and the projections that feed it (paper section 3.2)."""

    kind: Literal["full", "lsh"] = "full"
    """Which positions a token attends to: all that it may see, or those that hash alike (`lsh`)."""
    lsh: LshSpec | None = None
    """How `kind: lsh` hashes; by default as `LshSpec` says."""
    share_query_key: bool = False
    """One projection for queries and keys, keys scaled to unit length, a token seeing itself last (Reformer).
    With `kind: lsh` and without it, the mean of the two projections is shared, as when a model is fine-tuned."""
    projection: Literal["dense", "multiplicative", "dense_conv", "multiplicative_conv"] = "dense"
    """How queries, keys and values are made; the `_conv` kinds share one projection, then convolve it."""
    output_projection: Literal["none", "dense", "multiplicative", "multiplicative_conv"] | None = None
    """What follows the heads; by default `none` after a convolution, else the same kind as `projection`."""
    modules: Width | None = None
    """S: slices of the multiplicative layer and of the convolution; defaults to the number of heads."""
    kernel: Depth = 3
    """Length of the convolution over past positions."""
    value_concat: Literal["none", "modules", "whole"] = "none"
    """What joins the values' input: nothing, x per module, or x as a whole (original implementation's options)."""
    key_value_heads: Width | None = None
    """Heads of keys and values (grouped queries); defaults to the number of heads; `dense` projection only."""
    bias: bool = True
    """Biases on dense projections; the paper's have them."""
    output_bias: bool | None = None
    """A bias on a dense output projection; by default as `bias` says."""
    query_key_norm: bool = False
    """RMS norms over every head of queries and keys, before rotary positions (as in Qwen 3)."""
    query_key_rank: Width | None = None
    """Make queries by two maps with so many numbers between them, and keys by two with as large a share of their
    weights; by default one map each. `dense` projection only."""

    @property
    def hashing(self) -> LshSpec | None:
        """How tokens are hashed; None for full attention."""
        return (self.lsh or LshSpec()) if self.kind == "lsh" else None

    @property
    def shares_query_key(self) -> bool:
        """Whether queries are keys, by one projection or by the mean of two."""
        return self.share_query_key or self.kind == "lsh"

    @property
    def output(self) -> Literal["none", "dense", "multiplicative", "multiplicative_conv"]:
        """`output_projection` with its default filled in."""
        if self.output_projection is not None:
            return self.output_projection
        if self.projection == "dense" or self.projection == "multiplicative":
            return self.projection
        return "none"

    @property
    def dense(self) -> bool:
        """Whether heads may be of any width: all projections are dense, and one leads back to d_model."""
        return (self.projection, self.output) == ("dense", "dense")

    @property
    def in_modules(self) -> bool:
        """Whether any projection is cut into modules."""
        return self.projection != "dense" or self.output.startswith("multiplicative")

    @model_validator(mode="after")
    def _check(self) -> AttentionSpec:
        conv = self.projection.endswith("_conv")
        if self.lsh is not None and self.kind != "lsh":
            raise fault("lsh", "needs kind: lsh")
        if self.shares_query_key and self.key_value_heads is not None:
            raise fault("key_value_heads", "queries and keys that are shared have the same heads")
        if self.shares_query_key and (self.query_key_norm or self.query_key_rank):
            raise fault("share_query_key", "goes with plain projections of queries and keys")
        if self.value_concat != "none" and not conv:
            raise fault("value_concat", "needs a projection with a convolution")
        if self.key_value_heads is not None and self.projection != "dense":
            raise fault("key_value_heads", "grouped queries need projection: dense")
        if self.query_key_norm and self.projection != "dense":
            raise fault("query_key_norm", "norms of queries and keys need projection: dense")
        if self.query_key_rank is not None and self.projection != "dense":
            raise fault("query_key_rank", "needs projection: dense")
        return self


class DenseVocabularySpec(Block):
    """One row of logits weights per token of the vocabulary."""

    kind: Literal["dense"]
    size: Units
    """Number of tokens."""
    tied: bool = False
    """Use the embedding's table for the logits too."""
    bias: bool = False
    """Bias on the logits."""


class MultiplicativeVocabularySpec(Block):
    """Sparse loss layer (paper section 3.3): a multiplicative layer from d_model to the vocabulary."""

    kind: Literal["multiplicative"]
    size: Units
    """Number of tokens."""
    modules: Width
    """S: slices of the vocabulary."""

    @model_validator(mode="after")
    def _check(self) -> MultiplicativeVocabularySpec:
        check_multiple("size", self.size, "modules", self.modules)
        return self


class LinearRotaryScaling(Block):
    """Positions divided by a factor."""

    kind: Literal["linear"]
    factor: Annotated[float, Field(ge=1)]
    """How many times longer the context is."""


class Llama3RotaryScaling(Block):
    """Low frequencies divided by a factor, high ones kept, those between blended (as in Llama 3.1)."""

    kind: Literal["llama3"]
    factor: Annotated[float, Field(ge=1)]
    """How many times longer the context is."""
    low_frequency_factor: Annotated[float, Field(gt=0)]
    """Turns over the original context below which a frequency is divided."""
    high_frequency_factor: Annotated[float, Field(gt=0)]
    """Turns over the original context above which it is kept."""
    original_positions: Size
    """The context before it was extended."""


RotaryScaling = Annotated[LinearRotaryScaling | Llama3RotaryScaling, Field(discriminator="kind")]


FeedForwardSpec = Annotated[
    DenseFeedForwardSpec
    | SparseFeedForwardSpec
    | SelectorFeedForwardSpec
    | PrecisionFeedForwardSpec
    | MixtureFeedForwardSpec,
    Field(discriminator="kind"),
]
VocabularySpec = Annotated[DenseVocabularySpec | MultiplicativeVocabularySpec, Field(discriminator="kind")]
