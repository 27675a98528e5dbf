"""What the engine computes, in plain PyTorch: a readable twin of every kernel and of the whole step.

It reads the same packed tensors, takes one token at a time, and rounds where the kernels round, so that it makes the
same choices of units with any precision. It shares no arithmetic with them, and is some hundred times slower.

- float32 and bfloat16 weights meet float32 activations in float32 sums. (Where the processor multiplies bfloat16, an
  activation is the sum of two such numbers, which is 16 bits of it; the twin keeps all 24.)
- int8 weights of dense maps, controllers and units meet activations rounded to 16 bits, with one scale for a vector.
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
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecli.decode.layout import LANES, PAD, PANEL, SPAN, Slot, modules_of, padded
from sparsecli.decode.packing import PackedModel, plan
from sparsecli.model.low_bit import from_bfloat16

GROUP = 256  # inputs that share a scale when products are rounded to 8 bits
NOTHING = 1e-30  # a vector of such small numbers counts as zero: one over its scale would not be finite
HEAD_PARTS, CANDIDATES = 16, 4  # equal parts of the vocabulary, and tokens of each that are scored again
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


# -- packed tensors ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A packed tensor, unpacked.

    Attributes:
        kind: its packed type.
        values: (rows, cols) as float32; those of int8 are integers.
        scale: (rows,), what a row has to be multiplied by; ones but for int8.
    """

    kind: str
    values: Tensor
    scale: Tensor

    def __getitem__(self, rows: Tensor) -> Weight:
        """Only some rows."""
        return Weight(self.kind, self.values[rows], self.scale[rows])

    def row(self, index: int) -> Tensor:
        """One row (cols,) as the numbers that it stands for."""
        return self.values[index] * self.scale[index]


def unpack(slot: Slot, packed: np.ndarray) -> np.ndarray:
    """The inverse of `layout.arrange`: (rows, cols) of the packed type."""
    packed = packed[: slot.elements]
    rows, cols = slot.rows, slot.cols
    match slot.layout:
        case "spans":
            width = padded(cols, PAD)
            spans = np.split(packed, [rows * at for at in range(SPAN, width, SPAN)])
            return np.concatenate([span.reshape(rows, -1) for span in spans], axis=1)[:, :cols]
        case "panels":
            return unpack_panels(packed, padded(rows, LANES), padded(cols, PAD))[:rows, :cols]
        case "taps":
            inputs = cols // slot.group
            taps = packed.reshape(slot.group, -1)
            matrices = [unpack_panels(tap, padded(rows, LANES), padded(inputs, 4)) for tap in taps]
            return np.stack([matrix[:rows, :inputs] for matrix in matrices], axis=1).reshape(rows, cols)
        case "blocks":
            together = 1 if packed.dtype == np.float32 else 2
            blocks = packed.reshape(rows // slot.group, -1, padded(slot.group, LANES), together)
            units = blocks.transpose(0, 2, 1, 3).reshape(
                *blocks.shape[::2], -1
            )  # (blocks, N padded, r padded)
            return units[:, : slot.group, :cols].reshape(rows, cols)
    return packed.reshape(rows, -1)[:, :cols]


def unpack_panels(packed: np.ndarray, outputs: int, inputs: int) -> np.ndarray:
    """(outputs, inputs) from panels of PANEL outputs, each [inputs / p][outputs][p]; int8 is stored as w + 128."""
    together = 4 // packed.itemsize
    if packed.dtype == np.int8:
        packed = (packed.view(np.uint8) ^ 0x80).view(np.int8)
    panels, at = [], 0
    for start in range(0, outputs, PANEL):
        width = min(PANEL, outputs - start)
        panel = packed[at : at + width * inputs].reshape(-1, width, together)
        panels.append(panel.transpose(1, 0, 2).reshape(width, inputs))
        at += width * inputs
    return np.concatenate(panels)


def unpack_scale(slot: Slot, scale: np.ndarray) -> np.ndarray:
    """Scales (rows,) without those of padding."""
    if slot.layout == "blocks":
        return scale[: slot.scales].reshape(-1, padded(slot.group, LANES))[:, : slot.group].reshape(-1)
    return scale[: slot.rows]


def unpack_model(model: PackedModel) -> dict[str, Weight]:
    """Every tensor of a packed model, by its name there."""
    weights = {}
    for slot, kind in plan(model.spec, model.precision):
        if slot.key in model.tensors:
            values = torch.from_numpy(from_bfloat16(unpack(slot, model.tensors[slot.key])).copy())
            scale = torch.ones(slot.rows)
            if kind == "int8":
                scale = torch.from_numpy(unpack_scale(slot, model.tensors[f"{slot.key}.scale"]).copy())
            weights[slot.key] = Weight(kind, values, scale)
    return weights


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
        self.weights = unpack_model(model)
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
            x = attended + self._feed_forward(block, self._normalize(f"{block}feed_forward_norm", read))
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
        if f"{name}.weight" in self.weights:
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
            return self._map(f"{block}query", x), self._map(f"{block}key", x), self._map(f"{block}value", x)
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

    def _feed_forward(self, block: str, x: Tensor) -> Tensor:
        feed_forward = self.spec.feed_forward
        activation = ACTIVATIONS[feed_forward.activation]
        if feed_forward.kind == "dense":
            h = self._map(f"{block}up", x)
            h = activation(self._map(f"{block}gate", x)) * h if feed_forward.gated else activation(h)
            return self._map(f"{block}down", h)
        gate = feed_forward.gate == "probability"
        if feed_forward.kind == "sparse":
            z = dots(self.weights[f"{block}controller.first"], x)
            logits = dots(self.weights[f"{block}controller.second"], z)
            logits = logits.unflatten(0, (-1, feed_forward.block_size)) + self._controller_bias(block)
            chosen, weights = choose(logits, feed_forward.units_per_block, gate)
            gated = feed_forward.gated
        else:
            logits = dots(self.weights[f"{block}router"], x)[None]
            experts, weights = choose(logits, feed_forward.experts_per_token, gate)
            size = feed_forward.d_ff // feed_forward.experts
            chosen = (experts[:, None] * size + torch.arange(size)).flatten()
            weights = weights.repeat_interleave(size)
            gated = False

        first = dots(self._units(block, chosen, "gate" if gated else "up"), x)
        if feed_forward.kind == "mixture":
            h = activation(first * weights)  # an expert's probability enters before the activation
        else:
            if f"{block}unit_bias" in self.weights:
                first = first + self.weights[f"{block}unit_bias"].values[0, chosen]
            h = activation(first) * weights
            if gated:
                h = h * dots(self._units(block, chosen, "up"), x)
        down = self._units(block, chosen, "down")
        return (h * down.scale) @ down.values + self.weights[f"{block}bias"].values[0]

    def _controller_bias(self, block: str) -> Tensor:
        """(blocks, N); the packed one has minus infinity where units only fill a block up."""
        feed_forward = self.spec.feed_forward
        assert feed_forward.kind == "sparse"
        size = feed_forward.block_size
        return self.weights[f"{block}controller.bias"].values.view(-1, padded(size, LANES))[:, :size]

    def _units(self, block: str, chosen: Tensor, part: str) -> Weight:
        """One row of each chosen unit; a unit's rows lie side by side."""
        units = self.weights[f"{block}units"]
        feed_forward = self.spec.feed_forward
        gated = feed_forward.kind == "sparse" and feed_forward.gated
        parts = ["gate", "up", "down"] if gated else ["up", "down"]
        return units[chosen * len(parts) + parts.index(part)]

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
