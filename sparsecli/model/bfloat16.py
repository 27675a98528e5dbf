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
