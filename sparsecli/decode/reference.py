"""What the engine computes, in plain PyTorch: a readable twin of every kernel and of the whole step.

It reads the same packed tensors, takes one token at a time, and rounds where the kernels round, so that it makes the
same choices of units with any precision. It shares no arithmetic with them, and is some hundred times slower.

- float32 and bfloat16 weights meet float32 activations in float32 sums. (Where the processor multiplies bfloat16, an
  activation is the sum of two such numbers, which is 16 bits of it; the twin keeps all 24.)
- int8 weights of dense maps, controllers and units, and weights of fewer bits, meet activations rounded to 16 bits,
  with one scale for a vector.
- Multiplicative layers round their products x * D: to bfloat16, or with int8 weights to 8 bits, with one scale for
  each module and GROUP inputs.
- Convolutions read what was remembered of earlier positions, in the type of their kernels.
- Keys and values are kept in the type of the cache; as int8 with a scale for each position and head.
- The residual stream, norms, softmax and activations are float32.

Shapes: d width, H heads, S modules of M = d / S channels, N units of a block, r rank of the controller, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecli.decode.layout import LANES, PAD, chooses, modules_of, padded
from sparsecli.decode.packing import PackedModel
from sparsecli.decode.unpacking import FewBits, Weight, unpack_model
from sparsecli.model.low_bit import STEPS

GROUP = 256  # inputs that share a scale when products are rounded to 8 bits
NOTHING = 1e-30  # a vector of such small numbers counts as zero: one over its scale would not be finite
HEAD_PARTS, CANDIDATES = 16, 4  # equal parts of the vocabulary, and tokens of each that are scored again
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


# -- kernels -------------------------------------------------------------------------------------------------


def quantise(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """x (..., n) -> integers (..., n) up to `largest`, as float32, and their scales (..., 1)."""
    limit = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(limit > NOTHING, largest / limit, 0)
    return (x * inverse).round(), limit / largest


def dots(weight: Weight, x: Tensor) -> Tensor:
    """x (cols,) -> (rows,)."""
    if weight.kind != "int8":
        return weight.values @ x
    integers, scale = quantise(x, 32767)
    exact = weight.values.double() @ integers.double()
    return exact.float() * weight.scale * scale


def dots_of_few_bits(weight: FewBits, x: Tensor) -> Tensor:
    """x (cols,) -> (rows,). Sums of a group are exact."""
    integers, scale = quantise(x, 32767)
    groups = weight.scale.shape[1]
    filled = F.pad(integers, (0, groups * PAD - len(x))).double().unflatten(0, (groups, PAD))
    sums = torch.einsum("rgc,gc->rg", weight.steps, filled)
    return ((sums * weight.scale).sum(-1) / STEPS).float() * scale


def multiplicative(D: Weight, E: Weight, x: Tensor) -> Tensor:
    """x (d,) -> (S * M): y[s, m] = sum over i of x[i] D[s, i] E[m, i]."""
    products = x * D.values  # (S, d)
    if E.kind == "float32":
        return (products @ E.values.T).flatten()
    if E.kind == "bfloat16":
        return (products.bfloat16().float() @ E.values.T).flatten()
    y = torch.zeros(D.values.shape[0], E.values.shape[0])
    for group, weights in zip(products.split(GROUP, dim=1), E.values.split(GROUP, dim=1), strict=True):
        integers, scale = quantise(group, 127)
        y += integers @ weights.T * (scale * E.scale)  # sums of so few integers are exact
    return (y * D.scale[:, None]).flatten()


def convolve(kernel: Weight, rows: Tensor, modules: int, neighbours: int) -> Tensor:
    """rows (F_h, S * channels), the current position last -> (S * M): windows over positions and modules."""
    image = rows.unflatten(1, (modules, -1))
    margin = neighbours // 2
    image = F.pad(image, (0, 0, margin, margin))  # zeros beyond the first and the last module
    windows = image.unfold(1, neighbours, 1)  # (F_h, S, channels, F_w)
    windows = windows.permute(1, 0, 3, 2).flatten(1)  # (S, F_h * F_w * channels)
    return (windows @ kernel.values.T).flatten()


def choose(logits: Tensor, count: int, gate: bool) -> tuple[Tensor, Tensor]:
    """logits (blocks, N) -> chosen units (blocks * count,) and their weights: their probabilities where `gate`."""
    best = logits.topk(count, dim=-1).indices
    weights = logits.softmax(-1).gather(-1, best) if gate else torch.ones(best.shape)
    first = torch.arange(len(logits))[:, None] * logits.shape[1]
    return (first + best).flatten(), weights.flatten()


def remember(x: Tensor, kind: str) -> Tensor:
    """x (..., n) as it is read back after it was kept as `kind`."""
    if kind == "int8":
        integers, scale = quantise(x, 127)
        return integers * scale
    return x.bfloat16().float() if kind == "bfloat16" else x


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x (H, head width): turn the pairs (i, i + width / 2) of its first `width` elements by angles (width / 2,)."""
    half = len(angles)
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.cat((*turned, rest), dim=-1)


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q (H, width), keys and values (positions, key_value_heads, width) -> (H, width)."""
    group = q.shape[0] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("hc,phc->hp", q, keys) / q.shape[1] ** 0.5
    return torch.einsum("hp,phc->hc", scores.softmax(-1), values)


# -- the step ------------------------------------------------------------------------------------------------


class Reference:
    """Decodes one sequence with a packed model, as `Engine` does.

    What it has seen is in `memory`: for each layer and name, one row for every position.
    """

    def __init__(self, model: PackedModel) -> None:
        self.spec, self.precision = model.spec, model.precision
        self.weights, self.few_bits = unpack_model(model)
        self.memory: dict[str, list[Tensor]] = defaultdict(list)
        self.length = 0

    def logits(self, tokens: Iterable[int]) -> np.ndarray:
        """Logits (n, V) after each of `tokens`, of a new sequence."""
        self.memory.clear()
        self.length = 0
        return np.stack([self.step(token) for token in tokens])

    @torch.no_grad()
    def step(self, token: int) -> np.ndarray:
        """Logits (V,) after `token`, which is added to the sequence."""
        x = self._embed(token)
        for layer in range(self.spec.layers):
            block = f"blocks.{layer}."
            attended = x + self._attention(block, self._normalize(f"{block}attention_norm", x))
            read = x if self.spec.parallel else attended
            x = attended + self._feed_forward(layer, self._normalize(f"{block}feed_forward_norm", read))
        self.length += 1
        return self._head(self._normalize("norm", x)).numpy()

    def _embed(self, token: int) -> Tensor:
        x = self.weights["embedding"].row(token) * self.spec.embedding_scale
        if self.spec.positions == "learned":
            return x + self.weights["positions"].row(self.length)
        if self.spec.positions == "sinusoidal":
            return x + torch.cat((self._angles().sin(), self._angles().cos()))
        return x

    def _angles(self) -> Tensor:
        return self.length * self.weights["frequencies"].values[0]

    def _normalize(self, name: str, x: Tensor) -> Tensor:
        weight, epsilon = self.weights[f"{name}.weight"].values[0], self.spec.normalization_epsilon
        if self.spec.normalization == "rms":
            return F.rms_norm(x, x.shape, weight, epsilon)
        return F.layer_norm(x, x.shape, weight, self.weights[f"{name}.bias"].values[0], epsilon)

    def _head_norm(self, name: str, x: Tensor) -> Tensor:
        """x (heads, width) with every head normalised."""
        weight = self.weights[f"{name}.weight"].values[0]
        return F.rms_norm(x, weight.shape, weight, self.spec.normalization_epsilon)

    def _map(self, name: str, x: Tensor) -> Tensor:
        """The dense or multiplicative map called `name`."""
        if f"{name}.weight" in self.few_bits:
            y = dots_of_few_bits(self.few_bits[f"{name}.weight"], x)
        elif f"{name}.weight" in self.weights:
            y = dots(self.weights[f"{name}.weight"], x)
        else:
            y = multiplicative(self.weights[f"{name}.D"], self.weights[f"{name}.E"], x)
        return y + self.weights[f"{name}.bias"].values[0] if f"{name}.bias" in self.weights else y

    # Attention.

    def _attention(self, block: str, x: Tensor) -> Tensor:
        q, k, v = self._project(block, x)
        q, k, v = (part.unflatten(0, (-1, self.spec.width_of_head)) for part in (q, k, v))
        if self.spec.attention.query_key_norm:
            q, k = self._head_norm(f"{block}query_norm", q), self._head_norm(f"{block}key_norm", k)
        if self.spec.positions == "rotary":
            q, k = rotate(q, self._angles()), rotate(k, self._angles())
        keys, values = self.memory[f"{block}keys"], self.memory[f"{block}values"]
        keys.append(remember(k, self.precision.cache))
        values.append(remember(v, self.precision.cache))
        y = attend(q, torch.stack(keys), torch.stack(values)).flatten()
        kind = self.spec.attention.output
        if kind == "none":
            return y
        y = self._map(f"{block}output", y)
        if kind != "multiplicative_conv":
            return y
        return self._convolve(f"{block}output_convolution", self._past(f"{block}output", y), neighbours=3)

    def _project(self, block: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (d,), all heads side by side."""
        if not self.spec.attention.projection.endswith("_conv"):
            queries, keys = (self._ranked(f"{block}{name}", x) for name in ("query", "key"))
            return queries, keys, self._map(f"{block}value", x)
        m = self._map(f"{block}shared", x)
        past, joined = self._past(f"{block}shared", m), m
        match self.spec.attention.value_concat:
            case "modules":
                cut = (modules_of(self.spec), -1)
                joined = torch.cat((m.unflatten(0, cut), x.unflatten(0, cut)), dim=1).flatten()
            case "whole":
                joined = torch.cat((m, x))
        return (
            self._convolve(f"{block}query", past, neighbours=3),
            self._convolve(f"{block}key", past, neighbours=3),
            self._convolve(f"{block}value", self._past(f"{block}joined", joined), neighbours=1),
        )

    def _ranked(self, name: str, x: Tensor) -> Tensor:
        """The map called `name`, which may be two."""
        if self.spec.query_rank is None:
            return self._map(name, x)
        return self._map(f"{name}.second", self._map(f"{name}.first", x))

    def _past(self, name: str, row: Tensor) -> Tensor:
        """`row` and those of the F_h - 1 positions before it, zeros before the first: (F_h, width)."""
        rows = self.memory[name]
        rows.append(remember(row, self.precision.convolution))
        kernel = self.spec.attention.kernel
        before = [torch.zeros_like(row)] * (kernel - len(rows))
        return torch.stack([*before, *rows[-kernel:]])

    def _convolve(self, name: str, rows: Tensor, neighbours: int) -> Tensor:
        modules = modules_of(self.spec)
        y = convolve(self.weights[f"{name}.weight"], rows, modules, neighbours)
        return y + self.weights[f"{name}.bias"].values[0].repeat(modules)

    # Feed-forward.

    def _feed_forward(self, layer: int, x: Tensor) -> Tensor:
        feed_forward = self.spec.feed_forward
        block = f"blocks.{layer}."
        if feed_forward.kind == "dense":
            h = self._map(f"{block}up", x)
            gate = self._map(f"{block}gate", x) if feed_forward.gated else None
            return self._map(f"{block}down", self._activated(gate, h))
        if feed_forward.kind == "precision":
            return self._precise(layer, x)
        y = self.weights[f"{block}bias"].values[0]
        if feed_forward.kind == "selector":
            chosen, weights = self._selected(layer, x), torch.ones(())
            if feed_forward.bypass:
                y = y + self._map(f"{block}bypass.second", self._map(f"{block}bypass.first", x))
        elif feed_forward.kind == "sparse":
            chosen, weights = self._controlled(layer, x)
        else:
            chosen, weights = self._routed(block, x)

        up = dots(self._units(block, chosen, "up"), x)
        if feed_forward.kind == "mixture":
            h = self._activated(None, up * weights)  # an expert's probability enters before the activation
        else:
            gate = dots(self._units(block, chosen, "gate"), x) if feed_forward.gated else None
            h = self._activated(*self._biased(block, gate, up, chosen)) * weights
        down = self._units(block, chosen, "down")
        return (h * down.scale) @ down.values + y

    def _activated(self, gate: Tensor | None, up: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.spec.feed_forward.activation]
        return activation(up) if gate is None else activation(gate) * up

    def _biased(
        self, block: str, gate: Tensor | None, up: Tensor, units: Tensor | slice
    ) -> tuple[Tensor | None, Tensor]:
        """Gate and up of some units with their bias on what enters the activation."""
        if f"{block}unit_bias" not in self.weights:
            return gate, up
        bias = self.weights[f"{block}unit_bias"].values[0, units]
        return (gate, up + bias) if gate is None else (gate + bias, up)

    def _controlled(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Units that the controller chooses, and their weights."""
        feed_forward, block = self.spec.feed_forward, f"blocks.{layer}."
        assert feed_forward.kind == "sparse"
        if not chooses(self.spec, layer):
            return torch.arange(feed_forward.d_ff), torch.ones(())
        z = dots(self.weights[f"{block}controller.first"], x)
        logits = dots(self.weights[f"{block}controller.second"], z)
        size = feed_forward.block_size  # packed blocks are filled up
        bias = self.weights[f"{block}controller.bias"].values.view(-1, padded(size, LANES))[:, :size]
        gate = feed_forward.gate == "probability"
        return choose(logits.unflatten(0, (-1, size)) + bias, self.spec.units_per_block(layer), gate)

    def _routed(self, block: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Units of the experts that the router chooses, and their weights."""
        feed_forward = self.spec.feed_forward
        assert feed_forward.kind == "mixture"
        logits = dots(self.weights[f"{block}router"], x)[None]
        experts, weights = choose(logits, feed_forward.experts_per_token, feed_forward.gate == "probability")
        size = feed_forward.d_ff // feed_forward.experts
        return (experts[:, None] * size + torch.arange(size)).flatten(), weights.repeat_interleave(size)

    def _selected(self, layer: int, x: Tensor) -> Tensor:
        """Units that a low-bit copy chooses."""
        feed_forward, block = self.spec.feed_forward, f"blocks.{layer}."
        assert feed_forward.kind == "selector"
        if not chooses(self.spec, layer):
            return torch.arange(feed_forward.d_ff)
        gate, up = self._biased(block, *self._copied(block, x), slice(None))
        if feed_forward.choice == "positive":
            return (up > self.weights[f"{block}threshold"].values[0]).nonzero()[:, 0]
        return self._best(layer, self._activated(gate, up))

    def _copied(self, block: str, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Gate and up of all units, in few bits."""
        feed_forward = self.spec.feed_forward
        assert feed_forward.kind in ("selector", "precision")
        products = dots_of_few_bits(self.few_bits[f"{block}copy"], x)
        gate, up = products.chunk(2) if feed_forward.gated else (None, products)
        return gate, up

    def _best(self, layer: int, h: Tensor) -> Tensor:
        """The units of each block that add most, for what they give."""
        feed_forward = self.spec.feed_forward
        assert feed_forward.kind in ("selector", "precision")
        scores = h.abs() * self.weights[f"blocks.{layer}.importance"].values[0]
        order = scores.unflatten(0, (-1, feed_forward.block_size)).sort(descending=True, stable=True).indices
        best = order[:, : self.spec.units_per_block(layer)]  # of equal ones the first
        return (best + torch.arange(len(best))[:, None] * feed_forward.block_size).flatten()

    def _precise(self, layer: int, x: Tensor) -> Tensor:
        """All units in few bits, the chosen ones with more."""
        feed_forward, block = self.spec.feed_forward, f"blocks.{layer}."
        assert feed_forward.kind == "precision"
        gate, up = self._biased(block, *self._copied(block, x), slice(None))
        h = self._activated(gate, up)
        y = self.weights[f"{block}bias"].values[0]
        if self.spec.units_per_block(layer):
            chosen = self._best(layer, h) if chooses(self.spec, layer) else torch.arange(feed_forward.d_ff)
            parts = 3 if feed_forward.gated else 2
            more = [self.few_bits[f"{block}residual"][chosen * parts + part] for part in range(parts)]
            if gate is not None:
                gate = gate[chosen] + dots_of_few_bits(more[0], x)
            h[chosen] = self._activated(gate, up[chosen] + dots_of_few_bits(more[-2], x))
            y = y + h[chosen] @ more[-1].values()[:, : len(x)]
        return dots_of_few_bits(self.few_bits[f"{block}base.down"], h) + y

    def _units(self, block: str, chosen: Tensor, part: str) -> Weight:
        """One row of each chosen unit; a unit's rows lie side by side."""
        gated = getattr(self.spec.feed_forward, "gated", False)
        parts = ["gate", "up", "down"] if gated else ["up", "down"]
        return self.weights[f"{block}units"][chosen * len(parts) + parts.index(part)]

    # Logits.

    def _head(self, x: Tensor) -> Tensor:
        logits = self._map("head", x)
        if "head.exact" not in self.weights:
            return logits
        exact = dots(self.weights["head.exact"], x)
        if "head.bias" in self.weights:
            exact = exact + self.weights["head.bias"].values[0]
        size = len(logits)
        for part in range(HEAD_PARTS):
            start, end = size * part // HEAD_PARTS, size * (part + 1) // HEAD_PARTS
            best = start + logits[start:end].topk(min(CANDIDATES, end - start)).indices
            logits[best] = exact[best]
        return logits
