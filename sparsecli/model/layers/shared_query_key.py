"""Attention whose queries are its keys too (Reformer): one projection less, and tokens that can be hashed alike.

A key is its query scaled to unit length, so that scores stay comparable, and a token sees itself only where there is
nothing else to see: it would always be its own best match.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

HIDDEN = -1e9
"""The score of what a token may not see."""
ITSELF = -1e5
"""The score of a token to itself: above what is hidden, below everything else."""


def unit_keys(q: Tensor) -> Tensor:
    """Keys of queries (..., d_head): the same direction, length one."""
    wide = q.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * q.shape[-1] ** -0.5
    return (wide * scale).to(q.dtype)


def attend_shared(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = True, dropout: float = 0.0
) -> Tensor:
    """Attention of queries (B, H, T, d_head), the last positions of the keys, as (B, H, T, d_head).

    Args:
        k, v: (B, H, past + T, d_head), k as `unit_keys` makes them: scores are not scaled further.
        mask: bool (B, 1, T or 1, past + T), false where a query may not look.
        causal: a query sees no position after its own, whatever the mask says.
        dropout: of the attention weights.
    """
    key = torch.arange(k.shape[2], device=q.device)
    query = key[k.shape[2] - q.shape[2] :, None]
    hidden = key > query if causal else torch.zeros_like(query == key)
    if mask is not None:
        hidden = hidden | ~mask
    lowest = torch.finfo(q.dtype).min  # of half precision, which has no numbers as low as the scores
    bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
    bias = bias.masked_fill_(hidden, max(HIDDEN, lowest)).masked_fill_(key == query, max(ITSELF, lowest / 2))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=1.0)
