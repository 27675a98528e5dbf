"""Positions: a trained table, fixed sinusoids, or rotated queries and keys.

Nothing here is stored but the trained table: the fixed ones are a few microseconds of arithmetic for a token,
and a model without buffers can be built on the meta device and loaded without special cases.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def sinusoids(positions: Tensor, width: int, interleaved: bool) -> Tensor:
    """Sine and cosine features (*positions.shape, width) of integer `positions`, frequencies 10000^(-2i/width).

    `interleaved` puts sine on even and cosine on odd features; otherwise all sines come first.
    """
    frequencies = 10000.0 ** (
        -torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    )
    angles = positions.unsqueeze(-1).float() * frequencies
    features = (angles.sin(), angles.cos())
    return torch.stack(features, -1).flatten(-2) if interleaved else torch.cat(features, -1)


class LearnedPositions(nn.Module):
    """A trained table (max_positions, width) that starts as interleaved sinusoids (the original's default)."""

    def __init__(self, max_positions: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_positions, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        max_positions, width = self.weight.shape
        nn.init.zeros_(self.weight)  # goes through the hook that spares weights already loaded
        if not getattr(self.weight, "_is_hf_initialized", False):
            with torch.no_grad():
                table = sinusoids(
                    torch.arange(max_positions, device=self.weight.device), width, interleaved=True
                )
                self.weight.copy_(table)

    def forward(self, positions: Tensor) -> Tensor:
        """Vectors (*positions.shape, width)."""
        return nn.functional.embedding(positions, self.weight)


class SinusoidalPositions(nn.Module):
    """Fixed positions: all sines, then all cosines."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, positions: Tensor) -> Tensor:
        """Vectors (*positions.shape, width), float32."""
        return sinusoids(positions, self.width, interleaved=False)


def rotary_angles(positions: Tensor, frequencies: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, 1, T, rotary_width) of the rotary angles of `positions` (B, T), float32.

    `frequencies` are the radians a position of each pair of elements: rotary_width / 2 of them.
    """
    turns = torch.tensor(frequencies, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, :, None].float() * turns
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (i, i + rotary_width / 2) of `x` (B, H, T, head_width) by its angle (Llama's layout).

    What lies behind the first rotary_width elements of a head stays as it is.
    """
    cosine, sine = (part.to(x.dtype) for part in angles)
    turned, rest = x.tensor_split((cosine.shape[-1],), dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosine + torch.cat((-second, first), dim=-1) * sine
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
