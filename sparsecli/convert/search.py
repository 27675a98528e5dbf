"""The search: what each part of a candidate costs on tuning text, and which candidates keep the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sparsecli import console
from sparsecli.convert.evaluation import window_losses
from sparsecli.convert.fitting import fit, start
from sparsecli.convert.methods import BLOCK, METHODS, Options
from sparsecli.convert.plan import BITS, Candidate, predicted, with_quantization
from sparsecli.convert.text import Text
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.spec.feed_forward import DenseFeedForwardSpec
from sparsecli.spec.model import ModelSpec, QuantizationSpec

Once = Callable[[str, Callable[[], Any]], Any]
"""See `Work.once`."""


def measure_parts(
    dense: ScalingTransformerForCausalLM,
    found: Sequence[Candidate],
    text: Text,
    rank: int,
    options: Options,
    reference: float,
    once: Once,
) -> list[Candidate]:
    """The candidates with the changes predicted from one fit of each method, of attention, and of the logits.

    A fit serves several numbers of units: which of them are chosen is decided when the layer runs.

    Args:
        reference: the dense model's loss on the tuning text.
        once: keeps what each fit gave, so that a search that is stopped goes on behind it.
    """
    layers: dict[tuple[str, int], float] = {}
    for name in dict.fromkeys(each.method for each in found if each.method):
        layers |= _layers(dense, name, text, rank, options, reference, once)

    def change(name: str, spec: ModelSpec) -> float:
        found = once(name, lambda: _change(dense, spec, text, options, reference, name))
        console.say(f"{name}: {found:+.4f} nats")
        return found

    attention = {}
    for bits in dict.fromkeys(each.spec.quantization.projection for each in found):
        attention[bits] = 0.0
        changed = dense.config.spec.model_copy(update={"attention": found[0].spec.attention})
        if (spec := with_quantization(changed, QuantizationSpec(projection=bits))) != dense.config.spec:
            attention[bits] = change(Candidate(spec, None, 0).name.removeprefix("dense, "), spec)
    head = 0.0
    if any(each.spec.quantization.head for each in found):
        head = change(
            f"logits in {BITS} bits", with_quantization(dense.config.spec, QuantizationSpec(head=BITS))
        )
    return [predicted(each, layers, attention[each.spec.quantization.projection], head) for each in found]


def _layers(
    dense: ScalingTransformerForCausalLM,
    name: str,
    text: Text,
    rank: int,
    options: Options,
    reference: float,
    once: Once,
) -> dict[tuple[str, int], float]:
    """Changes of the loss by method and units of a block, without refit."""
    method, spec = METHODS[name], dense.config.spec
    assert isinstance(spec.feed_forward, DenseFeedForwardSpec)
    dense_layer = spec.feed_forward

    def found(choices: Sequence[int]) -> list[float]:
        middle = choices[len(choices) // 2]
        layer = method.spec(dense_layer, spec.d_model, middle, rank)
        model = start(dense, spec.model_copy(update={"feed_forward": layer}))
        fit(dense, model, text.calibration, options, refit=False)
        losses = []
        for k in choices:
            for module in model.modules():
                if "units_per_block" in vars(module):
                    module.units_per_block = k
            told = f"{name}, {k} of {BLOCK} units"
            losses.append(float(window_losses(model, text.tuning, told).mean()))
        return [loss - reference for loss in losses]

    changes: dict[tuple[str, int], float] = {}
    for choices in method.choices:
        given = once(f"{name}, units {', '.join(map(str, choices))}", partial(found, choices))
        changes |= {(name, k): change for k, change in zip(choices, given, strict=True)}
    told = ", ".join(f"{k}: {change:+.4f}" for (_, k), change in changes.items())
    console.say(f"{name}, nats by units of a block: {told}")
    return changes


def _change(
    dense: ScalingTransformerForCausalLM,
    spec: ModelSpec,
    text: Text,
    options: Options,
    reference: float,
    name: str,
) -> float:
    """Change of the loss when parts other than feed-forward layers alone become those of `spec`."""
    model = start(dense, spec)
    fit(dense, model, text.calibration, options, refit=False)
    return float(window_losses(model, text.tuning, name).mean() - reference)
