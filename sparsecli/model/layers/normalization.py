"""Layer norm and RMS norm, chosen by name."""

from __future__ import annotations

from torch import nn


def normalization(kind: str, width: int, epsilon: float) -> nn.Module:
    """The norm called `kind` (`layer` or `rms`) over the last axis of `width`.

    Both add `epsilon` to the biased second moment before the square root, as the original implementation does.
    """
    norms = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
    return norms[kind](width, eps=epsilon)
