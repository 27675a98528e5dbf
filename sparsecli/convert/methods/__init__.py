"""The conversion methods by name. Each replaces a dense feed-forward layer by another kind."""

from __future__ import annotations

from sparsecli.convert.methods.base import Method
from sparsecli.convert.methods.controller import ControllerMethod
from sparsecli.convert.methods.precision import PrecisionMethod
from sparsecli.convert.methods.selector import ExactMethod, SelectorMethod
from sparsecli.spec.feed_forward import FeedForwardSpec

METHODS: dict[str, Method] = {
    method.name: method for method in (PrecisionMethod(), SelectorMethod(), ControllerMethod(), ExactMethod())
}


def method_of(layer: FeedForwardSpec) -> str | None:
    """The name of the method that produces such a layer; None for layers that no method produces, e.g. dense ones."""
    if layer.kind == "selector":
        return "exact" if layer.choice == "positive" else "selector"
    return {"sparse": "controller", "precision": "precision"}.get(layer.kind)
