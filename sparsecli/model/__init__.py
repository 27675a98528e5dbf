"""The model package. Names are imported on first use, since torch and transformers take a second to load."""

from __future__ import annotations

import importlib
import sys
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
    """Teach transformers' AutoConfig our model types: importing the module does it."""
    _import_unless_under_way("configuration")


def register() -> None:
    """Teach transformers' Auto classes our models: importing the module does it."""
    _import_unless_under_way("causal_lm", "blocks")


def _import_unless_under_way(module: str, *parts: str) -> None:
    """Import `module`, which registers itself, but not while it or one of its `parts` is being imported right now."""
    if not any(f"{__name__}.{name}" in sys.modules for name in (module, *parts)):
        importlib.import_module(f"{__name__}.{module}")
