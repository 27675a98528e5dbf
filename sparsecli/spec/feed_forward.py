"""Feed-forward layers as data: dense, sparse, `selector`, `precision`, a mixture of experts, and `spark`."""

from __future__ import annotations

from statistics import NormalDist
from typing import Annotated, Literal, Protocol

from pydantic import Field, model_validator

from sparsecli.spec.base import WIDE, Probability, Size, Spec, Units, Whole, Width, check_multiple, fault

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
UnitsPerBlock = Size | Annotated[list[Annotated[Whole, Field(ge=0)]], Field(min_length=1)]
"""One number, or a list with one for every layer of the model, from the first to the last."""


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


class DenseFeedForwardSpec(Spec):
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


class SparseFeedForwardSpec(Spec):
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
    explored_fraction: Probability = 0.0
    """Share of training tokens whose controllers also learn from the units that were not chosen (paper: 0). Needs hard
    choices and `relu`."""
    gate: Literal["none", "probability"] = "none"
    """`probability` multiplies a chosen unit by its controller probability."""

    @model_validator(mode="after")
    def _check(self) -> SparseFeedForwardSpec:
        if self.explored_fraction and (self.hard_fraction < 1 or self.activation != "relu"):
            raise fault("explored_fraction", "needs hard_fraction: 1.0 and activation: relu")
        check_choice(self, least=1, most=self.block_size - 1 if type(self.units_per_block) is int else None)
        return self


class SelectorFeedForwardSpec(Spec):
    """Units chosen by a low-bit sketch of their own weights, which every token reads; the rest as for Sparse FF."""

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
    """Bits of a weight of the sketch, in groups of 64 inputs that share a scale."""
    activation: Activation = "relu"
    """Non-linearity of a unit."""
    gated: bool = False
    """Multiply the activated gate by a second, linear branch (SwiGLU-like)."""
    unit_bias: bool = False
    """A bias on every unit before its activation."""
    bypass: Annotated[int, Field(ge=0), WIDE] = 0
    """Rank of a low-rank linear layer beside the units that stands in for those left out; 0 is none."""

    @model_validator(mode="after")
    def _check(self) -> SelectorFeedForwardSpec:
        check_choice(self, least=1)
        if self.choice == "positive" and (self.activation != "relu" or self.gated):
            raise fault("choice", "positive needs a ReLU without a gate, whose units are exactly zero")
        return self


class PrecisionFeedForwardSpec(Spec):
    """Every unit quantized; the chosen ones are refined with the rounding error of their weights.

    The quantized pass also selects. No unit is dropped: a choice adds precision.
    """

    kind: Literal["precision"]
    d_ff: Units
    """Number of units."""
    block_size: Annotated[Whole, Field(ge=2)] = 16
    """N: units that compete for more bits."""
    units_per_block: Annotated[Whole, Field(ge=0)] | list[Annotated[Whole, Field(ge=0)]] = 1
    """k: units of each block that are refined; 0 is plain quantized weights. One number, or one for every layer
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


class MixtureFeedForwardSpec(Spec):
    """Mixture of experts: a router picks whole slices of consecutive units."""

    kind: Literal["mixture"]
    d_ff: Units
    """Number of units of all experts together."""
    experts: Annotated[int, Field(ge=2), WIDE]
    """Number of equal slices."""
    experts_per_token: Width = 1
    """Experts that a token uses."""
    activation: Activation = "relu"
    """Non-linearity of a unit."""
    gated: bool = False
    """Multiply the activated gate by a second, linear branch (SwiGLU-like)."""
    bias: bool = True
    """A bias on the sum of the experts."""
    hard_fraction: Probability = 0.5
    """Share of training calls that use the hard choice."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """Scale of the Gumbel noise that is added to the log-probabilities when training."""
    gate: Literal["none", "probability", "output_probability"] = "none"
    """`probability` multiplies what an expert's units read by its router probability (as in Switch Transformer),
    `output_probability` what it gives (as in Mixtral)."""
    normalize_probabilities: bool = False
    """Divide the router probabilities of the chosen experts by their sum; the same as a softmax over these alone."""
    load_balancing: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the loss that keeps all experts in use when training (as in Switch Transformer); 0 is none."""

    @model_validator(mode="after")
    def _check(self) -> MixtureFeedForwardSpec:
        check_multiple("d_ff", self.d_ff, "experts", self.experts)
        if self.experts_per_token >= self.experts:
            raise fault(
                "experts_per_token", f"{self.experts_per_token} of {self.experts} experts leaves none to skip"
            )
        if self.normalize_probabilities and self.gate == "none":
            raise fault("normalize_probabilities", "needs a gate, which multiplies by them")
        return self


class SparkFeedForwardSpec(Spec):
    """Spark FFN (You et al., 2025, arXiv 2506.06644): units whose predicted score is among the largest, without blocks.

    The first inputs of the layer are the predictor's, the others meet the units that it keeps.
    """

    kind: Literal["spark"]
    d_ff: Units
    """n: number of units in all."""
    active_units: Units
    """k: units that a token uses on average; a threshold keeps more or fewer of single tokens (paper: 8 % of n)."""
    predictor_width: Width
    """r: inputs of the predictor, less than d_model (paper: about half of it)."""
    activation: Activation = "gelu"
    """Non-linearity of a unit's score above the threshold; each is zero at zero, so that units below add nothing."""

    @model_validator(mode="after")
    def _check(self) -> SparkFeedForwardSpec:
        if self.active_units >= self.d_ff:
            raise fault("active_units", f"{self.active_units} of {self.d_ff} units leaves nothing to skip")
        return self

    @property
    def quantile(self) -> float:
        """Q(1 - k / n): standard deviations between the mean of normally distributed scores and the threshold."""
        return NormalDist().inv_cdf(1 - self.active_units / self.d_ff)


FeedForwardSpec = Annotated[
    DenseFeedForwardSpec
    | SparseFeedForwardSpec
    | SelectorFeedForwardSpec
    | PrecisionFeedForwardSpec
    | MixtureFeedForwardSpec
    | SparkFeedForwardSpec,
    Field(discriminator="kind"),
]
