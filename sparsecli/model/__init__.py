"""The model package. Names are imported on first use, since torch and transformers take a second to load.

Importing one of them, or `sparsecli.model.auto`, teaches transformers' Auto classes the models.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "DecodeCache",
    "ScalingTransformerConfig",
    "ScalingTransformerEncoderDecoderConfig",
    "ScalingTransformerEncoderDecoderModel",
    "ScalingTransformerForCausalLM",
    "ScalingTransformerForConditionalGeneration",
    "ScalingTransformerForImageClassification",
    "ScalingTransformerModel",
    "ScalingTransformerVisionConfig",
    "ScalingTransformerVisionModel",
    "TerraformerConfig",
    "TerraformerForConditionalGeneration",
    "TerraformerModel",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.auto"), name)
