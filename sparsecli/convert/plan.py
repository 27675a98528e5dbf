"""What a search may end at: candidates with what they read, and, once measured, what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sparsecli.bench.bytes_read import bytes_per_token
from sparsecli.console import Mismatch
from sparsecli.convert.methods import METHODS
from sparsecli.decode.packed.precision import Precision
from sparsecli.recipe.budget import Budget
from sparsecli.recipe.schema import ConvertedAttention
from sparsecli.spec.attention import AttentionSpec
from sparsecli.spec.feed_forward import DenseFeedForwardSpec
from sparsecli.spec.model import ModelSpec, QuantizationSpec
from sparsecli.spec.vocabulary import DenseVocabularySpec

RECOVERED = 0.5
"""Share of a method's loss that refit and some ten thousand tokens of distillation make up for, or more: see
docs/conversion.md."""
MARGIN = 0.9
"""Share of a loss budget that predictions may use: the losses of parts only nearly add up."""
BITS: Literal[4] = 4


@dataclass(frozen=True)
class Candidate:
    """A converted model that could be built.

    Attributes:
        method: what feed-forward layers become; None leaves them dense.
        bytes_per_token: weights that a decoded token reads.
        change: nats a token over the dense model's, predicted from parts measured on tuning text; None before.
        recovers: whether refit and distillation will make up for part of that.
    """

    spec: ModelSpec
    method: str | None
    bytes_per_token: int
    change: float | None = None
    recovers: bool = False

    @property
    def name(self) -> str:
        """A short name: the method, units of a block, another attention, and parts in few bits."""
        feed_forward, quantization = self.spec.feed_forward, self.spec.quantization
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
    def tuning(self) -> str:
        """What its losses on tuning text are remembered under."""
        return f"{self.name} on tuning text"

    @property
    def expected(self) -> float:
        """The change after recovery, as far as it can be told beforehand. Only once `change` is known."""
        assert self.change is not None
        return self.change * (1 - RECOVERED) if self.recovers else self.change


def candidates(
    dense: ModelSpec,
    methods: Sequence[str],
    rank: int,
    dtype: str,
    quantization: QuantizationSpec | None,
    distils: bool,
) -> list[Candidate]:
    """Every combination of a method, units of a block, and bits of attention and logits.

    Args:
        quantization: those bits, where they are given.
        dtype: weight type of what has no bits of its own.
        distils: whether there will be a distillation.
    """
    layer = dense.feed_forward
    assert isinstance(layer, DenseFeedForwardSpec)
    found = []
    for bits in [quantization] if quantization else _quantizations(dense):
        base = with_quantization(dense, bits)
        for name in methods:
            method = METHODS[name]
            for k in method.units:
                spec = base.model_copy(update={"feed_forward": method.spec(layer, dense.d_model, k, rank)})
                recovers = method.recovers and distils
                found.append(Candidate(spec, name, read_bytes(spec, dtype), recovers=recovers))
    return found


def with_attention(spec: ModelSpec, wanted: ConvertedAttention) -> ModelSpec:
    """`spec`, whose projections are dense, with another attention.

    Raises:
        ValueError: pydantic's, where this model cannot have it.
    """
    if wanted.kind == "keep":
        return spec
    attention = spec.attention.model_dump(exclude_none=True)
    if wanted.kind == "low_rank":
        attention["query_key_rank"] = wanted.rank
    else:  # as many heads of keys as of queries, and the output as it was
        attention |= {"projection": "multiplicative", "output_projection": spec.attention.output}
        attention.pop("key_value_heads", None)
    return ModelSpec(**{**dict(spec), "attention": AttentionSpec(**attention)})


def with_quantization(spec: ModelSpec, quantization: QuantizationSpec) -> ModelSpec:
    """`spec` with these bits of attention and logits; logits in few bits are no longer the embedding's table.

    Raises:
        ValueError: the model has no dense maps there.
    """
    vocabulary = spec.vocabulary
    if quantization.head and isinstance(vocabulary, DenseVocabularySpec):
        vocabulary = vocabulary.model_copy(update={"tied": False})
    return ModelSpec(**{**dict(spec), "quantization": quantization, "vocabulary": vocabulary})


def _quantizations(dense: ModelSpec) -> list[QuantizationSpec]:
    can_project = (dense.attention.projection, dense.attention.output) == ("dense", "dense")
    found = [QuantizationSpec()]
    if can_project:
        found.append(QuantizationSpec(projection=BITS))
    if dense.vocabulary.kind == "dense":
        found += [quantization.model_copy(update={"head": BITS}) for quantization in found]
    return found


def read_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of weights that a decoded token reads, parts without bits of their own being of `dtype`."""
    return bytes_per_token(spec, Precision.of(dtype), context=0)


def predicted(
    candidate: Candidate, layers: dict[tuple[str, int], float], attention: float, head: float
) -> Candidate:
    """`candidate` with the sum of what its parts cost.

    Args:
        layers: nats a token of (method, k).
        attention: of attention as the candidate has it.
        head: of logits in few bits.
    """
    feed_forward, quantization = candidate.spec.feed_forward, candidate.spec.quantization
    k = getattr(feed_forward, "units_per_block", 0)
    assert candidate.method is not None
    change = layers[candidate.method, k] + attention + (head if quantization.head else 0)
    return replace(candidate, change=change)


def small_enough(found: Sequence[Candidate], budget: Budget) -> list[Candidate]:
    """Those whose units or bytes, which are known beforehand, keep the budget.

    Raises:
        Mismatch: there are none.
    """
    if budget.kind == "kept":
        sizes = [each.spec.kept_fraction for each in found]
        least = Budget("kept", min(sizes))
    elif budget.kind == "bytes":
        sizes = [each.bytes_per_token for each in found]
        least = Budget("bytes", math.ceil(min(sizes) / 1e4) * 1e4)
    else:
        return list(found)
    kept = [each for each, size in zip(found, sizes, strict=True) if size <= budget.value]
    if not kept:
        raise Mismatch(f"convert.budget: nothing keeps {budget}; `budget: {least}` would hold")
    return kept


def eligible(found: Sequence[Candidate], budget: Budget, dense_loss: float) -> list[Candidate]:
    """Those expected to keep the budget, the most promising first: by bytes under a loss budget, else by loss.

    Raises:
        Mismatch: there are none.
    """
    allowed = budget.nats(dense_loss)
    if allowed is None:
        return sorted(small_enough(found, budget), key=lambda each: each.expected)
    kept = [each for each in found if each.expected <= MARGIN * allowed]
    if not kept:
        least = rounded_up(budget, min(each.expected for each in found) / MARGIN, dense_loss)
        raise Mismatch(
            f"convert.budget: nothing keeps {budget}; `budget: {least}` would hold, and goes on from what is measured"
        )
    return sorted(kept, key=lambda each: each.bytes_per_token)


def rounded_up(budget: Budget, change: float, dense_loss: float) -> str:
    """A loss budget of the same kind that allows for `change` nats a token, in whole tenths of a percent."""
    share = change / dense_loss if budget.kind == "loss" else math.expm1(change)
    return str(Budget(budget.kind, max(1, math.ceil(share * 1000)) / 1000))
