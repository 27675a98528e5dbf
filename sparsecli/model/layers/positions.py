"""Positions: a trained table, fixed sinusoids, trained vectors of digits or of coordinates, rotated queries and keys.

Nothing here is stored but what is trained: the fixed ones are a few microseconds of arithmetic for a token,
and a model without buffers can be built on the meta device and loaded without special cases.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsecli.spec.positions import DIGIT_BASES, DIGITS


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


class DigitPositions(nn.Module):
    """The digits of a position in several bases, each times a trained vector (Terraformer's fixed-base positions).

    The vectors of the digits of one base lie side by side, and the bases are summed. The first token of a sequence
    gets another trained vector, `start`. In training half of the sequences count from anywhere, so that the model
    does not learn the positions of its training lengths alone, and one in a hundred has no positions at all.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % DIGITS:
            raise ValueError(f"width {width} is not a multiple of the {DIGITS} digits of a position")
        self.weight = nn.Parameter(torch.empty(len(DIGIT_BASES), DIGITS, width // DIGITS))
        self.start = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -1e-4, 1e-4)
        nn.init.uniform_(self.start, -1e-4, 1e-4)

    def forward(self, positions: Tensor) -> Tensor:
        """Vectors (B, T, width) of positions (B, T); position 0 is the first token of its sequence."""
        first = positions == 0
        kept = torch.ones_like(positions[:, :1], dtype=self.weight.dtype)
        if self.training:
            anywhere = torch.randint_like(kept, min(DIGIT_BASES) ** DIGITS, dtype=torch.long)
            positions = positions + anywhere * (torch.rand_like(kept) < 0.5)
            kept = (torch.rand_like(kept) >= 0.01).to(kept.dtype)
        bases = torch.tensor(DIGIT_BASES, device=positions.device)
        powers = bases[:, None] ** torch.arange(DIGITS, device=positions.device)  # (bases, digits)
        digits = positions[..., None, None] // powers % bases[:, None]  # (B, T, bases, digits)
        vectors = torch.einsum("btij,ijw->btjw", digits.to(self.weight.dtype), self.weight).flatten(-2)
        return vectors * kept.unsqueeze(-1) + first.unsqueeze(-1) * self.start


class AxialPositions(nn.Module):
    """Positions as coordinates on a grid, a trained vector for each, side by side (Reformer).

    Args:
        shape: positions along each axis, the last one fastest.
        widths: of each axis' vectors.
    """

    def __init__(self, shape: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        self.axes = nn.ParameterList(
            torch.empty(size, width) for size, width in zip(shape, widths, strict=True)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for axis in self.axes:
            nn.init.normal_(axis)

    def forward(self, positions: Tensor) -> Tensor:
        """Vectors (*positions.shape, sum of widths)."""
        vectors = []
        for axis in reversed(self.axes):
            vectors.append(nn.functional.embedding(positions % len(axis), axis))
            positions = positions // len(axis)
        return torch.cat(vectors[::-1], dim=-1)


class RotaryPositions:
    """Cosines and sines of rotary angles. No module: nothing of it is stored.

    Args:
        frequencies: radians a position of each pair of elements, rotary_width / 2 of them.
        long_frequencies: those of a text of more than `switch` tokens; None where they do not depend on its length.
        attention_factor: what cosines and sines are multiplied by.
    """

    def __init__(
        self,
        frequencies: Sequence[float],
        long_frequencies: Sequence[float] | None = None,
        switch: int = 0,
        attention_factor: float = 1.0,
    ) -> None:
        self.frequencies, self.long_frequencies = list(frequencies), long_frequencies
        self.switch = switch
        self.attention_factor = attention_factor

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, 1, T, rotary_width) of the angles of `positions` (B, T), float32.

        The largest position tells how long the text is.
        """
        turns = torch.tensor(self.frequencies, device=positions.device, dtype=torch.float32)
        if self.long_frequencies is not None:
            long = torch.tensor(self.long_frequencies, device=positions.device, dtype=torch.float32)
            turns = torch.where(positions.max() >= self.switch, long, turns)
        cosine, sine = rotary_angles(positions, turns)
        if self.attention_factor == 1:
            return cosine, sine
        return cosine * self.attention_factor, sine * self.attention_factor

    def is_long(self, positions: Tensor) -> bool | None:
        """Whether the long frequencies turn a text whose last tokens are at `positions`; None: there are none."""
        if self.long_frequencies is None:
            return None
        return bool(positions.max() >= self.switch)


def rotary_angles(positions: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, 1, T, rotary_width) of the rotary angles of `positions` (B, T), float32.

    `turns` are the radians a position of each pair of elements (rotary_width / 2,).
    """
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
