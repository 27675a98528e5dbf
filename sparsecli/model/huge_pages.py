"""Weights in huge pages: one address translation for 2 MiB, where a sparse decode reads a row here and a row there.

With 4 KiB pages, nearly every row that a sparse layer reads costs a walk through the page tables; on virtual machines
that was a fifth of a token's time (measured at 800M parameters).
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


def aligned(elements: int, dtype: torch.dtype) -> int:
    """`elements`, rounded up so that what follows them is aligned."""
    step = ALIGNMENT // dtype.itemsize
    return -(-elements // step) * step


def huge_page_tensor(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros (elements,) in memory for which huge pages are asked; ordinary memory where the system has none."""
    if elements == 0:
        return torch.zeros(0, dtype=dtype)
    try:
        memory = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError):  # not Linux, or a kernel without them
        return torch.zeros(elements, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=elements)


def move_to_huge_pages(model: nn.Module) -> None:
    """Make the parameters of a model on the CPU, all of one type, views of one huge-page allocation."""
    parameters = list(model.parameters())
    dtype = parameters[0].dtype
    pool = huge_page_tensor(sum(aligned(parameter.numel(), dtype) for parameter in parameters), dtype)
    start = 0
    for parameter in parameters:
        place = pool[start : start + parameter.numel()].view_as(parameter)
        place.copy_(parameter.detach())
        parameter.data = place  # frees the memory it was loaded into
        start += aligned(parameter.numel(), dtype)
