"""The model package. Names are imported on first use, since torch and transformers take a second to load."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ScalingTransformerConfig": "configuration",
    "ScalingTransformerModel": "causal_lm",
    "ScalingTransformerForCausalLM": "causal_lm",
    "DecodeCache": "cache",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def register_config() -> None:
    """Teach transformers' AutoConfig our model types."""
    from transformers import AutoConfig

    from sparsecli.model.configuration import ScalingTransformerConfig

    AutoConfig.register(ScalingTransformerConfig.model_type, ScalingTransformerConfig, exist_ok=True)


def register() -> None:
    """Teach transformers' Auto classes our models."""
    from transformers import AutoModel, AutoModelForCausalLM

    from sparsecli.model.causal_lm import ScalingTransformerForCausalLM, ScalingTransformerModel
    from sparsecli.model.configuration import ScalingTransformerConfig

    register_config()
    AutoModel.register(ScalingTransformerConfig, ScalingTransformerModel, exist_ok=True)
    AutoModelForCausalLM.register(ScalingTransformerConfig, ScalingTransformerForCausalLM, exist_ok=True)
