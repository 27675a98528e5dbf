"""KL divergence over a vocabulary, in slices that stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SLICE = 2**21
"""Logits per slice. With a vocabulary of 50k tokens, whole float32 copies of the logits took longer than a fifth of a
training step."""


class Rows(Protocol):
    """A tensor, or something whose rows are computed when they are needed."""

    def split(self, rows: int) -> Iterator[Tensor] | tuple[Tensor, ...]:
        """The rows in order, `rows` at a time."""


def divergence(student: Tensor, teacher: Rows, temperature: float = 1.0) -> Tensor:
    """Mean over the tokens of KL(teacher || student) in nats, times the temperature's square, as a scalar.

    The square keeps the gradient's size independent of the temperature. Computed in float32 for logits of any
    type. Only the student gets a gradient.

    Args:
        student, teacher: logits (tokens, V). The teacher's are read once, in slices.
        temperature: divides the logits of both.
    """
    loss: Tensor = _Divergence.apply(student, teacher, temperature)
    return loss


class _Divergence(torch.autograd.Function):
    """The forward pass also computes the gradient: T (q - p) / tokens."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Rows, temperature: float) -> Tensor:
        tokens, vocabulary = student.shape
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student) if wanted else student
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        rows = max(1, SLICE // vocabulary)
        slices = zip(student.split(rows), teacher.split(rows), gradient.split(rows), strict=True)
        for ours, theirs, slope in slices:
            log_q = (ours.float() / temperature).log_softmax(dim=-1)
            log_p = (theirs.float() / temperature).log_softmax(dim=-1)
            p = log_p.exp()
            total += torch.dot(p.flatten(), log_p.sub_(log_q).flatten())
            if wanted:
                slope.copy_(log_q.exp_().sub_(p).mul_(temperature / tokens))
        if wanted:
            ctx.save_for_backward(gradient)
        return (total * (temperature**2 / tokens)).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * slope.to(gradient.dtype), None, None
