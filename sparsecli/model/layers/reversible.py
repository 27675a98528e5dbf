"""Reversible residual layers (Reformer; Terraformer's layers are made of them).

Two streams a and b pass through halves, each of which adds a function of one stream to the other: a <- a + f(b). As
b is still there, a - f(b) undoes it, so that a backward pass needs no stored activations: it walks from the final
pair back to the first, computing every f once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from sparsecli.model.layers.choices import ChoiceRecord
from sparsecli.model.layers.tracing import tracing


@dataclass(frozen=True)
class Half:
    """a <- a + function(b); then the streams change places where `swap` is set.

    Args:
        function: (B, T, d) -> (B, T, d); it may draw random numbers and choose through `recorded_choice`, but must have
            no lasting effect, as it is called again in the backward pass.
        weights: every parameter that it uses.
    """

    function: Callable[[Tensor], Tensor]
    weights: Sequence[nn.Parameter]
    swap: bool = True

    def added(self, b: Tensor, dtype: torch.dtype) -> Tensor:
        """What the half adds to the other stream; it computes in `dtype`, whatever the streams have."""
        return self.function(b.to(dtype))


def reversible_stack(halves: Sequence[Half], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The pair (B, T, d) that `halves` make of (a, b), keeping only that pair for the backward pass.

    Between the forward and the backward pass there lie besides: the state of the random numbers before each half,
    so that dropout and noise come out the same, and its choices (controllers, hash buckets).

    Streams are summed in float32 at least, since narrower ones could not be taken apart again; the pair that is
    returned is as wide as that. Gradients can be taken once (there is no second derivative).
    """
    if not torch.is_grad_enabled() or not halves or tracing():
        return plain_stack(halves, a, b)
    dtype, a, b = _widened(a, b)
    weights = {id(weight): weight for half in halves for weight in half.weights}
    return _ReversibleStack.apply(halves, dtype, a, b, *weights.values())


def plain_stack(halves: Sequence[Half], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `reversible_stack` with ordinary autograd, which stores every activation: its readable twin."""
    dtype, a, b = _widened(a, b)
    for half in halves:
        a = a + half.added(b, dtype)
        if half.swap:
            a, b = b, a
    return a, b


def _widened(a: Tensor, b: Tensor) -> tuple[torch.dtype, Tensor, Tensor]:
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.dtype, a.to(wide), b.to(wide)


@dataclass
class _ForwardState:
    """What a half met when it was computed first: random numbers, automatic casts, and the choices it made."""

    device: torch.device
    random: Tensor = field(default_factory=torch.get_rng_state)
    random_of_devices: tuple[Any, Any] = ((), ())
    choices: ChoiceRecord = field(default_factory=ChoiceRecord)

    @classmethod
    def now(cls, x: Tensor) -> _ForwardState:
        return cls(x.device, random_of_devices=get_device_states(x))

    def restore(self) -> None:
        """Set the random numbers back."""
        torch.set_rng_state(self.random)
        set_device_states(*self.random_of_devices, device_type=self.device.type)


class _ReversibleStack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, halves: Sequence[Half], dtype: torch.dtype, a: Tensor, b: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.halves, ctx.dtype, ctx.weights = halves, dtype, weights
        kind = a.device.type
        ctx.autocast = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
            "cache_enabled": False,  # a half casts a weight once, and what was cast without gradients stays so
        }
        ctx.forward_states = []
        with torch.autocast(**ctx.autocast):
            for half in halves:
                met = _ForwardState.now(a)
                ctx.forward_states.append(met)
                with met.choices.recording():
                    a = a + half.added(b, dtype)
                if half.swap:
                    a, b = b, a
        ctx.save_for_backward(a, b)
        return a, b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_a: Tensor, grad_b: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        gradients: dict[int, Tensor] = {}  # by the identity of the weight, which several halves may share
        devices = [a.device.index] if a.device.index is not None else []
        with torch.random.fork_rng(devices, device_type=a.device.type if devices else "cuda"):
            for half, met in zip(reversed(ctx.halves), reversed(ctx.forward_states), strict=True):
                if half.swap:
                    a, b = b, a
                    grad_a, grad_b = grad_b, grad_a
                met.restore()
                b = b.detach().requires_grad_()
                with torch.enable_grad(), torch.autocast(**ctx.autocast), met.choices.replaying():
                    added = half.added(b, ctx.dtype)
                    wanted = [weight for weight in half.weights if weight.requires_grad]
                a = a - added.detach()
                of_b, *of_weights = torch.autograd.grad(
                    added, [b, *wanted], grad_a.to(added.dtype), allow_unused=True
                )
                if of_b is not None:
                    grad_b = grad_b + of_b
                for weight, gradient in zip(wanted, of_weights, strict=True):
                    if gradient is not None:
                        held = gradients.get(id(weight))
                        gradients[id(weight)] = gradient if held is None else held + gradient
        return None, None, grad_a, grad_b, *(gradients.get(id(weight)) for weight in ctx.weights)
