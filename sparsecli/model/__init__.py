"""The model package. Names are imported on first use, since torch and transformers take a second to load."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ScalingTransformerConfig": "configuration",
    "ScalingTransformerEncoderDecoderConfig": "configuration",
    "TerraformerConfig": "configuration",
    "ScalingTransformerModel": "causal_lm",
    "ScalingTransformerForCausalLM": "causal_lm",
    "ScalingTransformerEncoderDecoderModel": "encoder_decoder",
    "ScalingTransformerForConditionalGeneration": "encoder_decoder",
    "TerraformerModel": "terraformer",
    "TerraformerForConditionalGeneration": "terraformer",
    "DecodeCache": "cache",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def register_config() -> None:
    """Teach transformers' AutoConfig our model types: importing the module does it."""
    importlib.import_module(f"{__name__}.configuration")


def register() -> None:
    """Teach transformers' Auto classes our models: importing their modules does it."""
    for module in ("causal_lm", "encoder_decoder", "terraformer"):
        importlib.import_module(f"{__name__}.{module}")
