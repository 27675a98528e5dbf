"""The search: what each part of a candidate costs on tuning text, and which candidates keep the budget."""

from __future__ import annotations

from collections.abc import Sequence

from sparsecli import console
from sparsecli.convert.evaluation import window_losses
from sparsecli.convert.fitting import fit, start
from sparsecli.convert.methods import METHODS, Options
from sparsecli.convert.plan import BITS, Candidate, predicted, with_low_bit
from sparsecli.convert.text import Text
from sparsecli.model.architecture import LowBitSpec, ModelSpec
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.parts import DenseFeedForwardSpec


def measure_parts(
    dense: ScalingTransformerForCausalLM,
    found: Sequence[Candidate],
    text: Text,
    rank: int,
    options: Options,
    reference: float,
) -> list[Candidate]:
    """The candidates with the changes predicted from one fit of each method, of attention, and of the logits.

    A fit serves several numbers of units: which of them are chosen is decided when the layer runs.

    Args:
        reference: the dense model's loss on the tuning text.
    """
    layers: dict[tuple[str, int], float] = {}
    for name in dict.fromkeys(each.method for each in found if each.method):
        layers |= _layers(dense, name, text, rank, options, reference)
    attention = {}
    for bits in dict.fromkeys(each.spec.low_bit.projection for each in found):
        attention[bits] = 0.0
        changed = dense.config.spec.model_copy(update={"attention": found[0].spec.attention})
        if (spec := with_low_bit(changed, LowBitSpec(projection=bits))) != dense.config.spec:
            attention[bits] = _change(dense, spec, text, options, reference)
            name = Candidate(spec, None, 0).name.removeprefix("dense, ")
            console.say(f"{name}: {attention[bits]:+.4f} nats")
    head = 0.0
    if any(each.spec.low_bit.head for each in found):
        head = _change(
            dense, with_low_bit(dense.config.spec, LowBitSpec(head=BITS)), text, options, reference
        )
        console.say(f"logits in {BITS} bits: {head:+.4f} nats")
    return [predicted(each, layers, attention[each.spec.low_bit.projection], head) for each in found]


def _layers(
    dense: ScalingTransformerForCausalLM,
    name: str,
    text: Text,
    rank: int,
    options: Options,
    reference: float,
) -> dict[tuple[str, int], float]:
    """Changes of the loss by method and units of a block, without refit."""
    method, spec = METHODS[name], dense.config.spec
    assert isinstance(spec.feed_forward, DenseFeedForwardSpec)
    changes = {}
    for choices in method.choices:
        middle = choices[len(choices) // 2]
        layer = method.spec(spec.feed_forward, spec.d_model, middle, rank)
        model = start(dense, spec.model_copy(update={"feed_forward": layer}))
        fit(dense, model, text.calibration, options, refit=False)
        for k in choices:
            for module in model.modules():
                if "units_per_block" in vars(module):
                    module.units_per_block = k
            changes[name, k] = float(window_losses(model, text.tuning).mean() - reference)
    told = ", ".join(f"{k}: {change:+.4f}" for (_, k), change in changes.items())
    console.say(f"{name}, nats by units of a block: {told}")
    return changes


def _change(
    dense: ScalingTransformerForCausalLM, spec: ModelSpec, text: Text, options: Options, reference: float
) -> float:
    """Change of the loss when parts other than feed-forward layers alone become those of `spec`."""
    model = start(dense, spec)
    fit(dense, model, text.calibration, options, refit=False)
    return float(window_losses(model, text.tuning).mean() - reference)
