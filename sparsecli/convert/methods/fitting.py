"""Fitting of a converted model: unchanged weights are copied, changed ones are fitted layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sparsecli.console import progress, say
from sparsecli.convert.methods import METHODS, method_of
from sparsecli.convert.methods.attention import fit_projection
from sparsecli.convert.methods.base import FitOptions, Method
from sparsecli.convert.methods.calibration import ResidualStreams, fit_layerwise, record_inputs
from sparsecli.convert.methods.refit import refit_layer
from sparsecli.convert.methods.rounding import round_second_order, second_moment
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.layers.attention import Attention
from sparsecli.model.layers.feed_forward import ChosenUnits, DenseFeedForward
from sparsecli.model.layers.quantized import QuantizedLinear
from sparsecli.model.transformer_layers import DecoderLayer
from sparsecli.spec.model import ModelSpec

COPIED_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "origin")


def initialize_from_dense(
    dense: ScalingTransformerForCausalLM, spec: ModelSpec
) -> ScalingTransformerForCausalLM:
    """A model of `spec` with the weights of `dense` in all layers that they share."""
    tokens = {name: getattr(dense.config, name) for name in COPIED_FIELDS}
    model = ScalingTransformerForCausalLM(ScalingTransformerConfig.from_spec(spec, **tokens)).eval()
    ours, theirs = model.state_dict(), dense.state_dict()
    # Where layers are of another kind, a bias may have the same name and another width.
    same = {name: value for name, value in theirs.items() if name in ours and value.shape == ours[name].shape}
    if spec.feed_forward.kind != "dense":
        same = {name: value for name, value in same.items() if ".feed_forward." not in name}
    model.load_state_dict(same, strict=False)
    if dense.config.spec.tied and not spec.tied and isinstance(model.head, nn.Linear):
        model.head.load_state_dict({"weight": dense.model.embedding.weight}, strict=False)
    return model


def fit_model(
    dense: ScalingTransformerForCausalLM,
    model: ScalingTransformerForCausalLM,
    batches: list[Tensor],
    options: FitOptions,
    *,
    refit: bool,
    fitted: bool = False,
) -> None:
    """Fit the layers of `model` that differ from those of `dense`, on token ids (B, T).

    Args:
        refit: refit W_down, bias and bypass of layers that leave units out.
        fitted: the layers are fitted already; only refit them.
    """
    options.generator.manual_seed(options.generator.initial_seed())  # independent of earlier fits
    spec = model.config.spec
    replaces_attention = spec.attention != dense.config.spec.attention
    fits_attention = (replaces_attention or bool(spec.quantization.projection)) and not fitted
    fits_head = isinstance(model.head, QuantizedLinear) and not fitted
    name = method_of(spec.feed_forward)
    fits = _LayerFit(METHODS[name] if name else None, options, fits_attention, refit, fitted)
    with progress("refitting layers" if fitted else "fitting layers", spec.layers + fits_head) as bar:

        def fit_layer(*arguments: Any) -> None:
            fits.fit(*arguments)
            bar.advance()

        head_inputs = fit_layerwise(dense, model, batches, fit_layer, with_dense=refit)
        if fits_head:
            _fit_head(dense, model, head_inputs)
            bar.advance()
    if replaces_attention and not fitted:
        _report_attention_errors(fits.attention_errors)


@dataclass
class _LayerFit:
    """The fit of one layer after another."""

    method: Method | None
    options: FitOptions
    fits_attention: bool
    refit: bool
    fitted: bool
    attention_errors: list[dict[str, float]] = field(default_factory=list)
    """By layer and projection."""

    def fit(
        self,
        dense: DecoderLayer,
        layer: DecoderLayer,
        streams: ResidualStreams,
        targets: list[Tensor],
    ) -> None:
        """Fit attention and feed-forward of `layer`: see `fit_layerwise`."""
        if self.fits_attention:
            self.attention_errors.append(_fit_attention(dense, layer, streams))
        if self.method is None:
            return
        x, before = _feed_forward_inputs(layer, streams)
        if not self.fitted:
            assert isinstance(dense.feed_forward, DenseFeedForward)
            self.method.fit(dense.feed_forward, layer.feed_forward, x, self.options)
        if self.refit and self.method.recovers and layer.adds_plainly:
            _refit_feed_forward(layer.feed_forward, x, before, targets)


def _refit_feed_forward(layer: nn.Module, x: Tensor, before: Tensor, targets: list[Tensor]) -> None:
    """Refit a layer on inputs x (tokens, d), so that `before` plus its output nears `targets` (B, T, d)."""
    if not isinstance(layer, ChosenUnits):
        return
    target = torch.cat([each.flatten(0, 1) for each in targets])
    # The norm of the next layer divides by the size of the stream; errors are relative to it.
    weight = target.square().mean(dim=-1).rsqrt()
    refit_layer(layer, x, target - before, weight / weight.square().mean().sqrt())


def _fit_head(dense: ScalingTransformerForCausalLM, model: ScalingTransformerForCausalLM, x: Tensor) -> None:
    """Quantize the linear layer of the logits on its inputs x (tokens, d)."""
    assert isinstance(model.head, QuantizedLinear)
    weights = dense.model.embedding if dense.config.spec.tied else dense.head
    assert isinstance(weights, nn.Embedding | nn.Linear)
    round_second_order(model.head, weights.weight, second_moment(x))
    if isinstance(dense.head, nn.Linear) and dense.head.bias is not None:
        model.head.load_state_dict({"bias": dense.head.bias}, strict=False)


class _Zero(nn.Module):
    """A layer whose output is zero."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _feed_forward_inputs(layer: DecoderLayer, streams: ResidualStreams) -> tuple[Tensor, Tensor]:
    """The inputs of `layer.feed_forward`, and the stream that it adds to: (tokens, d) each."""
    feed_forward, layer.feed_forward = layer.feed_forward, _Zero()
    try:
        with record_inputs(layer.feed_forward) as inputs:
            before = streams.through(layer)
    finally:
        layer.feed_forward = feed_forward
    return torch.cat(inputs), torch.cat([each.flatten(0, 1) for each in before]).float()


def _fit_attention(theirs: DecoderLayer, ours: DecoderLayer, streams: ResidualStreams) -> dict[str, float]:
    """Fit the changed projections of queries, keys and values, then the output projection on their results.

    Returns relative squared errors of the projections' outputs, by name.
    """
    assert isinstance(ours.attention, Attention)
    assert isinstance(theirs.attention, Attention)
    made, original = ours.attention.projection, theirs.attention.projection
    output = ours.attention.output
    assert output is not None
    steps: list[tuple[nn.Module, list[tuple[str, nn.Module, nn.Module | None]]]] = [
        (made, [(name, getattr(made, name), getattr(original, name)) for name in ("query", "key", "value")]),
        (output, [("output", output, theirs.attention.output)]),
    ]
    errors = {}
    for layer, pairs in steps:
        pairs = [pair for pair in pairs if not isinstance(pair[1], nn.Linear)]
        if not pairs:
            continue
        with record_inputs(layer) as inputs:
            _feed_forward_inputs(ours, streams)
        moment = second_moment(torch.cat(inputs))
        for name, projection, linear in pairs:
            assert isinstance(linear, nn.Linear)
            errors[name] = fit_projection(projection, linear, moment)
    return errors


def _report_attention_errors(errors: list[dict[str, float]]) -> None:
    """Report the errors of queries, keys and values in the first, the middle and the last third of the layers."""
    parts = []
    for start, stop in pairwise(sorted({0, len(errors) // 3, len(errors) * 2 // 3, len(errors)})):
        means = {
            name: sum(layer[name] for layer in errors[start:stop]) / (stop - start) for name in errors[0]
        }
        lost = ", ".join(f"{name} {mean:.1%}" for name, mean in means.items() if name != "output")
        parts.append(f"layers {start}-{stop - 1}: {lost}")
    say(f"relative squared error of attention projections: {'; '.join(parts)}")
