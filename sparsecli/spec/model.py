"""The whole architecture of a model as data: `ModelSpec`.

The same field names serve in a recipe (YAML), in `config.json` and in Python.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from sparsecli.spec.attention import AttentionSpec, CrossAttentionSpec, PrefixSpec
from sparsecli.spec.base import Depth, Size, Spec, Width, check_multiple, fault
from sparsecli.spec.feed_forward import FeedForwardSpec
from sparsecli.spec.positions import AxialSpec, LongRotaryScaling, RotaryScaling
from sparsecli.spec.vocabulary import VocabularySpec

GgufTypeName = Literal[
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "Q3_K", "Q4_K", "Q5_K", "Q6_K"
]


class QuantizationSpec(Spec):
    """Linear layers that are quantized: in groups of 64 inputs that share a scale, or as a GGUF file has them."""

    projection: Literal[3, 4] | None = None
    """Bits of attention's dense projections except the values', which lose most by rounding and are often small."""
    head: Literal[3, 4] | None = None
    """Bits of the dense logits."""
    gguf: dict[str, GgufTypeName] = Field(default_factory=dict)
    """Types of the modules that keep the codes of a GGUF file, by name, such as `model.layers.0.feed_forward.up`."""
    head_candidates: Size | None = None
    """Tokens whose logits are computed with the head's own weights, those that a sketch of the head in 2 bits finds
    likeliest; all other logits are the sketch's. By default there is no sketch."""

    @property
    def gguf_types(self) -> str:
        """The types of a GGUF file that modules keep, the most frequent first: `Q4_K Q6_K`; empty without any."""
        return " ".join(kind for kind, _ in Counter(self.gguf.values()).most_common())


class SruSpec(Spec):
    """A recurrent branch beside every feed-forward layer: narrow, with a norm of its own (Terraformer)."""

    layers: Depth = 1
    """Recurrent layers, one after the other."""
    width: Width = 32
    """Numbers that each carries from token to token."""


class EncoderSpec(Spec):
    """The encoder, which attends in both directions; of the decoder's width and heads."""

    layers: Depth
    """Number of layers."""
    max_positions: Size
    """Longest source, in tokens."""
    feed_forward: FeedForwardSpec | None = None
    """The feed-forward part of every layer; by default the decoder's."""
    attention: AttentionSpec = AttentionSpec()
    """The attention part of every layer; the paper's are dense."""
    read_by: Annotated[CrossAttentionSpec | PrefixSpec, Field(discriminator="kind")] = CrossAttentionSpec()
    """How the decoder reads it."""
    two_swaps: bool = True
    """Of reversible layers: swap the streams after the feed-forward part too."""

    @model_validator(mode="after")
    def _check(self) -> EncoderSpec:
        if self.attention.projection.endswith("_conv") or self.attention.output == "multiplicative_conv":
            raise fault(
                "attention.projection", "convolutions look backwards only; an encoder looks both ways"
            )
        if self.attention.query_key_rank is not None:
            raise fault("attention.query_key_rank", "is for decoders")
        for field, given in self.attention.plain_softmax.items():
            if given:
                raise fault(f"attention.{field}", "is for decoders")
        return self


class ModelSpec(Spec):
    """A Scaling Transformer: pre-norm residual layers of attention and feed-forward, with or without an encoder."""

    d_model: Width
    """Width of the residual stream."""
    layers: Depth
    """Number of layers."""
    heads: Width
    """Attention heads."""
    head_width: Width | None = None
    """Width of a head; by default d_model / heads."""
    max_positions: Size
    """Longest sequence, in tokens."""
    feed_forward: FeedForwardSpec
    """The feed-forward part of every layer."""
    attention: AttentionSpec = AttentionSpec()
    """The attention part of every layer."""
    vocabulary: VocabularySpec
    """Embedding and logits."""
    normalization: Literal["layer", "rms"] = "layer"
    """Layer norm or RMS norm."""
    normalization_epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the variance before the square root."""
    norm_placement: Literal["before", "around", "after"] = "before"
    """Where the norms of attention and of the feed-forward layer are: before each, before and behind each (as in
    Gemma 2), or behind each only (as in OLMo 2); those behind come before the residual addition."""
    positions: Literal["learned", "sinusoidal", "rotary", "digits", "axial"] = "learned"
    """How positions enter: a trained table, a fixed table, rotated queries and keys, trained vectors for the digits
    of a position in several bases (Terraformer), or for its coordinates."""
    axial: AxialSpec | None = None
    """Coordinates of `positions: axial`."""
    rotary_base: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary frequencies."""
    rotary_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a head, from its start, that rotary positions turn."""
    rotary_scaling: RotaryScaling | None = None
    """How rotary frequencies were changed for a longer context."""
    sliding_rotary_base: Annotated[float, Field(gt=0)] | None = None
    """Base of the rotary frequencies of layers with a window, which are not scaled (as in Gemma 3); by default theirs
    are those of the other layers."""
    rotary_layers: list[bool] | None = None
    """Which layers have rotary positions (as in SmolLM3); by default every layer. The others have no positions."""
    parallel: bool = False
    """Attention and feed-forward of a layer read the same stream (as in GPT-NeoX), not one after the other."""
    shared_norm: bool = False
    """With `parallel`: one norm for both (as in GPT-J)."""
    embedding_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the embedding of tokens (as in Gemma)."""
    residual_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on what attention and the feed-forward layer add to the residual stream (as in Granite)."""
    logit_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the logits (as in Granite)."""
    logit_softcap: Annotated[float, Field(gt=0)] | None = None
    """Limit c of the logits y, which become c * tanh(y / c) in the end (as in Gemma 2)."""
    residual: Literal["single", "reversible"] = "single"
    """`reversible` carries two streams, so that training stores no activations of layers (Reformer, Terraformer)."""
    merge: Literal["mean", "concatenate"] = "mean"
    """How two streams become one before the last norm; Reformer's language model has them side by side."""
    attention_layers: Literal[1, 2] = 1
    """Attention sublayers of a reversible decoder layer (Terraformer: 2)."""
    sru: SruSpec | None = None
    """A recurrent branch beside every feed-forward layer."""
    feed_forward_chunk: Size | None = None
    """Tokens that a feed-forward layer computes at once, to save memory; by default all."""
    encoder: EncoderSpec | None = None
    """The encoder; by default there is none."""
    quantization: QuantizationSpec = QuantizationSpec()
    """Quantized layers other than the feed-forward ones."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of embeddings, attention and feed-forward outputs."""
    initialization: Literal["fan", "paper"] = "fan"
    """`fan` counts the convolution's kernel area in its fan; `paper` does not, as the original implementation."""

    @model_validator(mode="after")
    def _check(self) -> ModelSpec:
        if self.head_width is None:
            check_multiple("d_model", self.d_model, "heads", self.heads)
        if self.positions == "rotary" and (not self.rotary_width or self.rotary_width % 2):
            raise fault("positions", "rotary positions turn an even part of a head, which this is not")
        if self.rotary_scaling and self.rotary_scaling.kind == "longrope":
            self._check_long_rotary(self.rotary_scaling)
        if (
            self.positions in ("learned", "sinusoidal") and self.d_model % 2
        ):  # learned ones start as sinusoids
            raise fault("d_model", f"{self.positions} positions need an even d_model")
        if self.positions == "digits":
            check_multiple("d_model", self.d_model, "the digits of a position", 8)
        self._check_attention("attention", self.attention)
        self._check_units("feed_forward", self.feed_forward, self.layers)
        self._check_predictor("feed_forward", self.feed_forward)
        if self.encoder:
            self._check_encoder(self.encoder)
        self._check_streams()
        self._check_layer_lists()
        self._check_single_decoder()
        if self.shared_norm and (not self.parallel or self.encoder):
            raise fault("shared_norm", "needs parallel: true, and no encoder")
        if self.feed_forward_chunk:
            self._check_chunk()
        if self.positions == "axial":
            self._check_axial()
        if self.quantization.projection and not self.attention.dense:
            raise fault("quantization.projection", "needs dense projections")
        if self.quantization.head and (self.vocabulary.kind != "dense" or self.vocabulary.tied):
            raise fault("quantization.head", "needs dense logits that are not tied to the embedding")
        if self.quantization.head_candidates:
            self._check_sketch(self.quantization.head_candidates)
        return self

    def _check_sketch(self, candidates: int) -> None:
        if self.head_module not in self.quantization.gguf:
            message = f"needs a type of GGUF for the weights of the logits, {self.head_module}"
            raise fault("quantization.head_candidates", message)
        check_multiple("quantization.head_candidates", candidates, "the parts of the vocabulary", 16)

    def _check_attention(self, place: str, attention: AttentionSpec) -> None:
        """Raise a fault unless a layer of either side, at `place` in the recipe, fits the widths."""
        if self.attention_width != self.d_model and not attention.dense:
            raise fault(
                "head_width", f"heads that are not d_model wide together need dense projections in {place}"
            )
        if attention.in_modules:
            check_multiple("d_model", self.d_model, f"{place}.modules", attention.modules or self.heads)
        if attention.key_value_heads:
            check_multiple("heads", self.heads, f"{place}.key_value_heads", attention.key_value_heads)
        if (attention.query_key_rank or 0) > (full := min(self.d_model, self.attention_width)):
            message = f"a rank of {attention.query_key_rank} is more than the full rank {full}"
            raise fault(f"{place}.query_key_rank", message)

    @staticmethod
    def _check_units(place: str, feed_forward: FeedForwardSpec, layers: int) -> None:
        """Raise a fault where a list of k, at `place` in the recipe, does not have one number a layer."""
        chosen = getattr(feed_forward, "units_per_block", None)
        if isinstance(chosen, list) and len(chosen) != layers:
            raise fault(f"{place}.units_per_block", f"{len(chosen)} numbers for {layers} layers")

    def _check_predictor(self, place: str, feed_forward: FeedForwardSpec) -> None:
        """Raise a fault where a predictor, at `place` in the recipe, leaves no inputs for the units."""
        if feed_forward.kind == "spark" and (width := feed_forward.predictor_width) >= self.d_model:
            raise fault(
                f"{place}.predictor_width", f"{width} of d_model {self.d_model} leaves no input for the units"
            )

    def _check_layer_lists(self) -> None:
        """Raise a fault where a list says of more or fewer layers than there are, or of positions there are not."""
        for field, given in (
            ("attention.sliding_layers", self.attention.sliding_layers),
            ("rotary_layers", self.rotary_layers),
        ):
            if given is not None and len(given) != self.layers:
                raise fault(field, f"{len(given)} values for {self.layers} layers")
        for field, value in (
            ("rotary_layers", self.rotary_layers),
            ("sliding_rotary_base", self.sliding_rotary_base),
        ):
            if value is not None and self.positions != "rotary":
                raise fault(field, "needs positions: rotary")
        if self.sliding_rotary_base is not None and self.attention.window is None:
            raise fault("sliding_rotary_base", "needs attention.window")

    def _check_single_decoder(self) -> None:
        """Raise a fault where a field of decoders with one stream of their own is set in another model."""
        fields = {f"attention.{name}": given for name, given in self.attention.plain_softmax.items()}
        fields["norm_placement"] = placed = self.norm_placement != "before"
        fields["residual_scale"] = scaled = self.residual_scale != 1
        fields["rotary_layers"] = self.rotary_layers is not None
        for field in (name for name, given in fields.items() if given):
            if self.residual == "reversible":
                raise fault(field, "needs residual: single")
            if self.encoder:
                raise fault(field, "is for models without an encoder")
        if self.sru and (placed or scaled):
            field = "norm_placement" if placed else "residual_scale"
            raise fault(field, "goes with feed-forward layers that have no recurrent branch (sru)")
        if placed and self.parallel:
            raise fault("norm_placement", "needs attention and feed-forward layers in sequence, not parallel")

    def _check_encoder(self, encoder: EncoderSpec) -> None:
        self._check_attention("encoder.attention", encoder.attention)
        if encoder.feed_forward:
            self._check_units("encoder.feed_forward", encoder.feed_forward, encoder.layers)
            self._check_predictor("encoder.feed_forward", encoder.feed_forward)
        elif isinstance(getattr(self.feed_forward, "units_per_block", None), list) and (
            encoder.layers != self.layers
        ):
            message = f"missing; the decoder's has numbers for {self.layers} layers, the encoder has {encoder.layers}"
            raise fault("encoder.feed_forward", message)
        read_by = encoder.read_by
        if read_by.kind == "cross_attention" and read_by.query_modules:
            place = "encoder.read_by.query_modules"
            check_multiple("d_model", self.d_model, place, read_by.query_modules)
            if self.attention_width != self.d_model:
                raise fault("head_width", f"heads that are not d_model wide together exclude {place}")

    def _check_streams(self) -> None:
        if self.residual == "single":
            for field, value, default in (
                ("merge", self.merge, "mean"),
                ("attention_layers", self.attention_layers, 1),
            ):
                if value != default:
                    raise fault(field, f"{value} needs residual: reversible")
            if self.encoder and self.encoder.read_by.kind == "prefix":
                raise fault("encoder.read_by.kind", "prefix needs residual: reversible")
            return
        if self.encoder and self.encoder.read_by.kind == "cross_attention":
            raise fault("encoder.read_by.kind", "cross_attention needs residual: single")
        if self.parallel:
            raise fault("parallel", "needs residual: single")
        if self.merge == "concatenate" and self.tied:
            raise fault(
                "vocabulary.tied", "the logits of two streams side by side are twice as wide as the embedding"
            )

    def _check_chunk(self) -> None:
        of_encoder = self.encoder and self.encoder.feed_forward
        for place, layer in (("", self.feed_forward), ("encoder.", of_encoder)):
            if layer and layer.kind == "mixture" and layer.load_balancing:
                message = (
                    f"load_balancing counts all tokens at once; set {place}feed_forward.load_balancing: 0"
                )
                raise fault("feed_forward_chunk", message)

    def _check_long_rotary(self, scaling: LongRotaryScaling) -> None:
        for name, factors in (
            ("short_factor", scaling.short_factor),
            ("long_factor", scaling.long_factor),
        ):
            if self.positions == "rotary" and len(factors) != self.rotary_width // 2:
                message = f"{len(factors)} numbers for {self.rotary_width // 2} pairs of a head"
                raise fault(f"rotary_scaling.{name}", message)
        if self.attention.kind == "lsh" or self.encoder:
            message = "longrope computes a long text anew, which excludes attention.kind: lsh and an encoder"
            raise fault("rotary_scaling.kind", message)

    def _check_axial(self) -> None:
        if self.axial is None:
            raise fault("axial", "missing; positions: axial needs shape and widths")
        if len(self.axial.shape) != len(self.axial.widths):
            raise fault("axial.widths", f"{len(self.axial.widths)} widths for {len(self.axial.shape)} axes")
        longest = max(self.max_positions, self.encoder.max_positions if self.encoder else 0)
        if (places := math.prod(self.axial.shape)) < longest:
            raise fault("axial.shape", f"{places} positions are fewer than max_positions {longest}")
        if sum(self.axial.widths) != self.d_model:
            raise fault("axial.widths", f"their sum {sum(self.axial.widths)} is not d_model {self.d_model}")

    @property
    def merged_width(self) -> int:
        """Width of what the last norm and the logits read."""
        return 2 * self.d_model if self.merge == "concatenate" else self.d_model

    @property
    def width_of_head(self) -> int:
        """Width of a head."""
        return self.head_width or self.d_model // self.heads

    @property
    def attention_width(self) -> int:
        """Width of all heads together."""
        return self.heads * self.width_of_head

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.attention.key_value_heads or self.heads

    @property
    def key_width(self) -> int:
        """Width of all heads of keys together."""
        return self.width_of_head * self.key_value_heads

    @property
    def attention_scale(self) -> float:
        """Factor on the scores of attention."""
        return self.attention.scale or max(1, self.width_of_head) ** -0.5

    def window(self, layer: int) -> int | None:
        """Positions that a token sees in layer `layer`; None: all before it."""
        sliding = self.attention.sliding_layers
        return self.attention.window if sliding is None or sliding[layer] else None

    def rotary_table(self, layer: int) -> Literal["none", "full", "sliding"]:
        """The rotary frequencies that layer `layer` uses."""
        if self.positions != "rotary" or (self.rotary_layers is not None and not self.rotary_layers[layer]):
            return "none"
        return "sliding" if self.sliding_rotary_base and self.window(layer) else "full"

    @property
    def query_rank(self) -> int | None:
        """Rank of the two layers that make queries; None where it is one layer."""
        return self.attention.query_key_rank

    @property
    def key_rank(self) -> int | None:
        """Rank of keys: it keeps as large a share of the weights as that of queries."""
        if self.query_rank is None:
            return None
        d_model, queries, keys = self.d_model, self.attention_width, self.key_width
        rank = self.query_rank * (d_model + queries) * keys / (queries * (d_model + keys))
        return min(max(1, round(rank)), d_model, keys)

    @property
    def rotary_width(self) -> int:
        """Elements of a head that rotary positions turn."""
        return int(self.width_of_head * self.rotary_fraction)

    @property
    def rotary_switch(self) -> int | None:
        """The longest text whose rotary frequencies are the short ones; None where they do not depend on its length."""
        if self.positions != "rotary" or self.rotary_scaling is None:
            return None
        scaling = self.rotary_scaling
        return scaling.original_positions if scaling.kind == "longrope" else None

    @property
    def rotary_attention_factor(self) -> float:
        """What the cosines and sines of rotary angles are multiplied by."""
        return getattr(self.rotary_scaling, "attention_factor", 1.0)

    def units_per_block(self, layer: int) -> int:
        """k of layer `layer`; only for feed-forward kinds that choose units in blocks."""
        assert self.feed_forward.kind in ("sparse", "selector", "precision")
        k = self.feed_forward.units_per_block
        return k if isinstance(k, int) else k[layer]

    @property
    def kept_fraction(self) -> float:
        """Share of the feed-forward units that a token computes in full, mean of all layers."""
        return sum(self.chosen_share(layer) for layer in range(self.layers)) / self.layers

    def chosen_share(self, layer: int) -> float:
        """Share of the units of layer `layer` that a token computes in full.

        What the choice `positive` takes is only known when it is counted; here it is every unit. Of `spark` it is the
        share that the threshold aims at.
        """
        feed_forward = self.feed_forward
        if feed_forward.kind == "dense" or getattr(feed_forward, "choice", "top") == "positive":
            return 1.0
        if feed_forward.kind == "mixture":
            return feed_forward.experts_per_token / feed_forward.experts
        if feed_forward.kind == "spark":
            return feed_forward.active_units / feed_forward.d_ff
        return self.units_per_block(layer) / feed_forward.block_size

    @property
    def beyond_llama(self) -> str | None:
        """A field that is set and that decoders shaped like Llama do not have, such as windows; None: there is none."""
        fields = {
            **{f"attention.{name}": given for name, given in self.attention.plain_softmax.items()},
            "attention.query_key_norm_over": self.attention.query_key_norm_over != "head",
            "norm_placement": self.norm_placement != "before",
            "residual_scale": self.residual_scale != 1,
            "logit_scale": self.logit_scale != 1,
            "logit_softcap": self.logit_softcap is not None,
            "rotary_layers": self.rotary_layers is not None,
        }
        return next((field for field, given in fields.items() if given), None)

    @property
    def unhashed(self) -> ModelSpec:
        """The same with full attention everywhere: which positions a token attends to is not a matter of weights."""
        full = {"kind": "full", "lsh": None}
        changed: dict[str, Any] = {"attention": self.attention.model_copy(update=full)}
        if self.encoder:
            attention = self.encoder.attention.model_copy(update=full)
            changed["encoder"] = self.encoder.model_copy(update={"attention": attention})
        return self.model_copy(update=changed)

    @property
    def tied(self) -> bool:
        """Whether the logits use the embedding's table."""
        return self.vocabulary.kind == "dense" and self.vocabulary.tied

    @property
    def head_module(self) -> str:
        """The module that holds the weights of dense logits."""
        return "model.embedding" if self.tied else "head"

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
            parts = [*first["loc"], *([first["ctx"]["field"]] if first["type"] == "fault" else [])]
            place = ".".join(str(part) for part in parts) or "model"
            raise ValueError(f"{place}: {first['msg']}") from error


DEFAULT = ModelSpec.model_validate(
    {
        "d_model": 256,
        "layers": 4,
        "heads": 4,
        "max_positions": 512,
        "feed_forward": {"kind": "sparse", "d_ff": 1024, "block_size": 32, "units_per_block": 2, "rank": 64},
        "vocabulary": {"kind": "dense", "size": 4096, "tied": True},
    }
)
"""The architecture of a configuration that says nothing: values for what a recipe must say, all else as in a recipe."""
