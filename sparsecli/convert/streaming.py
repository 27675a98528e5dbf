"""A dense model layer by layer, each in float32 for as long as it is used: losses, and gradients of linear layers.

A checkpoint of 1.5B parameters has 6 GB in float32. Here only one layer is widened at a time, and all text passes it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecli.console import Progress, progress
from sparsecli.convert.methods.calibration import ResidualStreams
from sparsecli.data.packing import Windows
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.layers.gguf import GgufWeight, TiedHead
from sparsecli.model.transformer_layers import DecoderLayer
from sparsecli.spec.model import QuantizationSpec

LOGITS_AT_ONCE = 1 << 26  # 256 MB of float32
WINDOWS_AT_ONCE = 4


def in_float32(module: nn.Module) -> nn.Module:
    """A float32 copy of a layer without gradients, in which linear layers with codes are ordinary ones."""
    if isinstance(module, TiedHead):
        return _plain(module.embedding)
    if isinstance(module, GgufWeight):
        return _plain(module)
    found = copy.deepcopy(module).float().requires_grad_(False)
    for name, each in list(found.named_modules()):
        if isinstance(each, GgufWeight):
            found.set_submodule(name, _plain(each))
    return found


def _plain(weight: GgufWeight) -> nn.Linear:
    bias = getattr(weight, "bias", None)
    linear = nn.utils.skip_init(nn.Linear, weight.cols, weight.rows, bias is not None)
    linear.weight = nn.Parameter(weight.weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.float(), requires_grad=False)
    return linear


@torch.no_grad()
def dequantized(model: ScalingTransformerForCausalLM) -> ScalingTransformerForCausalLM:
    """The model in float32, without GGUF's types: itself, if it has none of them and is float32."""
    if not model.config.spec.quantization.gguf:
        return model.float()
    spec = model.config.spec.model_copy(update={"quantization": QuantizationSpec()})
    config = ScalingTransformerConfig.from_spec(spec, origin=model.config.origin)
    made = ScalingTransformerForCausalLM(config).eval().requires_grad_(False)
    made.load_state_dict(model.state_dict(), strict=False)
    for name in model.config.spec.quantization.gguf:
        coded, plain = model.get_submodule(name), made.get_submodule(name)
        assert isinstance(coded, GgufWeight)
        assert isinstance(plain, nn.Linear | nn.Embedding)
        plain.weight.copy_(coded.weight)
    return made


def layers_in_float32(model: ScalingTransformerForCausalLM, bar: Progress) -> Iterator[DecoderLayer]:
    """The layers in their order, see `in_float32`."""
    for layer in model.model.layers:
        widened = in_float32(layer)
        assert isinstance(widened, DecoderLayer)
        yield widened
        bar.advance()


@contextmanager
def head_in_float32(model: ScalingTransformerForCausalLM) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function that gives logits (..., V) of the residual stream (..., d) after the last layer."""
    norm, head = in_float32(model.model.norm), model.head
    model.head = in_float32(head)
    try:
        yield lambda x: model.logits(norm(x), 0)
    finally:
        model.head = head


@torch.no_grad()
def streamed_losses(
    model: ScalingTransformerForCausalLM, windows: Sequence[Windows], description: str
) -> list[np.ndarray]:
    """Mean loss (nats/token) of every window (W,) of several texts, in float32; as `window_losses`."""
    batches = [batch for text in windows for batch in _batches(text)]
    streams = ResidualStreams(model, batches)
    with progress(description, len(model.model.layers) + len(batches)) as bar:
        for layer in layers_in_float32(model, bar):
            streams.x = streams.through(layer)
        found: list[float] = []
        with head_in_float32(model) as logits:
            for x, ids in zip(streams.x, batches, strict=True):
                step = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
                found += [_loss(logits, row, tokens, step) for row, tokens in zip(x, ids, strict=True)]
                bar.advance()
    ends = np.cumsum([len(text) for text in windows])[:-1]
    return np.split(np.array(found), ends)


def _batches(windows: Windows) -> list[Tensor]:
    rows = [windows[index]["input_ids"] for index in range(len(windows))]
    return list(torch.stack(rows).split(WINDOWS_AT_ONCE))


def _loss(logits: Callable[[Tensor], Tensor], x: Tensor, ids: Tensor, step: int) -> float:
    """Mean loss of one window from its stream x (T, d), `step` positions at a time."""
    total = 0.0
    for start in range(0, len(ids) - 1, step):
        end = min(start + step, len(ids) - 1)
        y = logits(x[None, start:end])[0]
        total += F.cross_entropy(y, ids[start + 1 : end + 1], reduction="sum").item()
    return total / (len(ids) - 1)


def output_gradients(
    model: ScalingTransformerForCausalLM, batches: list[Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """Mean square of the loss's gradient at every output (rows,) of all linear layers, by name.

    The gradients are those of a token's loss for labels that the model itself predicts (the Fisher information).
    Half of it times the squared error of an output is about what that error adds to the loss.

    Args:
        batches: token ids (B, T).
    """
    layers = model.model.layers
    with torch.no_grad():
        streams = ResidualStreams(model, batches)
    inputs = []  # of each layer, by batch
    squares: dict[str, Tensor] = {}
    tokens = sum(batch.numel() for batch in batches)
    with progress("measuring how much every layer matters", 2 * len(layers) + 1) as bar:
        with torch.no_grad():
            for layer in layers_in_float32(model, bar):
                inputs.append(streams.x)
                streams.x = streams.through(layer)
        gradients = [_head_gradient(model, x, squares, generator) for x in streams.x]
        bar.advance()
        for index in reversed(range(len(layers))):
            widened = in_float32(layers[index])
            with _recorded_gradients(widened, f"model.layers.{index}.", squares):
                for at, x in enumerate(inputs[index]):
                    start = x.requires_grad_(True)
                    widened(start, *streams.arguments[at][index]).backward(gradients[at])
                    assert start.grad is not None
                    gradients[at] = start.grad
            inputs.pop()
            bar.advance()
    return {name: (total / tokens).float() for name, total in squares.items()}


def _head_gradient(
    model: ScalingTransformerForCausalLM, x: Tensor, squares: dict[str, Tensor], generator: torch.Generator
) -> Tensor:
    """The gradient (B, T, d) of the losses of drawn labels at the stream x (B, T, d) after the last layer."""
    gradient = torch.empty_like(x)
    with head_in_float32(model) as logits, _recorded_gradients(model.head, "head", squares):
        for at, row in enumerate(x):
            start = row[None].detach().requires_grad_(True)
            y = logits(start)[0]
            labels = torch.multinomial(y.detach().softmax(-1), 1, generator=generator)[:, 0]
            F.cross_entropy(y, labels, reduction="sum").backward()
            assert start.grad is not None
            gradient[at] = start.grad[0]
    return gradient


@contextmanager
def _recorded_gradients(module: nn.Module, prefix: str, squares: dict[str, Tensor]) -> Iterator[None]:
    """Add up the squares of gradients at the outputs of linear layers while open."""
    handles = []
    for name, each in module.named_modules():
        if isinstance(each, nn.Linear):

            def record(_: nn.Module, __: object, y: Tensor, name: str = prefix + name) -> None:
                def add(gradient: Tensor) -> None:
                    total = gradient.flatten(0, -2).double().square().sum(dim=0)
                    squares[name] = squares[name] + total if name in squares else total

                if y.requires_grad:
                    y.register_hook(add)

            handles.append(each.register_forward_hook(record))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
