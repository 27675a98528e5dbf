"""The candidates of a conversion: the given layers, or every combination that a search considers; and their preview."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from sparsecli import console
from sparsecli.bench.bytes_read import bytes_per_token, weights_per_token
from sparsecli.console import RecipeError
from sparsecli.convert.linear_layers import linear_layers, with_types
from sparsecli.convert.methods import METHODS, method_of
from sparsecli.convert.methods.base import BLOCK_SIZE
from sparsecli.convert.report import csv_lines, markdown_table
from sparsecli.decode.packed.precision import Precision
from sparsecli.recipe.budget import parse_budget
from sparsecli.recipe.data import TextSpec
from sparsecli.recipe.schema import ConvertedAttention, ConvertedFeedForward, ConvertSpec
from sparsecli.spec.attention import AttentionSpec
from sparsecli.spec.feed_forward import DenseFeedForwardSpec
from sparsecli.spec.model import ModelSpec, QuantizationSpec
from sparsecli.spec.vocabulary import DenseVocabularySpec

RECOVERED = 0.5
"""Share of a method's loss increase that refit and some ten thousand tokens of distillation recover at least: see
docs/conversion.md."""
BITS: Literal[4] = 4
ROUNDING = "rounding"
"""The method that rounds every linear layer and changes no layer's kind: see weight_types.py."""


@dataclass(frozen=True)
class ConversionCandidate:
    """A converted model that could be built.

    Attributes:
        method: the method for feed-forward layers; None leaves them dense.
        bytes_per_token: weights that a decoded token reads.
        predicted_increase: of the loss over the dense model's in nats/token, the sum of what its parts add on tuning
            text; None before they are measured.
        recovers: whether refit and distillation will recover part of that.
    """

    spec: ModelSpec
    method: str | None
    bytes_per_token: int
    predicted_increase: float | None = None
    recovers: bool = False

    @property
    def name(self) -> str:
        """A short name: the method, active units of a block, another attention, and quantized parts."""
        feed_forward, quantization = self.spec.feed_forward, self.spec.quantization
        if self.method == ROUNDING:
            bits = 8 * self.bytes_per_token / weights_per_token(self.spec)
            return f"{ROUNDING}, {bits:.2f} bits a weight"
        attention = self.spec.attention
        words = ["dense" if self.method is None else self.method]
        if feed_forward.kind in ("sparse", "selector", "precision") and self.method != "exact":
            k = {self.spec.units_per_block(layer) for layer in range(self.spec.layers)}
            words.append(f"{min(k)}/{feed_forward.block_size}" if len(k) == 1 else "by layer")
        if attention.query_key_rank:
            words.append(f"attention rank {attention.query_key_rank}")
        elif attention.projection != "dense":
            words.append(f"attention {attention.projection}")
        words += [
            f"{part} {bits} bit"
            for part, bits in (("attention", quantization.projection), ("logits", quantization.head))
            if bits
        ]
        return ", ".join(words)

    @property
    def tuning_key(self) -> str:
        """The name under which the work folder keeps its losses on tuning text."""
        return f"{self.name} on tuning text"

    def after_recovery(self, increase: float) -> float:
        """The expected part of an increase of the loss (nats/token) that refit and distillation leave."""
        return increase * (1 - RECOVERED) if self.recovers else increase

    @property
    def expected_increase(self) -> float:
        """The predicted increase after recovery. Only once `predicted_increase` is known."""
        assert self.predicted_increase is not None
        return self.after_recovery(self.predicted_increase)


# -- from the recipe -----------------------------------------------------------------------------------------


def list_candidates(dense: ModelSpec, convert: ConvertSpec, file: str) -> list[ConversionCandidate]:
    """The one candidate with the recipe's layers, or all that a search considers.

    Args:
        file: the recipe's, for messages.
    Raises:
        RecipeError: the model is not dense, or no candidate fits it.
    """
    layer = _check_dense(dense, convert, file)
    if rounds(convert, dense):
        return _uniform_types(dense, convert.decode_dtype, file)
    dense = _replace_attention(dense, convert, file)
    if convert.quantization is not None:
        try:
            with_quantization(dense, convert.quantization)
        except ValueError as error:
            raise RecipeError(f"{file}: convert.quantization: {_first_message(error)}") from error
    if convert.budget is None:
        spec = converted_spec(dense, convert.feed_forward, convert.quantization or QuantizationSpec(), file)
        size = weight_bytes_per_token(spec, convert.decode_dtype)
        return [ConversionCandidate(spec, method_of(spec.feed_forward), size)]
    methods = _applicable_methods(layer, convert, file)
    distils = convert.distillation.tokens > 0
    return search_space(dense, methods, convert.rank, convert.decode_dtype, convert.quantization, distils)


def rounds(convert: ConvertSpec, dense: ModelSpec) -> bool:
    """Whether the method is `rounding`, as asked or by default."""
    if convert.budget is None or convert.attention.kind != "keep" or convert.quantization is not None:
        return False
    layer = dense.feed_forward
    skips = isinstance(layer, DenseFeedForwardSpec) and METHODS["exact"].fits(layer)
    if convert.methods is None:
        return not skips and parse_budget(convert.budget).kind != "kept"
    return convert.methods == [ROUNDING] and parse_budget(convert.budget).kind != "kept"


def _uniform_types(dense: ModelSpec, dtype: str, file: str) -> list[ConversionCandidate]:
    """The smallest and the largest model that rounding may give, with those between that have one type.

    Raises:
        RecipeError: no type suits the model's widths, or all weights have the smallest already.
    """
    layers = linear_layers(dense)
    found = []
    for level in range(max(len(each.types) for each in layers)):
        chosen = {each.name: each.types[min(level, len(each.types) - 1)] for each in layers if each.types}
        head, candidates = layers[-1], None
        of_head = head.bytes(chosen.get(head.name, head.exact))
        if head.candidates and head.bytes_with_sketch(head.candidates[0]) < of_head:
            chosen[head.name], candidates = head.exact, head.candidates[0]
        spec = with_types(dense, chosen, candidates)
        found.append(ConversionCandidate(spec, ROUNDING, weight_bytes_per_token(spec, dtype)))
    if not found:
        raise RecipeError(
            f"{file}: convert.methods: {ROUNDING} has no smaller type for any layer of this model; its rows must be "
            f"multiples of 32 weights, and its weights more than 4 bits"
        )
    return found


def _check_dense(dense: ModelSpec, convert: ConvertSpec, file: str) -> DenseFeedForwardSpec:
    """The feed-forward layer of a model that can be converted. Raises `RecipeError` for any other model."""
    where = f"{file}: convert.model"
    if dense.encoder or dense.residual == "reversible":
        what = "has an encoder" if dense.encoder else "is reversible"
        raise RecipeError(f"{where}: it {what}; only decoders with one residual stream can be converted")
    layer = dense.feed_forward
    if not isinstance(layer, DenseFeedForwardSpec):
        raise RecipeError(f"{where}: its feed-forward layers are {layer.kind} already, not dense")
    if dense.quantization.gguf and not rounds(convert, dense):
        raise RecipeError(
            f"{where}: its weights keep a GGUF file's codes, which only `methods: [{ROUNDING}]` can convert; name the "
            f"GGUF file itself, or import it with --dtype float32"
        )
    if dense.quantization.model_copy(update={"gguf": {}}) != QuantizationSpec():
        raise RecipeError(f"{where}: is quantized already")
    if layer.gated and layer.bias:
        raise RecipeError(f"{where}: gated feed-forward layers with biases cannot be converted yet")
    attention = dense.attention
    is_dense = (attention.projection, attention.output) == ("dense", "dense") and not attention.query_key_rank
    if convert.attention.kind != "keep" and not is_dense:
        raise RecipeError(f"{file}: convert.attention: the model's attention is not made of dense layers")
    return layer


def _applicable_methods(layer: DenseFeedForwardSpec, convert: ConvertSpec, file: str) -> list[str]:
    """The methods that a search tries. Raises `RecipeError` where none fits, or one of the recipe's does not."""
    fitting = [name for name, method in METHODS.items() if method.fits(layer)]
    if not fitting:
        raise RecipeError(
            f"{file}: convert.model: {layer.d_ff} units are not a multiple of {BLOCK_SIZE}, which a search needs"
        )
    methods = list(convert.methods or fitting)
    if ROUNDING in methods:
        raise RecipeError(
            f"{file}: convert.methods: {ROUNDING} stands alone, with a budget of loss, perplexity or bytes; it keeps "
            f"attention's kind and chooses the bits itself"
        )
    if unfit := [name for name in methods if name not in fitting]:
        raise RecipeError(
            f"{file}: convert.methods: {unfit[0]} needs a ReLU without a gate; this model allows {', '.join(fitting)}"
        )
    return methods


def _replace_attention(dense: ModelSpec, convert: ConvertSpec, file: str) -> ModelSpec:
    """`dense` with the attention of the recipe. Raises `RecipeError` where this model cannot have it."""
    try:
        return with_attention(dense, convert.attention)
    except ValueError as error:
        raise RecipeError(f"{file}: convert.attention: {_first_message(error)}") from error


def converted_spec(
    dense: ModelSpec, layer: ConvertedFeedForward | None, quantization: QuantizationSpec, file: str
) -> ModelSpec:
    """The architecture after a conversion into a given layer; None leaves feed-forward layers dense.

    Raises:
        RecipeError: `layer` differs from the dense one, so that its units cannot be copied.
    """
    where, original = f"{file}: convert.feed_forward", dense.feed_forward
    assert isinstance(original, DenseFeedForwardSpec)
    if layer is None:
        return with_quantization(dense, quantization)
    if layer.d_ff != original.d_ff:
        raise RecipeError(f"{where}.d_ff: {layer.d_ff}, but the dense model has {original.d_ff} units")
    for name in ("activation", "gated"):
        if getattr(layer, name) != getattr(original, name):
            expected = getattr(original, name)
            raise RecipeError(f"{where}.{name}: {getattr(layer, name)}, but the dense model has {expected}")
    if getattr(layer, "rank", 0) > dense.d_model:
        raise RecipeError(f"{where}.rank: {layer.rank} is more than the model's width {dense.d_model}")  # type: ignore[union-attr]
    changed = {"feed_forward": layer.model_copy(update={"unit_bias": original.bias})}
    try:
        return ModelSpec(**{**dict(with_quantization(dense, quantization)), **changed})
    except ValueError as error:
        raise RecipeError(f"{where}: {_first_message(error)}") from error


def _first_message(error: ValueError) -> str:
    return error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)


# -- architectures -------------------------------------------------------------------------------------------


def search_space(
    dense: ModelSpec,
    methods: Sequence[str],
    rank: int,
    dtype: str,
    quantization: QuantizationSpec | None,
    distils: bool,
) -> list[ConversionCandidate]:
    """Every combination of a method, active units of a block, and bits of attention and logits.

    Args:
        rank: of controllers.
        dtype: weight type of parts that have no bits of their own.
        quantization: the bits of attention and logits, where they are given.
        distils: whether a distillation will follow.
    """
    layer = dense.feed_forward
    assert isinstance(layer, DenseFeedForwardSpec)
    found = []
    for bits in [quantization] if quantization else _quantization_options(dense):
        base = with_quantization(dense, bits)
        for name in methods:
            method = METHODS[name]
            for k in method.active_units:
                spec = base.model_copy(update={"feed_forward": method.spec(layer, dense.d_model, k, rank)})
                size = weight_bytes_per_token(spec, dtype)
                found.append(ConversionCandidate(spec, name, size, recovers=method.recovers and distils))
    return found


def with_attention(spec: ModelSpec, attention: ConvertedAttention) -> ModelSpec:
    """`spec`, whose projections are dense, with another attention.

    Raises:
        ValueError: pydantic's, where this model cannot have it.
    """
    if attention.kind == "keep":
        return spec
    fields = spec.attention.model_dump(exclude_none=True)
    if attention.kind == "low_rank":
        fields["query_key_rank"] = attention.rank
    else:  # as many heads of keys as of queries, and the output as it was
        fields |= {"projection": "multiplicative", "output_projection": spec.attention.output}
        fields.pop("key_value_heads", None)
    return ModelSpec(**{**dict(spec), "attention": AttentionSpec(**fields)})


def with_quantization(spec: ModelSpec, quantization: QuantizationSpec) -> ModelSpec:
    """`spec` with these bits of attention and logits; quantized logits are not tied to the embedding.

    Raises:
        ValueError: the model has no dense layers there.
    """
    vocabulary = spec.vocabulary
    if quantization.head and isinstance(vocabulary, DenseVocabularySpec):
        vocabulary = vocabulary.model_copy(update={"tied": False})
    return ModelSpec(**{**dict(spec), "quantization": quantization, "vocabulary": vocabulary})


def _quantization_options(dense: ModelSpec) -> list[QuantizationSpec]:
    found = [QuantizationSpec()]
    if (dense.attention.projection, dense.attention.output) == ("dense", "dense"):
        found.append(QuantizationSpec(projection=BITS))
    if dense.vocabulary.kind == "dense":
        found += [quantization.model_copy(update={"head": BITS}) for quantization in found]
    return found


def weight_bytes_per_token(spec: ModelSpec, dtype: str) -> int:
    """Bytes of weights that a decoded token reads, with parts that have no bits of their own in `dtype`."""
    return bytes_per_token(spec, Precision.of(dtype), context=0)


# -- preview -------------------------------------------------------------------------------------------------

PLAN_COLUMNS = ["plan", ""]
PREVIEW_COLUMNS = ["candidate", "active units", "MB/token", "speedup bound over bfloat16"]


@dataclass(frozen=True)
class ConversionPreview:
    """The plan that a dry run prints.

    Attributes:
        source: the dense model as the user named it.
        dense_bytes: weights that a decoded token of it reads in bfloat16.
        output: folder of the result.
    """

    source: str
    dense_bytes: int
    convert: ConvertSpec
    data: TextSpec
    output: str
    candidates: list[ConversionCandidate]

    def facts(self) -> list[tuple[str, str]]:
        """The plan as labels and texts."""
        convert = self.convert
        text = f"{convert.calibration_tokens:,} tokens for calibration, {convert.tuning_tokens:,} for tuning"
        files = f"recipe.yaml, run.json, report.json, report.md, frontier.png, model/ in {self.output}"
        return [
            ("dense model", f"{self.source}, {self.dense_bytes / 1e6:.1f} MB/token in bfloat16"),
            ("budget", convert.budget or "none: the layers are given"),
            ("weight type of other parts", convert.decode_dtype),
            ("training text", text),
            ("held-out text", _held_out_size(self.data)),
            ("distillation", self._distillation()),
            ("files", files),
        ]

    def _distillation(self) -> str:
        tokens = self.convert.distillation.tokens
        if not tokens:
            return "none"
        return f"{tokens:,} tokens" + (
            ", skipped if the budget is met without" if self.convert.budget else ""
        )

    def candidate_rows(self) -> list[tuple[str, ...]]:
        """Name, share of active units, megabytes per token, and the speedup that these bytes allow."""
        return [
            (
                each.name,
                f"{each.spec.kept_fraction:.1%}",
                f"{each.bytes_per_token / 1e6:.1f}",
                f"{self.dense_bytes / each.bytes_per_token:.2f}x",
            )
            for each in self.candidates
        ]

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON data; `schema` changes when a field changes its meaning."""
        return {
            "schema": 1,
            "source": self.source,
            "output": self.output,
            "dense_bytes_per_token": self.dense_bytes,
            "convert": self.convert.model_dump(mode="json"),
            "data": self.data.model_dump(mode="json"),
            "candidates": [
                {
                    "name": each.name,
                    "kept_fraction": each.spec.kept_fraction,
                    "bytes_per_token": each.bytes_per_token,
                }
                for each in self.candidates
            ],
        }

    def show(self, format: str) -> None:
        """Print the plan to stdout as table, json, markdown, or csv (the candidates alone)."""
        if format == "json":
            console.json_out(self.as_json())
        elif format == "markdown":
            lines = [*markdown_table(PLAN_COLUMNS, self.facts()), ""]
            console.out("\n".join([*lines, *markdown_table(PREVIEW_COLUMNS, self.candidate_rows())]))
        elif format == "csv":
            rows = [(each.name, each.spec.kept_fraction, each.bytes_per_token) for each in self.candidates]
            console.out(csv_lines(["candidate", "kept_fraction", "bytes_per_token"], rows), end="")
        else:
            console.print_table(PLAN_COLUMNS, self.facts())
            console.print_table(PREVIEW_COLUMNS, self.candidate_rows())


def _held_out_size(data: TextSpec) -> str:
    """The size of the held-out text, as far as the recipe determines it."""
    limit = "" if data.held_out_tokens is None else f"at most {data.held_out_tokens:,} tokens of "
    source = getattr(data, "held_out_paths", None) or getattr(data, "held_out_split", None)
    if source:
        return limit + (source if isinstance(source, str) else ", ".join(source))
    return f"{limit}{data.held_out_fraction:.1%} of the documents"
