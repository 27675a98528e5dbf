"""Controllers of Sparse FF that learn from units that were not chosen, on some tokens.

In the paper's formula the mask stands before the ReLU, and so a controller learns from the units that it chose and
that are not silent. It never hears that another unit would have served better. With the mask behind the ReLU the values
are the same, since relu(0) = 0, and the gradient of an unchosen unit's mask is what the unit would have added:

    dL/dmask_i = relu(W_up x)_i (W_down dL/dy)_i

That takes every unit of a layer, so it is computed for one token of `period` alone and counts `period` times: the mean
over the tokens stays the same. Only the controller, and the layer's input through it, get a gradient from it, straight
through as ever (paper section 3.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def draw(fraction: float, tokens: int) -> tuple[slice, int]:
    """Which of so many tokens explore in a training call, and how often each counts.

    It is one of `period`, beginning with a random one.
    """
    period = max(1, round(1 / fraction))
    return slice(int(torch.randint(period, ())), tokens, period), period


def weights(chosen: Tensor, explored: slice, period: int) -> Tensor:
    """What multiplies the gradient of every unit's mask: 1 where chosen, `period` for the others of explored tokens.

    Args:
        chosen: the hard mask, ones and zeros (tokens, blocks, N).
    """
    unchosen = torch.zeros_like(chosen)
    unchosen[explored] = period * (1 - chosen[explored])
    return chosen + unchosen


class Unchosen(torch.autograd.Function):
    """y itself; in the backward pass the controller also learns from the unchosen units of explored tokens.

    Args of `apply`:
        y: the layer's output (tokens, d).
        hidden, second, bias: the controller's, (tokens, r), (d_ff, r) and (d_ff), float32.
        values: what every unit gives for the explored tokens (explored, d_ff), before any gate; it gets no gradient.
        down: (d_ff, d), and gets none either.
        chosen: (tokens, blocks, k), any integers.
        explored, period: as `draw` gives them.
        probability_gate: whether a unit's probability multiplies its value.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        hidden: Tensor,
        second: Tensor,
        bias: Tensor,
        values: Tensor,
        down: Tensor,
        chosen: Tensor,
        explored: slice,
        period: int,
        probability_gate: bool,
    ) -> Tensor:
        ctx.save_for_backward(hidden, second, bias, values, down, chosen)
        ctx.explored, ctx.period, ctx.probability_gate = explored, period, probability_gate
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, second, bias, values, down, chosen = ctx.saved_tensors
        explored = ctx.explored
        chosen = chosen[explored].long()
        inner = hidden[explored]
        blocks = chosen.shape[1]
        shape = len(inner), blocks, len(second) // blocks
        p = torch.addmm(bias, inner, second.T).view(shape).softmax(dim=-1)  # (explored, blocks, N)
        dmask = values * (dy[explored].to(values.dtype) @ down.to(values.dtype).T)
        dmask = dmask.float().mul_(ctx.period).view(shape)
        if ctx.probability_gate:
            dmask *= p
        dmask.scatter_(-1, chosen, 0.0)  # theirs comes with those of all tokens
        dlogits = (p * (dmask - (p * dmask).sum(dim=-1, keepdim=True))).flatten(1)  # (explored, d_ff)
        dhidden = torch.zeros_like(hidden)
        dhidden[explored] = dlogits @ second
        return dy, dhidden, dlogits.T @ inner, dlogits.sum(dim=0), *[None] * 6
