"""The closed choices that make up a model, as inert data.

These field types are shared by the recipe schema and by the Hugging Face configuration, so that a word means
the same in YAML, in `config.json` and in Python. Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
Probability = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[int, Field(gt=0)]
UnitsPerBlock = Size | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
"""One number, or a list with one for every block of the model, from the first to the last."""


class Block(BaseModel):
    """A frozen block of a recipe: unknown keys are errors, every field's docstring is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


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
    d_ff: Size
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
    d_ff: Size
    """Number of units in all; a token uses `d_ff * units_per_block / block_size` of them."""
    block_size: Annotated[int, Field(ge=2)]
    """N: units that compete with one another."""
    rank: Size
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
    d_ff: Size
    """Number of units in all."""
    block_size: Annotated[int, Field(ge=2)] = 16
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
    bypass: Annotated[int, Field(ge=0)] = 0
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
    d_ff: Size
    """Number of units."""
    block_size: Annotated[int, Field(ge=2)] = 16
    """N: units that compete for more bits."""
    units_per_block: Annotated[int, Field(ge=0)] | list[Annotated[int, Field(ge=0)]] = 1
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
    d_ff: Size
    """Number of units of all experts together."""
    experts: Annotated[int, Field(ge=2)]
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

    @model_validator(mode="after")
    def _check(self) -> MixtureFeedForwardSpec:
        check_multiple("d_ff", self.d_ff, "experts", self.experts)
        if self.experts_per_token >= self.experts:
            raise fault("experts_per_token", f"{self.experts_per_token} of {self.experts} experts skips none")
        return self


class AttentionSpec(Block):
    """Causal attention and the projections that feed it (paper section 3.2)."""

    kind: Literal["full"] = "full"
    """Which positions a token attends to."""
    projection: Literal["dense", "multiplicative", "dense_conv", "multiplicative_conv"] = "dense"
    """How queries, keys and values are made; the `_conv` kinds share one projection, then convolve it."""
    output_projection: Literal["none", "dense", "multiplicative", "multiplicative_conv"] | None = None
    """What follows the heads; by default `none` after a convolution, else the same kind as `projection`."""
    modules: Size | None = None
    """S: slices of the multiplicative layer and of the convolution; defaults to the number of heads."""
    kernel: Size = 3
    """Length of the convolution over past positions."""
    value_concat: Literal["none", "modules", "whole"] = "none"
    """What joins the values' input: nothing, x per module, or x as a whole (original implementation's options)."""
    key_value_heads: Size | None = None
    """Heads of keys and values (grouped queries); defaults to the number of heads; `dense` projection only."""
    bias: bool = True
    """Biases on dense projections; the paper's have them."""
    output_bias: bool | None = None
    """A bias on a dense output projection; by default as `bias` says."""
    query_key_norm: bool = False
    """RMS norms over every head of queries and keys, before rotary positions (as in Qwen 3)."""
    query_key_rank: Size | None = None
    """Make queries by two maps with so many numbers between them, and keys by two with as large a share of their
    weights; by default one map each. `dense` projection only."""

    @property
    def output(self) -> Literal["none", "dense", "multiplicative", "multiplicative_conv"]:
        """`output_projection` with its default filled in."""
        if self.output_projection is not None:
            return self.output_projection
        if self.projection == "dense" or self.projection == "multiplicative":
            return self.projection
        return "none"

    @model_validator(mode="after")
    def _check(self) -> AttentionSpec:
        conv = self.projection.endswith("_conv")
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
    size: Size
    """Number of tokens."""
    tied: bool = False
    """Use the embedding's table for the logits too."""
    bias: bool = False
    """Bias on the logits."""


class MultiplicativeVocabularySpec(Block):
    """Sparse loss layer (paper section 3.3): a multiplicative layer from d_model to the vocabulary."""

    kind: Literal["multiplicative"]
    size: Size
    """Number of tokens."""
    modules: Size
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


class LowBitSpec(Block):
    """Dense maps that are stored in few bits, in groups of 64 inputs that share a scale."""

    projection: Literal[3, 4] | None = None
    """Bits of attention's dense maps but that of the values, which loses most by rounding and is often small."""
    head: Literal[3, 4] | None = None
    """Bits of the dense logits."""


FeedForwardSpec = Annotated[
    DenseFeedForwardSpec
    | SparseFeedForwardSpec
    | SelectorFeedForwardSpec
    | PrecisionFeedForwardSpec
    | MixtureFeedForwardSpec,
    Field(discriminator="kind"),
]
VocabularySpec = Annotated[DenseVocabularySpec | MultiplicativeVocabularySpec, Field(discriminator="kind")]


class ModelSpec(Block):
    """A decoder-only Scaling Transformer: pre-norm residual blocks of attention and feed-forward."""

    d_model: Size
    """Width of the residual stream."""
    layers: Size
    """Number of blocks."""
    heads: Size
    """Attention heads."""
    head_width: Size | None = None
    """Width of a head; by default d_model / heads."""
    max_positions: Size
    """Longest sequence, in tokens."""
    feed_forward: FeedForwardSpec
    """The feed-forward layer of every block."""
    attention: AttentionSpec = AttentionSpec()
    """The attention layer of every block."""
    vocabulary: VocabularySpec
    """Embedding and logits."""
    normalization: Literal["layer", "rms"] = "layer"
    """Layer norm or RMS norm."""
    normalization_epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the variance before the square root."""
    positions: Literal["learned", "sinusoidal", "rotary"] = "learned"
    """How positions enter: a trained table, a fixed table, or rotated queries and keys."""
    rotary_base: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary frequencies."""
    rotary_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a head, from its start, that rotary positions turn."""
    rotary_scaling: RotaryScaling | None = None
    """How rotary frequencies were changed for a longer context."""
    parallel: bool = False
    """Attention and feed-forward of a block read the same stream (as in GPT-NeoX), not one after the other."""
    embedding_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the embedding of tokens (as in Gemma)."""
    low_bit: LowBitSpec = LowBitSpec()
    """Maps outside of the feed-forward layers that are stored in few bits."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of embeddings, attention and feed-forward outputs."""
    initialization: Literal["fan", "paper"] = "fan"
    """`fan` counts the convolution's kernel area in its fan; `paper` does not, as the original implementation."""

    @model_validator(mode="after")
    def _check(self) -> ModelSpec:
        dense = (self.attention.projection, self.attention.output) == ("dense", "dense")
        if self.head_width is None:
            check_multiple("d_model", self.d_model, "heads", self.heads)
        elif self.attention_width != self.d_model and not dense:
            raise fault("head_width", "heads that are not d_model wide together need dense projections")
        if self.positions == "rotary" and (not self.rotary_width or self.rotary_width % 2):
            raise fault("positions", "rotary positions turn an even part of a head, which this is not")
        if self.positions != "rotary" and self.d_model % 2:  # learned ones start as sinusoids
            raise fault("d_model", f"{self.positions} positions need an even d_model")
        attention = self.attention
        if attention.projection != "dense" or attention.output.startswith("multiplicative"):
            check_multiple("d_model", self.d_model, "attention.modules", attention.modules or self.heads)
        if attention.key_value_heads:
            check_multiple("heads", self.heads, "attention.key_value_heads", attention.key_value_heads)
        if (attention.query_key_rank or 0) > (full := min(self.d_model, self.attention_width)):
            message = f"a rank of {attention.query_key_rank} is more than the {full} of a whole map"
            raise fault("attention.query_key_rank", message)
        chosen = getattr(self.feed_forward, "units_per_block", None)
        if isinstance(chosen, list) and len(chosen) != self.layers:
            raise fault("feed_forward.units_per_block", f"{len(chosen)} numbers for {self.layers} blocks")
        if self.low_bit.projection and not dense:
            raise fault("low_bit.projection", "needs dense projections")
        if self.low_bit.head and (self.vocabulary.kind != "dense" or self.vocabulary.tied):
            raise fault("low_bit.head", "needs dense logits that are not tied to the embedding")
        return self

    @property
    def width_of_head(self) -> int:
        """Width of a head."""
        return self.head_width or self.d_model // self.heads

    @property
    def attention_width(self) -> int:
        """Width of all heads together."""
        return self.heads * self.width_of_head

    @property
    def key_width(self) -> int:
        """Width of all heads of keys together."""
        return self.width_of_head * (self.attention.key_value_heads or self.heads)

    @property
    def query_rank(self) -> int | None:
        """Numbers between the two maps that make queries; None where it is one map."""
        return self.attention.query_key_rank

    @property
    def key_rank(self) -> int | None:
        """The same of keys: the two maps have as large a share of the weights of one as those of queries."""
        if self.query_rank is None:
            return None
        d_model, queries, keys = self.d_model, self.attention_width, self.key_width
        rank = self.query_rank * (d_model + queries) * keys / (queries * (d_model + keys))
        return min(max(1, round(rank)), d_model, keys)

    @property
    def rotary_width(self) -> int:
        """Elements of a head that rotary positions turn."""
        return int(self.width_of_head * self.rotary_fraction)

    def units_per_block(self, layer: int) -> int:
        """k of the block `layer`; only for feed-forward layers that choose units in blocks."""
        assert self.feed_forward.kind in ("sparse", "selector", "precision")
        k = self.feed_forward.units_per_block
        return k if isinstance(k, int) else k[layer]

    @property
    def kept_fraction(self) -> float:
        """Share of the feed-forward units that a token computes in full, mean of all blocks."""
        return sum(self.chosen_share(layer) for layer in range(self.layers)) / self.layers

    def chosen_share(self, layer: int) -> float:
        """Share of the units of block `layer` that a token computes in full.

        What the choice `positive` takes is only known when it is counted; here it is every unit.
        """
        feed_forward = self.feed_forward
        if feed_forward.kind == "dense" or getattr(feed_forward, "choice", "top") == "positive":
            return 1.0
        if feed_forward.kind == "mixture":
            return feed_forward.experts_per_token / feed_forward.experts
        return self.units_per_block(layer) / feed_forward.block_size

    @property
    def tied(self) -> bool:
        """Whether the logits use the embedding's table."""
        return self.vocabulary.kind == "dense" and self.vocabulary.tied

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> ModelSpec:
        """The architecture that the fields of a `config.json` describe; what they leave out is that of `DEFAULT`.

        Raises:
            ValueError: one line that names the field.
        """
        given = {name: fields[name] for name in cls.model_fields if fields.get(name) is not None}
        try:
            return cls.model_validate({**DEFAULT.model_dump(), **given})
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "model"
            raise ValueError(f"{place}: {first['msg']}") from error


DEFAULT = ModelSpec.model_validate(
    {
        "d_model": 256,
        "layers": 4,
        "heads": 4,
        "max_positions": 512,
        "feed_forward": {"kind": "sparse", "d_ff": 1024, "block_size": 32, "units_per_block": 2, "rank": 64},
        "attention": {"projection": "multiplicative_conv"},
        "vocabulary": {"kind": "dense", "size": 4096, "tied": True},
        "positions": "rotary",
    }
)
"""The architecture of a configuration that says nothing."""
