"""Dropout whose mask is shared along axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shared_dropout(x: Tensor, rate: float, training: bool, shared_axes: Sequence[int]) -> Tensor:
    """Inverted dropout with one mask along `shared_axes`.

    The paper's models share it over length: a feature is dropped for a whole sequence (spec of the original
    implementation; an ordinary dropout is `shared_axes=()`).
    """
    if not training or rate == 0:
        return x
    shape = list(x.shape)
    for axis in shared_axes:
        shape[axis] = 1
    keep = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1 - rate)
    return x * keep / (1 - rate)
