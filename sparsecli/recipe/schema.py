"""The schema of a recipe: one frozen model per block, one documented line per field.

A recipe is inert data. Unions are closed and discriminated by a literal field. No field names code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sparsecli.recipe.budget import parse_budget, parse_share
from sparsecli.recipe.data import CopyTask, DataSpec, ImagesSpec, Names, TextSpec
from sparsecli.recipe.training import NonNegative, Objective, Positive, RecoverySpec, TrainSpec
from sparsecli.spec.attention import AttentionSpec
from sparsecli.spec.base import Count, Depth, Probability, Size, Spec, Width, fault
from sparsecli.spec.feed_forward import (
    FeedForwardSpec,
    PrecisionFeedForwardSpec,
    SelectorFeedForwardSpec,
    SparseFeedForwardSpec,
)
from sparsecli.spec.model import EncoderSpec, ModelSpec, QuantizationSpec, SruSpec
from sparsecli.spec.vision import AnySpec, VisionSpec
from sparsecli.spec.vocabulary import VocabularySpec

Dtype = Literal["float32", "bfloat16", "int8"]
WeightDtype = Literal["float32", "bfloat16", "int8", "int4"]
Model = TypeVar("Model", bound=AnySpec)


def _listed(value: Any) -> Any:
    return [value] if type(value) is int else value


Sweep = Annotated[
    list[Size], Field(min_length=1), BeforeValidator(_listed, json_schema_input_type=Size | list[Size])
]
"""One number, or a list with one row for each number."""


# -- convert -------------------------------------------------------------------------------------------------


def _budget(text: str) -> str:
    parse_budget(text)
    return text


ConvertedFeedForward = Annotated[
    SparseFeedForwardSpec | SelectorFeedForwardSpec | PrecisionFeedForwardSpec, Field(discriminator="kind")
]
Method = Literal["rounding", "precision", "selector", "controller", "exact"]


class KeptAttention(Spec):
    """Attention is not changed."""

    kind: Literal["keep"] = "keep"


class LowRankAttention(Spec):
    """Queries and keys by low-rank products of two linear layers, fitted to the calibration text."""

    kind: Literal["low_rank"]
    rank: Width
    """Rank of the queries' product; the rank of the keys keeps the same share of their weights."""


class MultiplicativeAttention(Spec):
    """Queries, keys and values by multiplicative layers (paper section 3.2) with one module per head. The result is
    the start of a long distillation and not usable without it."""

    kind: Literal["multiplicative"]


ConvertedAttention = Annotated[
    KeptAttention | LowRankAttention | MultiplicativeAttention, Field(discriminator="kind")
]


class ConvertSpec(Spec):
    """Make a dense model faster: search within a budget, or convert to given layers."""

    model: str | None = None
    """The dense model: a run, a model folder, a Hugging Face folder or name on the hub, or a GGUF file; `--model` on
    the command line takes precedence."""
    budget: Annotated[str, AfterValidator(_budget)] | None = None
    """Search for the fastest model within `loss +2 %` or `perplexity +5 %` of the dense one on held-out text, or the
    best within `kept 1/4` of the units or `bytes 100 MB` a token."""
    feed_forward: ConvertedFeedForward | None = None
    """Without a budget: the layer that replaces every feed-forward layer; it must have the dense model's units."""
    attention: ConvertedAttention = KeptAttention()
    """The layer that replaces every attention layer; with a budget, with given feed-forward layers, or alone."""
    methods: Annotated[list[Method], Field(min_length=1)] | None = None
    """Methods that the search tries: `rounding` alone, or some of the others. By default `rounding`; with a budget of
    units, other attention, given bits, or a ReLU that skips units, every other method that fits the activation."""
    rank: Width = 128
    """Rank of the controllers that the search tries."""
    quantization: QuantizationSpec | None = None
    """Bits of attention and logits; by default a search chooses them, and without a search they do not change."""
    decode_dtype: Dtype = "int8"
    """Weight type of parts without bits of their own, when the result is measured and checked."""
    calibration_tokens: Size = 16384
    """Training tokens on which layers are fitted."""
    tuning_tokens: Size = 8192
    """Further training tokens, on which the search compares candidates."""
    controller_steps: Count = 200
    """Optimizer steps of each controller's fit."""
    refit: bool = True
    """Solve for W_down, bias and bypass, to compensate for the units that are left out."""
    distillation: RecoverySpec = RecoverySpec()
    """Recovery after the fit; a search that meets its budget without it skips it."""
    peers: list[Literal["llama.cpp"]] = Field(default=[])
    """Other programs to measure with the same dense model; one that is not installed is skipped with a warning."""

    @model_validator(mode="after")
    def _check(self) -> ConvertSpec:
        either = "a budget to search within, or feed_forward for given layers"
        if self.budget is not None and self.feed_forward is not None:
            raise fault(
                "budget",
                f"give only one: {either}; convert.feed_forward=null (or convert.budget=null) removes the other",
            )
        if (self.budget, self.feed_forward, self.attention.kind) == (None, None, "keep"):
            raise fault("budget", f"give {either}")
        return self


# -- generate ------------------------------------------------------------------------------------------------


class GenerateSpec(Spec):
    """Defaults of `generate`; every field is also a command-line option."""

    prompt: str | None = None
    """Text to continue."""
    max_new_tokens: Size = 128
    """Stop after this many tokens."""
    temperature: NonNegative = 0.8
    """Sampling temperature; 0 is greedy."""
    top_k: Count = 0
    """Sample among the k likeliest tokens; 0 means all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Sample among the likeliest tokens that hold this much probability."""
    min_p: Probability = 0.0
    """Drop tokens below this share of the highest probability."""
    repetition_penalty: Positive = 1.0
    """Values above 1 reduce repetition."""
    stop: list[str] = Field(default=[])
    """Texts that end the generation; they are not printed."""


# -- bench ---------------------------------------------------------------------------------------------------


class PaperFigures(Spec):
    """The figures of the paper's Table 1 for this row."""

    ms_per_token: Positive
    """Milliseconds a token."""
    ms_per_block: Positive | None = None
    """Milliseconds a decoder block, if the paper gives them."""


class VariantModel(Spec):
    """Blocks of the recipe's model that a variant replaces, each as a whole."""

    feed_forward: FeedForwardSpec | None = None
    """Replaces model.feed_forward."""
    attention: AttentionSpec | None = None
    """Replaces model.attention."""
    vocabulary: VocabularySpec | None = None
    """Replaces model.vocabulary."""
    encoder: EncoderSpec | None = None
    """Replaces model.encoder."""
    residual: Literal["single", "reversible"] | None = None
    """Replaces model.residual."""
    attention_layers: Literal[1, 2] | None = None
    """Replaces model.attention_layers."""
    sru: SruSpec | None = None
    """Replaces model.sru."""

    def apply(self, model: Model) -> Model:
        """`model` with these blocks. Raises ValidationError where they do not fit together."""
        blocks = {name: block for name, block in self if block is not None}
        return type(model)(**{**dict(model), **blocks})


class PrecisionChanges(Spec):
    """Weight types of parts that differ from the row's weight type; native backend only."""

    units: WeightDtype | None = None
    """Feed-forward matrices, dense or sparse; int4 is for dense ones."""
    projection: WeightDtype | None = None
    """Dense projections of attention."""
    controller: Dtype | None = None
    """Controllers, routers and predictors."""
    multiplicative: Dtype | None = None
    """D and E of multiplicative layers, including the sparse loss layer."""
    convolution: Literal["float32", "bfloat16"] | None = None
    """Convolution kernels."""
    head: WeightDtype | None = None
    """Dense logits."""
    embedding: Dtype | None = None
    """Tables of tokens and positions."""
    cache: Dtype | None = None
    """Keys and values."""
    head_rescoring: bool | None = None
    """Score the likeliest tokens again: those of an int8 head with bfloat16 weights, of an int4 head with int8."""


class VariantSpec(Spec):
    """One row of the table."""

    name: str
    """Row label."""
    group: Literal["dense", "sparse", "mixture"]
    """`--dense`, `--sparse` and `--mixture` select rows by their group."""
    model: VariantModel = VariantModel()
    """Differences from the recipe's model."""
    precision: PrecisionChanges = PrecisionChanges()
    """Differences from the row's weight type."""
    dtypes: Annotated[list[WeightDtype], Field(min_length=1)] | None = None
    """Weight types that this row is measured in; those of the bench by default."""
    measured_layers: Size | None = None
    """Build only this many blocks of this row, and scale their time to the whole model; the row is marked."""
    paper: PaperFigures | None = None
    """The paper's figures, printed beside ours."""


class BenchSpec(Spec):
    """Single-token decoding, with interleaved variants."""

    variants: Annotated[list[VariantSpec], Field(min_length=1)] | None = None
    """Rows of the table; the first of group `dense` is the baseline. Trained runs (`--model`) need none."""
    equal_sizes: bool = True
    """Expect the same number of parameters in all variants, within 1 %; the paper's own variants differ."""
    backends: Annotated[list[Literal["native", "torch"]], Field(min_length=1)] | None = None
    """Decode backends; by default native where it can be used, else torch."""
    peers: list[Literal["llama.cpp", "openvino", "ctranslate2", "torch.compile"]] = Field(default=[])
    """Other programs to measure beside ours; one that is not installed is skipped with a warning."""
    peer_variants: Names | None = None
    """Variants that peers without a model of their own run; by default the first dense and the last sparse one."""
    dtypes: Annotated[list[WeightDtype], Field(min_length=1)] = Field(default=["float32", "bfloat16", "int8"])
    """Weight types; int8 and int4 are for the native backend."""
    threads: Sweep | None = None
    """Threads of one step; by default one for each processor. A conversion measures with the most of them."""
    context: Sweep = Field(default=[64])
    """Tokens in the cache before the first measured one."""
    source: Size = 16
    """Tokens of the encoder's input, for models with an encoder; the encoder itself is not measured."""
    batch: Sweep = Field(default=[1])
    """Sequences that are decoded at once."""
    prefill: Size | None = None
    """Also measure the prefill of a prompt of this many tokens."""
    profile: bool = False
    """Time each part of the model in a decode step."""
    from_disk: bool = False
    """Keep the units of sparse layers in a file, and read the units of each token from disk, uncached."""
    rounds: Size = 5
    """Rounds; every variant has one turn in each."""
    tokens_per_round: Size = 4
    """Measured tokens in a turn."""
    warmup_tokens: Count = 2
    """Unmeasured tokens at the start of each turn."""
    measured_layers: Size | None = None
    """Build only this many blocks, and scale their time to the whole model; for models larger than memory. The rows
    are marked."""

    @model_validator(mode="after")
    def _check(self) -> BenchSpec:
        known = [variant.name for variant in self.variants or ()]
        for name in self.peer_variants or ():
            if name not in known:
                raise fault("peer_variants", f"{name!r} is not one of {', '.join(known)}")
        return self


# -- study ---------------------------------------------------------------------------------------------------


def _share(text: str) -> str:
    parse_share(text)
    return text


def _file_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 .+_-]{0,79}", text):
        raise ValueError(
            f"{text[:40]!r} is not a name; expected a letter or a digit, then at most 79 of these and ` .+_-`"
        )
    return text


class StudyModel(VariantModel):
    """Parts of the recipe's model that a variant of a study replaces."""

    d_model: Width | None = None
    """Replaces model.d_model."""
    layers: Depth | None = None
    """Replaces model.layers."""
    heads: Width | None = None
    """Replaces model.heads."""


class StudyTrain(Spec):
    """Settings of training that a variant replaces. Tokens, batches and learning rates are the same for all."""

    warmup_steps: Count | None = None
    """Replaces train.warmup_steps."""
    weight_decay: NonNegative | None = None
    """Replaces train.weight_decay."""
    max_grad_norm: NonNegative | None = None
    """Replaces train.max_grad_norm."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Replaces train.adam_beta2."""
    start_units_per_block: Size | None = None
    """Replaces train.start_units_per_block."""


def _part(text: str) -> str:
    if not 0 < parse_share(text) < 1:
        raise ValueError(f"expected more than 0 % and less than 100 %, got {text!r}")
    return text


Part = Annotated[str, AfterValidator(_part)]
"""A share between nothing and everything, such as `50 %`."""


class PruneSpec(Spec):
    """What is removed from a trained model: those with the smallest weights (`torch.nn.utils.prune`).

    Units and heads are removed as a whole, the same share of every layer: matrices become smaller. Single weights
    become zero, and matrices keep their size.
    """

    units: Part | None = None
    """Share of the feed-forward units: of `sparse` layers whole blocks, of `mixture` layers whole experts."""
    heads: Part | None = None
    """Share of the attention heads, with grouped queries of the groups; for dense projections."""
    weights: Part | None = None
    """Share of all weights of the layers' matrices, which become zero; the engine still reads them."""

    @model_validator(mode="after")
    def _check(self) -> PruneSpec:
        if self.units is None and self.heads is None and self.weights is None:
            raise fault("units", "missing; give a share of units, heads or weights")
        if self.weights is not None and (self.units or self.heads):
            raise fault("weights", "removes single weights, units and heads whole ones; use two variants")
        return self

    def apply(self, model: ModelSpec) -> ModelSpec:
        """The architecture of `model` after pruning. Raises a fault where it has no such units or heads."""
        changed: dict[str, Any] = {}
        if self.units:
            changed["feed_forward"] = self._fewer_units(model.feed_forward, parse_share(self.units))
        if self.heads:
            changed |= self._fewer_heads(model, parse_share(self.heads))
        return ModelSpec(**{**dict(model), **changed})

    @staticmethod
    def _fewer_units(layer: FeedForwardSpec, share: float) -> FeedForwardSpec:
        kept = round_kept(layer.d_ff // (size := granule(layer)), share) * size
        changes: dict[str, Any] = {"d_ff": kept}
        if layer.kind == "mixture":
            changes["experts"] = kept // size
        elif layer.kind == "spark":
            changes["active_units"] = max(1, round(layer.active_units * kept / layer.d_ff))
        return type(layer)(**{**dict(layer), **changes})

    @staticmethod
    def _fewer_heads(model: ModelSpec, share: float) -> dict[str, Any]:
        attention = model.attention
        if not attention.dense or attention.query_key_rank or model.residual != "single":
            raise fault("heads", "needs residual: single and dense projections of queries, keys and values")
        groups = attention.key_value_heads or model.heads
        kept = round_kept(groups, share)
        changed: dict[str, Any] = {
            "heads": model.heads // groups * kept,
            "head_width": model.width_of_head,
        }
        if attention.key_value_heads:
            changed["attention"] = attention.model_copy(update={"key_value_heads": kept})
        return changed


def round_kept(count: int, share: float) -> int:
    """How many of `count` are left when a `share` is removed; at least one."""
    return max(1, count - round(count * share))


def granule(layer: FeedForwardSpec) -> int:
    """Units of a feed-forward layer that are removed together. Raises a fault for quantized layers."""
    if layer.kind in ("selector", "precision"):
        raise fault("units", f"{layer.kind} layers have quantized copies of their units")
    if layer.kind == "mixture":
        return layer.d_ff // layer.experts
    return layer.block_size if layer.kind == "sparse" else 1


class QuantizeSpec(Spec):
    """Weights of a trained model in fewer bits, without training."""

    bits: Literal[4, 8]
    """Bits of a weight, without its share of scales."""
    rounding: Literal["second_order", "nearest"] = "second_order"
    """`second_order`: every linear layer in a type of GGUF (Q8_0; Q4_K or IQ4_NL), rounded so that its products with
    the training text change least; for dense feed-forward layers. `nearest`: the engine's own int8 or int4, where
    units of other feed-forward layers are int8."""


class StudyVariantSpec(Spec):
    """One model of a study, and one row of its table."""

    name: Annotated[str, AfterValidator(_file_name)]
    """Row label: letters, digits, spaces and `. + _ -`."""
    model: StudyModel = StudyModel()
    """Differences from the recipe's model."""
    train: StudyTrain = StudyTrain()
    """Differences from the recipe's training."""
    learning_rates: Annotated[list[Positive], Field(min_length=1)] | None = None
    """Replaces study.learning_rates."""
    init_from: str | None = None
    """Another variant, which is trained first; each seed starts from the weights of the same seed's model."""
    prune: PruneSpec | None = None
    """What is removed from `init_from` before training goes on."""
    quantize: QuantizeSpec | None = None
    """The weights of `init_from` in fewer bits; nothing is trained."""
    tokens: Size | None = None
    """Training tokens after `init_from`; by default a quarter of a whole run."""
    distil_from: str | None = None
    """Another variant, which is trained first and teaches this one; each seed learns from the same seed's model."""
    distillation: Objective = Objective()
    """The objective of `distil_from`."""

    @property
    def folder(self) -> str:
        """Its name as the name of a folder."""
        return self.name.replace(" ", "-")

    @property
    def sources(self) -> dict[str, str]:
        """The variants that are trained before this one, by the field that names them."""
        named = {"init_from": self.init_from, "distil_from": self.distil_from}
        return {field: name for field, name in named.items() if name is not None}

    @model_validator(mode="after")
    def _check(self) -> StudyVariantSpec:
        for field in ("prune", "quantize", "tokens"):
            if self.init_from is None and getattr(self, field) is not None:
                raise fault(field, "needs init_from, the variant whose model it changes")
        if self.init_from is not None and self.model != StudyModel():
            raise fault("model", "the architecture is that of init_from; leave it out")
        for field in ("prune", "distil_from", "tokens", "learning_rates"):
            if self.quantize is not None and getattr(self, field) is not None:
                raise fault(
                    field, "quantize trains nothing; use two variants, one that starts from the other"
                )
        return self


class StudySpec(Spec):
    """Trains variants of the recipe's model on the same tokens and compares their loss, size and speed."""

    variants: Annotated[list[StudyVariantSpec], Field(min_length=1)]
    """The models; the first is the one that others are compared with."""
    learning_rates: Annotated[list[Positive], Field(min_length=1)]
    """Peak learning rates that every variant is tried with; the loss on tuning text chooses one for each."""
    seeds: Annotated[list[Count], Field(min_length=1)] = Field(default=[0])
    """Seeds of the weights and of the token order. The first one tries the learning rates."""
    trial_tokens: Size | None = None
    """Tokens (or images) of a trial of a learning rate; by default those of a whole run, and the best trial is the
    first run."""
    tuning_tokens: Size = 65536
    """Tokens of tuning text, which follow `data.held_out_tokens` in the held-out documents. Tuning images are a share
    of all, `data.tuning_fraction`."""
    equal_parameters: Annotated[str, AfterValidator(_share)] | None = None
    """Refuse variants whose numbers of parameters differ by more than this share, such as `2 %`."""

    @model_validator(mode="after")
    def _check(self) -> StudySpec:
        folders = [variant.folder for variant in self.variants]
        for index, variant in enumerate(self.variants):
            if variant.folder in folders[:index]:
                raise fault(f"variants.{index}.name", f"{variant.name!r} is the name of two variants")
        for index, variant in enumerate(self.variants):
            for field, name in variant.sources.items():
                self._check_source(index, variant, field)
                if any(each.name == name and each.quantize for each in self.variants):
                    raise fault(
                        f"variants.{index}.{field}",
                        f"{name!r} has quantized weights, which nothing learns from",
                    )
        rates: dict[str, Sequence[float]] = {"learning_rates": self.learning_rates, "seeds": self.seeds}
        for index, variant in enumerate(self.variants):
            rates[f"variants.{index}.learning_rates"] = variant.learning_rates or []
        for name, values in rates.items():
            if twice := [value for index, value in enumerate(values) if value in values[:index]]:
                raise fault(name, f"{twice[0]:g} is given twice")
        return self

    def _check_source(self, index: int, variant: StudyVariantSpec, field: str) -> None:
        """Raise a fault unless the variants that `variant` needs, and so on, end at some that need no other."""
        sources = {each.name: list(each.sources.values()) for each in self.variants}
        seen, left = set[str](), [variant.sources[field]]
        while left:
            name = left.pop()
            if name not in sources:
                if name == variant.sources[field]:
                    known = ", ".join(sources)
                    raise fault(f"variants.{index}.{field}", f"{name!r} is not one of {known}")
                continue
            if name == variant.name:
                verb = "learn" if field == "distil_from" else "start"
                raise fault(f"variants.{index}.{field}", f"{variant.name!r} would {verb} from itself")
            left += [] if name in seen else sources[name]
            seen.add(name)

    def models(self, model: AnySpec) -> dict[str, AnySpec]:
        """The architecture of every variant of a recipe's `model`, which has been checked."""
        return {variant.name: self.model_of(variant, model) for variant in self.variants}

    def model_of(self, variant: StudyVariantSpec, model: AnySpec) -> AnySpec:
        """The architecture of a variant.

        Raises:
            ValidationError, PydanticCustomError: blocks do not fit together, or cannot be pruned.
        """
        first, *changed = self.chain(variant)
        found = first.model.apply(model)
        for each in changed:
            if each.prune:
                assert isinstance(found, ModelSpec)
                found = each.prune.apply(found)
        return found

    def chain(self, variant: StudyVariantSpec) -> list[StudyVariantSpec]:
        """The variant that is trained from random weights, those that start from it, and last this one."""
        if variant.init_from is None:
            return [variant]
        start = next(each for each in self.variants if each.name == variant.init_from)
        return [*self.chain(start), variant]


# -- the model ------------------------------------------------------------------------------------------------


def _kind(value: Any) -> str:
    """The tag of a model: `vision`, or `text` for what has no kind."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "text" if kind is None else str(kind)


AnyModel = Annotated[
    Annotated[ModelSpec, Tag("text")] | Annotated[VisionSpec, Tag("vision")],
    Discriminator(_kind),
]
"""A model of text, which names no kind, or `kind: vision`."""


# -- the whole -----------------------------------------------------------------------------------------------


class Recipe(Spec):
    """A recipe: the model, its text, and the settings of training, conversion, generation and benchmark."""

    description: str = ""
    """One line, shown by `recipes ls`."""
    output: str | None = None
    """Run directory; `runs/<name of the recipe>` by default."""
    seed: Count = 0
    """Seed of the weights, the data order, noise and sampling."""
    model: AnyModel | None = None
    """The architecture: of a model of text, or with `kind: vision` of images."""
    data: DataSpec | None = None
    """The text, or the images."""
    train: TrainSpec | None = None
    """How to train."""
    convert: ConvertSpec | None = None
    """How to make a dense model sparse."""
    generate: GenerateSpec = GenerateSpec()
    """Defaults of `generate`."""
    bench: BenchSpec | None = None
    """What to measure."""
    study: StudySpec | None = None
    """Variants of the model to train and to compare."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if isinstance(self.model, VisionSpec) or isinstance(self.data, ImagesSpec):
            self._check_vision()
        elif self.data:
            self._check_data(self.data, self.model)
        if self.study:
            self._check_study(self.study)
        if self.model:
            self._check_variants(self.model)
        return self

    def _check_vision(self) -> None:
        """Raise a fault unless model and data are both of images, and nothing in the recipe is for text alone."""
        if self.model and not isinstance(self.model, VisionSpec):
            raise fault("model.kind", "missing; images need a model of kind: vision")
        if self.data and not isinstance(self.data, ImagesSpec):
            raise fault("data.source", "a model of images needs images: digits or images")
        if self.convert:
            raise fault("convert", "a conversion needs a model of text")
        for name in ("init_from", "distillation"):
            if self.train and getattr(self.train, name) is not None:
                raise fault(f"train.{name}", "is for models of text")
        for index, variant in enumerate(self.study.variants if self.study else ()):
            for name in ("distil_from", "init_from"):
                if getattr(variant, name):
                    raise fault(f"study.variants.{index}.{name}", "is for models of text")

    def _check_variants(self, model: AnySpec) -> None:
        """Raise a fault for a variant of `bench` or `study` that does not fit the recipe's model."""
        for block in ("bench", "study"):
            for index, variant in enumerate(getattr(getattr(self, block), "variants", None) or ()):
                if getattr(variant, "init_from", None):
                    continue
                for name, value in variant.model:
                    if value is not None and name not in type(model).model_fields:
                        raise fault(f"{block}.variants.{index}.model.{name}", "is for models of text")
                try:
                    variant.model.apply(model)
                except ValidationError as error:
                    context = error.errors()[0]["ctx"]
                    raise fault(
                        f"{block}.variants.{index}.model",
                        f"does not fit the recipe's model: {context['field']} {context['message']}",
                    ) from None
        if study := self.study:
            places = {f"study.variants.{index}": each for index, each in enumerate(study.variants)}
            for place, variant in sorted(places.items(), key=lambda pair: len(study.chain(pair[1]))):
                if variant.init_from:
                    self._check_changed(place, variant, study.model_of, model)

    @staticmethod
    def _check_changed(
        place: str,
        variant: StudyVariantSpec,
        model_of: Callable[[StudyVariantSpec, AnySpec], AnySpec],
        model: AnySpec,
    ) -> None:
        """Raise a fault for a variant that cannot be made of the one that it starts from."""
        try:
            found = model_of(variant, model)
        except PydanticCustomError as error:
            context = error.context or {}
            message = f"cannot be done to {variant.init_from}: {context['field']} {context['message']}"
            raise fault(f"{place}.prune", message) from None
        except ValidationError as error:
            context = error.errors()[0].get("ctx", {})
            words = f"{context.get('field', '')} {context.get('message', error.errors()[0]['msg'])}".strip()
            raise fault(f"{place}.prune", f"cannot be done to {variant.init_from}: {words}") from None
        assert isinstance(found, ModelSpec)
        dense = found.feed_forward.kind == "dense" and found.residual == "single" and not found.encoder
        if variant.quantize and variant.quantize.rounding == "second_order" and not dense:
            message = "second_order is for decoders with dense feed-forward layers; nearest is for all"
            raise fault(f"{place}.quantize.rounding", message)

    def _check_study(self, study: StudySpec) -> None:
        """Raise a fault unless the text and the training are those that a study compares variants on."""
        if isinstance(self.data, ImagesSpec):
            return
        if self.data and (self.data.pair_lengths or isinstance(self.data, CopyTask)):
            raise fault("data", "a study needs running text, not pairs")
        if self.data and not isinstance(self.data, CopyTask) and self.data.held_out_tokens is None:
            raise fault("data.held_out_tokens", "missing; the tuning text of a study follows these tokens")
        for name in ("init_from", "distillation"):
            if self.train and getattr(self.train, name) is not None:
                raise fault(
                    f"train.{name}",
                    "a study trains from random weights; study.variants.N.distil_from names a teacher",
                )

    def _check_data(self, data: TextSpec | CopyTask, model: ModelSpec | None) -> None:
        if self.convert and data.pair_lengths:
            raise fault("data", "a conversion needs running text, not pairs")
        if self.train and self.train.distillation and data.pair_lengths:
            raise fault("train.distillation", "distillation from a teacher needs running text, not pairs")
        starts = self.convert or (self.train and self.train.init_from)
        if not isinstance(data, CopyTask) and data.tokenizer is None and not starts:
            raise fault(
                "data.tokenizer", "missing; only train.init_from and convert take the tokenizer from a model"
            )
        if model:
            self._check_lengths(data, model)
            self._check_vocabulary(data, model.vocabulary.size)

    @staticmethod
    def _check_lengths(data: TextSpec | CopyTask, model: ModelSpec) -> None:
        """Raise a fault unless text fits a model without an encoder, or pairs one with an encoder."""
        if isinstance(data, CopyTask):
            source, target = "data.length", "data.length"
        else:
            source, target = "data.pairs.source_length", "data.pairs.target_length"
            if data.pairs is None:
                if model.encoder:
                    raise fault("data.pairs", "missing; a model with an encoder is trained on pairs")
                if (length := data.sequence_length) > model.max_positions:
                    message = f"{length} is longer than model.max_positions {model.max_positions}"
                    raise fault("data.sequence_length", message)
                return
        if model.encoder is None:
            raise fault("model.encoder", "missing; pairs need a model with an encoder")
        assert data.pair_lengths
        for field, length, name, positions in (
            (source, data.pair_lengths[0], "model.encoder.max_positions", model.encoder.max_positions),
            (target, data.pair_lengths[1], "model.max_positions", model.max_positions),
        ):
            if length > positions:
                raise fault(field, f"{length} tokens with the end token are more than {name} {positions}")

    @staticmethod
    def _check_vocabulary(data: TextSpec | CopyTask, size: int) -> None:
        if isinstance(data, CopyTask):
            if data.symbols + 2 > size:
                message = f"{data.symbols} symbols, padding and the end token do not fit model.vocabulary.size {size}"
                raise fault("data.symbols", message)
        elif data.tokenizer and data.tokenizer.kind == "bpe" and data.tokenizer.vocabulary_size > size:
            tokens = data.tokenizer.vocabulary_size
            message = f"{tokens} tokens do not fit model.vocabulary.size {size}"
            raise fault("data.tokenizer.vocabulary_size", message)
