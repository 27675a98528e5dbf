"""Whether a forward pass is being recorded as a program for other lengths: it may then not choose by its own."""

from __future__ import annotations

import torch


def tracing() -> bool:
    """True within `torch.export`, `torch.jit.trace` and exports to ONNX; `torch.compile` looks at lengths again."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()
