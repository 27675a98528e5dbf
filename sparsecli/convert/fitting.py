"""A converted model from a dense one: what stays is copied, the rest is fitted block by block."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from sparsecli.console import progress, say
from sparsecli.convert.attention import fit_map
from sparsecli.convert.calibration import Streams, blockwise, inputs_of
from sparsecli.convert.methods import METHODS, Options, method_of
from sparsecli.convert.refit import refit as refit_layer
from sparsecli.convert.rounding import round_to, second_moment
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.layers.attention import Attention
from sparsecli.model.layers.feed_forward import ChosenUnits, DenseFeedForward
from sparsecli.model.layers.quantized import QuantizedLinear
from sparsecli.model.transformer_layers import DecoderLayer
from sparsecli.spec.model import ModelSpec

KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "origin")


def start(dense: ScalingTransformerForCausalLM, spec: ModelSpec) -> ScalingTransformerForCausalLM:
    """A model of `spec` with every weight of `dense` that it has too."""
    tokens = {name: getattr(dense.config, name) for name in KEPT}
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


def fit(
    dense: ScalingTransformerForCausalLM,
    model: ScalingTransformerForCausalLM,
    batches: list[Tensor],
    options: Options,
    *,
    refit: bool,
    keep: bool = False,
) -> None:
    """Fit what `model` has in other forms than `dense`, on token ids (B, T).

    Args:
        refit: solve for W_down, bias and bypass of layers that leave units out.
        keep: layers are fitted already; only refit them.
    """
    options.generator.manual_seed(options.generator.initial_seed())  # alike whatever was fitted before
    spec = model.config.spec
    name = method_of(spec.feed_forward)
    method = METHODS[name] if name else None
    changed = spec.attention != dense.config.spec.attention
    errors: list[dict[str, float]] = []
    rounds_head = isinstance(model.head, QuantizedLinear) and not keep
    with progress("refitting layers" if keep else "fitting layers", spec.layers + rounds_head) as bar:

        def block(
            theirs: DecoderLayer,
            ours: DecoderLayer,
            streams: Streams,
            wanted: list[Tensor],
        ) -> None:
            if (changed or spec.quantization.projection) and not keep:
                errors.append(_fit_attention(theirs, ours, streams))
            if method is not None:
                layer = ours.feed_forward
                assert isinstance(theirs.feed_forward, DenseFeedForward)
                x, before = _before(ours, streams)
                if not keep:
                    method.fit(theirs.feed_forward, layer, x, options)
                if refit and isinstance(layer, ChosenUnits) and method.recovers:
                    behind = torch.cat([each.flatten(0, 1) for each in wanted])
                    # The norm before what reads the stream divides by its size; errors count in that measure.
                    weight = behind.square().mean(dim=-1).rsqrt()
                    refit_layer(layer, x, behind - before, weight / weight.square().mean().sqrt())
            bar.advance()

        last = blockwise(dense, model, batches, block, with_dense=refit)
        if rounds_head:
            _fit_head(dense, model, last)
            bar.advance()
    if changed and not keep:
        _tell(errors)


def _fit_head(dense: ScalingTransformerForCausalLM, model: ScalingTransformerForCausalLM, x: Tensor) -> None:
    """Round the logits' map on what it reads, x (tokens, d)."""
    assert isinstance(model.head, QuantizedLinear)
    weights = dense.model.embedding if dense.config.spec.tied else dense.head
    assert isinstance(weights, nn.Embedding | nn.Linear)
    round_to(model.head, weights.weight, second_moment(x))
    if isinstance(dense.head, nn.Linear) and dense.head.bias is not None:
        model.head.load_state_dict({"bias": dense.head.bias}, strict=False)


class _Silent(nn.Module):
    """A layer that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _before(block: DecoderLayer, streams: Streams) -> tuple[Tensor, Tensor]:
    """What the block's feed-forward layer reads, and the stream that it adds to: (tokens, d) each."""
    layer, block.feed_forward = block.feed_forward, _Silent()
    try:
        with inputs_of(block.feed_forward) as seen:
            before = streams.through(block)
    finally:
        block.feed_forward = layer
    return torch.cat(seen), torch.cat([each.flatten(0, 1) for each in before]).float()


def _fit_attention(theirs: DecoderLayer, ours: DecoderLayer, streams: Streams) -> dict[str, float]:
    """Fit what is not as it was of queries, keys and values, then the output on what these give.

    Returns relative squared errors of the outputs, by name.
    """
    assert isinstance(ours.attention, Attention)
    assert isinstance(theirs.attention, Attention)
    made, given = ours.attention.projection, theirs.attention.projection
    output = ours.attention.output
    assert output is not None
    steps: list[tuple[nn.Module, list[tuple[str, nn.Module, nn.Module | None]]]] = [
        (made, [(name, getattr(made, name), getattr(given, name)) for name in ("query", "key", "value")]),
        (output, [("output", output, theirs.attention.output)]),
    ]
    errors = {}
    for layer, pairs in steps:
        pairs = [pair for pair in pairs if not isinstance(pair[1], nn.Linear)]
        if not pairs:
            continue
        with inputs_of(layer) as seen:
            _before(ours, streams)
        moment = second_moment(torch.cat(seen))
        for name, map_, linear in pairs:
            assert isinstance(linear, nn.Linear)
            errors[name] = fit_map(map_, linear, moment)
    return errors


def _tell(errors: list[dict[str, float]]) -> None:
    """Say what queries, keys and values lost, for the first, the middle and the last third of the blocks."""
    parts = []
    for start, stop in pairwise(sorted({0, len(errors) // 3, len(errors) * 2 // 3, len(errors)})):
        means = {
            name: sum(block[name] for block in errors[start:stop]) / (stop - start) for name in errors[0]
        }
        lost = ", ".join(f"{name} {mean:.1%}" for name, mean in means.items() if name != "output")
        parts.append(f"blocks {start}-{stop - 1}: {lost}")
    say(f"attention, squared errors of outputs: {'; '.join(parts)}")
