"""Matrix products in bfloat16, where they are faster than those in float32."""

from __future__ import annotations

from functools import cache

import torch


@cache
def has_bfloat16(device: str) -> bool:
    """Whether devices of the kind `device` multiply in bfloat16.

    PyTorch imitates them on processors without AVX-512, which takes 5 to 100 times as long as float32.
    """
    return device != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def bfloat16_products(device: str) -> torch.autocast:
    """A context of products in bfloat16; in float32 where there are none."""
    return torch.autocast(device, torch.bfloat16, enabled=has_bfloat16(device))
