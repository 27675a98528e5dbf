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
    _import_unless_under_way("causal_lm")


def _import_unless_under_way(module: str) -> None:
    """A module that is being imported right now registers itself when it is done."""
    if f"{__name__}.{module}" not in sys.modules:
        importlib.import_module(f"{__name__}.{module}")
