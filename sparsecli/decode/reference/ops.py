"""The kernels of the engine in plain PyTorch, which round where those round and share no arithmetic with them.

- float32 and bfloat16 weights meet float32 activations in float32 sums. (Where the processor multiplies bfloat16, an
  activation is the sum of two such numbers, which is 16 bits of it; the twin keeps all 24.)
- int8 weights of dense maps, controllers and units, and weights of fewer bits, meet activations rounded to 16 bits,
  with one scale for a vector.
- Weights in GGUF's types meet activations rounded to 8 bits, with a scale for every 32.
- Multiplicative layers round their products x * D: to bfloat16, or with int8 weights to 8 bits, with one scale for
  each module and GROUP inputs.
- Convolutions read what was remembered of earlier positions, in the type of their kernels.
- Keys and values are kept in the type of the cache; as int8 with a scale for each position and head.
- The residual stream, norms, softmax and activations are float32.

Shapes: d width, H heads, S modules of M = d / S channels, N units of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecli.decode.packed.layouts import PAD
from sparsecli.decode.reference.weights import Quantized, Weight
from sparsecli.model.quantization import STEPS

BYTE_GROUP = 32  # activations that share a scale where these are bytes
GROUP = 256  # inputs that share a scale when products are rounded to 8 bits
NOTHING = 1e-30  # a vector of such small numbers counts as zero: one over its scale would not be finite
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def quantise(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """x (..., n) -> integers (..., n) up to `largest`, as float32, and their scales (..., 1)."""
    limit = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(limit > NOTHING, largest / limit, 0)
    return (x * inverse).round(), limit / largest


def gemv(weight: Weight, x: Tensor) -> Tensor:
    """x (cols,) -> (rows,)."""
    if weight.kind == "gguf":
        integers, scale = quantise(F.pad(x, (0, -len(x) % BYTE_GROUP)).unflatten(0, (-1, BYTE_GROUP)), 127)
        rounded = (integers.double() * scale.double()).flatten()[: len(x)]
        return (weight.values.double() @ rounded).float()
    if weight.kind != "int8":
        return weight.values @ x
    integers, scale = quantise(x, 32767)
    exact = weight.values.double() @ integers.double()
    return exact.float() * weight.scale * scale


def quantized_gemv(weight: Quantized, x: Tensor) -> Tensor:
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


def join(m: Tensor, x: Tensor, how: str, modules: int) -> Tensor:
    """m, x (d,) -> what the convolution of values reads of a position: m, or x beside it (2 d,)."""
    if how == "modules":
        return torch.cat([part.unflatten(0, (modules, -1)) for part in (m, x)], dim=1).flatten()
    return torch.cat((m, x)) if how == "whole" else m


def choose(logits: Tensor, count: int, gate: bool) -> tuple[Tensor, Tensor]:
    """logits (blocks, N) -> chosen units (blocks * count,) and their weights: their probabilities where `gate`."""
    best = logits.sort(dim=-1, descending=True, stable=True).indices[:, :count]  # of equal ones the first
    weights = logits.softmax(-1).gather(-1, best) if gate else torch.ones(best.shape)
    first = torch.arange(len(logits))[:, None] * logits.shape[1]
    return (first + best).flatten(), weights.flatten()


def round_trip(x: Tensor, kind: str) -> Tensor:
    """x (..., n) as it is read back after it was kept as `kind`."""
    if kind == "int8":
        integers, scale = quantise(x, 127)
        return integers * scale
    return x.bfloat16().float() if kind == "bfloat16" else x


def rotate(x: Tensor, angles: Tensor, factor: float = 1.0) -> Tensor:
    """x (H, head width): turn the pairs (i, i + width / 2) of its first `width` elements by angles (width / 2,), and
    multiply them by `factor`."""
    half = len(angles)
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    cosine, sine = angles.cos() * factor, angles.sin() * factor
    turned = first * cosine - second * sine, second * cosine + first * sine
    return torch.cat((*turned, rest), dim=-1)


def soft_cap(x: Tensor, limit: float | None) -> Tensor:
    """x, or limit * tanh(x / limit)."""
    return x if limit is None else limit * torch.tanh(x / limit)


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """q (H, width), keys and values (positions, key_value_heads, width) -> (H, width)."""
    group = q.shape[0] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = soft_cap(torch.einsum("hc,phc->hp", q, keys) * scale, softcap)
    return torch.einsum("hp,phc->hc", scores.softmax(-1), values)


def hash_keys(keys: Tensor, rotations: Tensor, factors: Sequence[int]) -> Tensor:
    """keys (P, H, width), rotations (H, width, rounds, sum of factors / 2) -> buckets (P, H, rounds)."""
    along = torch.einsum("phc,hcra->phra", keys, rotations)
    buckets, scale = torch.zeros(along.shape[:-1], dtype=torch.int64), 1
    for factor, part in zip(factors, along.split([factor // 2 for factor in factors], dim=-1), strict=True):
        buckets += torch.cat((part, -part), dim=-1).argmax(-1) * scale  # the first factor is the lowest digit
        scale *= factor
    return buckets


def attend_alike(q: Tensor, keys: Tensor, values: Tensor, buckets: Tensor, most: int) -> Tensor:
    """q (H, width) of the last key -> (H, width): attention to `most` keys, the last itself, which does not count.

    Keys that hash alike in any round come first, then the most recent ones.
    """
    last = len(keys) - 1
    found = []
    for head in range(len(q)):
        alike = (buckets[:last, head] == buckets[last, head]).any(-1)
        rank = torch.arange(last) + last * alike
        chosen = rank.argsort(descending=True)[: most - 1]
        if not len(chosen):
            chosen = torch.tensor([last])
        own = slice(head, head + 1)
        found.append(attend(q[own], keys[chosen, own], values[chosen, own], scale=1.0))
    return torch.cat(found)


def recur(gates: Tensor, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """A step of a simple recurrent unit: gates (3n,), in the order r, f, y, x and state (n,) -> output and state."""
    r, f, y = gates.chunk(3)
    r, f = r.sigmoid(), f.sigmoid()
    state = f * state + (1 - f) * y
    return r * state + 3**0.5 * (1 - r) * x, state
