"""The search: it measures what each part of a candidate adds to the loss, and ranks the candidates by a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sparsecli import console
from sparsecli.console import Mismatch
from sparsecli.convert.candidates import BITS, ConversionCandidate, with_quantization
from sparsecli.convert.methods import METHODS
from sparsecli.convert.methods.base import BLOCK_SIZE, FitOptions
from sparsecli.convert.methods.fitting import fit_model, initialize_from_dense
from sparsecli.convert.text import ConversionText
from sparsecli.evaluate.losses import window_losses
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.recipe.budget import Budget
from sparsecli.spec.feed_forward import DenseFeedForwardSpec
from sparsecli.spec.model import ModelSpec, QuantizationSpec

MARGIN = 0.9
"""Share of a loss budget that predictions may use, because the losses of parts do not exactly add up."""


@dataclass(frozen=True)
class PartSearch:
    """Measures parts of candidates: each method, attention, and logits, with all other parts dense.

    Attributes:
        rank: of controllers.
        tuning_loss: the dense model's loss on the tuning text, nats/token.
        compute_once: keeps the result of each fit, so that a stopped search resumes after it: see
            `WorkFolder.compute_once`.
    """

    dense: ScalingTransformerForCausalLM
    text: ConversionText
    rank: int
    options: FitOptions
    tuning_loss: float
    compute_once: Callable[[str, Callable[[], Any]], Any]

    def predict(self, candidates: Sequence[ConversionCandidate]) -> list[ConversionCandidate]:
        """The candidates with their predicted increases of the loss, each the sum of its parts'."""
        layers: dict[tuple[str, int], float] = {}
        for name in dict.fromkeys(each.method for each in candidates if each.method):
            layers |= self._measure_method(name)
        attention = self._measure_attention(candidates)
        head = 0.0
        if any(each.spec.quantization.head for each in candidates):
            spec = with_quantization(self.dense.config.spec, QuantizationSpec(head=BITS))
            head = self._measure_part(f"logits in {BITS} bits", spec)
        return [
            with_prediction(each, layers, attention[each.spec.quantization.projection], head)
            for each in candidates
        ]

    def _measure_method(self, name: str) -> dict[tuple[str, int], float]:
        """Increases of the loss by method and active units of a block, without refit.

        One fit serves several numbers of units: the layer chooses units when it runs.
        """
        increases: dict[tuple[str, int], float] = {}
        for group in METHODS[name].fit_groups:
            key = f"{name}, units {', '.join(map(str, group))}"
            found = self.compute_once(key, partial(self._fit_method, name, group))
            increases |= {(name, k): increase for k, increase in zip(group, found, strict=True)}
        listed = ", ".join(f"{k}: {increase:+.4f}" for (_, k), increase in increases.items())
        console.say(f"{name}, loss increase (nats/token) by active units of a block: {listed}")
        return increases

    def _fit_method(self, name: str, group: Sequence[int]) -> list[float]:
        """Increases of the loss for each number of active units in the group, from one fit."""
        spec = self.dense.config.spec
        assert isinstance(spec.feed_forward, DenseFeedForwardSpec)
        layer = METHODS[name].spec(spec.feed_forward, spec.d_model, group[len(group) // 2], self.rank)
        model = self._fit(spec.model_copy(update={"feed_forward": layer}))
        losses = []
        for k in group:
            for module in model.modules():
                if "units_per_block" in vars(module):
                    module.units_per_block = k
            description = f"{name}, {k} of {BLOCK_SIZE} units"
            losses.append(float(window_losses(model, self.text.tuning, description).mean()))
        return [loss - self.tuning_loss for loss in losses]

    def _measure_attention(self, candidates: Sequence[ConversionCandidate]) -> dict[int | None, float]:
        """Increases of the loss by bits of the projections, with the attention that all candidates share."""
        increases: dict[int | None, float] = {}
        dense = self.dense.config.spec
        for bits in dict.fromkeys(each.spec.quantization.projection for each in candidates):
            increases[bits] = 0.0
            changed = dense.model_copy(update={"attention": candidates[0].spec.attention})
            if (spec := with_quantization(changed, QuantizationSpec(projection=bits))) != dense:
                name = ConversionCandidate(spec, None, 0).name.removeprefix("dense, ")
                increases[bits] = self._measure_part(name, spec)
        return increases

    def _measure_part(self, name: str, spec: ModelSpec) -> float:
        """Increase of the loss when only parts other than feed-forward layers become those of `spec`."""

        def measure() -> float:
            model = self._fit(spec)
            return float(window_losses(model, self.text.tuning, name).mean() - self.tuning_loss)

        increase: float = self.compute_once(name, measure)
        console.say(f"{name}: loss {increase:+.4f} nats/token")
        return increase

    def _fit(self, spec: ModelSpec) -> ScalingTransformerForCausalLM:
        model = initialize_from_dense(self.dense, spec)
        fit_model(self.dense, model, self.text.calibration, self.options, refit=False)
        return model


def with_prediction(
    candidate: ConversionCandidate, layers: dict[tuple[str, int], float], attention: float, head: float
) -> ConversionCandidate:
    """`candidate` with the sum of its parts' increases of the loss, in nats/token.

    Args:
        layers: increases by method and active units of a block.
        attention: the increase from the candidate's attention.
        head: the increase from quantized logits.
    """
    feed_forward, quantization = candidate.spec.feed_forward, candidate.spec.quantization
    k = getattr(feed_forward, "units_per_block", 0)
    assert candidate.method is not None
    increase = layers[candidate.method, k] + attention + (head if quantization.head else 0)
    return replace(candidate, predicted_increase=increase)


# -- budgets -------------------------------------------------------------------------------------------------


def within_size_budget(
    candidates: Sequence[ConversionCandidate], budget: Budget
) -> list[ConversionCandidate]:
    """The candidates whose kept units or bytes, which need no measurement, are within the budget.

    Raises:
        Mismatch: there are none.
    """
    if budget.kind == "kept":
        sizes = [each.spec.kept_fraction for each in candidates]
        least = Budget("kept", min(sizes))
    elif budget.kind == "bytes":
        sizes = [each.bytes_per_token for each in candidates]
        least = Budget("bytes", math.ceil(min(sizes) / 1e4) * 1e4)
    else:
        return list(candidates)
    kept = [each for each, size in zip(candidates, sizes, strict=True) if size <= budget.value]
    if not kept:
        raise Mismatch(f"convert.budget: no candidate meets {budget}; `budget: {least}` can be met")
    return kept


def rank_candidates(
    candidates: Sequence[ConversionCandidate], budget: Budget, dense_loss: float
) -> list[ConversionCandidate]:
    """The candidates expected to meet the budget, best first: by bytes under a loss budget, else by loss.

    Args:
        dense_loss: held-out loss of the dense model, nats/token.
    Raises:
        Mismatch: there are none.
    """
    allowed = budget.nats(dense_loss)
    if allowed is None:
        return sorted(within_size_budget(candidates, budget), key=lambda each: each.expected_increase)
    kept = [each for each in candidates if each.expected_increase <= MARGIN * allowed]
    if not kept:
        least = min(each.expected_increase for each in candidates) / MARGIN
        raise Mismatch(
            f"convert.budget: no candidate meets {budget}; `budget: {loss_budget(budget, least, dense_loss)}` can be "
            f"met, and resumes from these measurements"
        )
    return sorted(kept, key=lambda each: each.bytes_per_token)


def loss_budget(budget: Budget, increase: float, dense_loss: float) -> str:
    """The smallest budget of the same kind that allows this increase of the loss (nats/token), rounded up to 0.1 %."""
    share = increase / dense_loss if budget.kind == "loss" else math.expm1(increase)
    return str(Budget(budget.kind, max(1, math.ceil(share * 1000)) / 1000))
