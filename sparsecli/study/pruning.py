"""Pruned models: whole feed-forward units and attention heads removed, or single weights set to zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparsecli.model.auto import Network, build_network
from sparsecli.model.layers.feed_forward import DenseFeedForward, MixtureFeedForward, SparseFeedForward
from sparsecli.model.layers.spark import SparkFeedForward
from sparsecli.recipe.budget import parse_share
from sparsecli.recipe.schema import PruneSpec, granule
from sparsecli.spec.model import ModelSpec

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
Axes = dict[str, tuple[int, int]]
"""By a parameter's name: the axis on which things are removed, and how many of its rows each of them has."""


def pruned(model: Network, spec: PruneSpec) -> Network:
    """A copy of `model` without what `spec` removes, by the norms of weights.

    Units and heads are those with the smallest L2 norm of all weights that belong to them, the same number in every
    layer. Single weights are the smallest of all layers together.
    """
    changed = spec.apply(model.config.spec)
    tokens = {name: getattr(model.config, name) for name in TOKENS}
    made = build_network(changed, **tokens).eval()
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    if spec.units:
        for name, layer in model.named_modules():
            if isinstance(
                layer, DenseFeedForward | SparseFeedForward | MixtureFeedForward | SparkFeedForward
            ):
                _remove(weights, f"{name}.", _unit_axes(layer), _granules(model.config.spec, changed))
    if spec.heads:
        for name, _ in model.named_modules():
            if name.endswith(".attention"):
                _remove(weights, f"{name}.", _head_axes(model.config.spec), _groups(changed))
    made.load_state_dict(weights)
    if spec.weights:
        _zero_smallest(made, parse_share(spec.weights))
    return made


def zeros(model: nn.Module) -> float:
    """Share of the weights of the layers' matrices that are zero."""
    matrices = [getattr(layer, name) for layer, name in _matrices(model)]
    return sum(int((weight == 0).sum()) for weight in matrices) / sum(weight.numel() for weight in matrices)


# -- whole units and heads -----------------------------------------------------------------------------------


def _granules(before: ModelSpec, after: ModelSpec) -> int:
    """Units, blocks or experts that are left."""
    return after.feed_forward.d_ff // granule(before.feed_forward)


def _unit_axes(layer: nn.Module) -> Axes:
    """The parameters of a feed-forward layer that have a row or a column for every unit."""
    if isinstance(layer, DenseFeedForward):
        rows = [f"{name}.{part}" for name in ("up", "gate") for part in ("weight", "bias")]
        return dict.fromkeys(rows, (0, 1)) | {"down.weight": (1, 1)}
    size = 1
    if isinstance(layer, SparseFeedForward):
        size = layer.block_size
    elif isinstance(layer, MixtureFeedForward):
        size = len(layer.up) // layer.experts
    names = ("up", "gate", "down", "unit_bias", "controller.second", "controller.bias", "predictor")
    return dict.fromkeys(names, (0, size)) | {"router.weight": (0, 1)}


def _groups(spec: ModelSpec) -> int:
    return spec.attention.key_value_heads or spec.heads


def _head_axes(spec: ModelSpec) -> Axes:
    """The parameters of an attention layer by heads, or by groups of heads that share keys and values."""
    width, groups = spec.width_of_head, _groups(spec)
    queries = spec.heads // groups * width
    sizes = {"query": queries, "key": width, "value": width}
    axes = {
        f"projection.{name}.{part}": (0, size) for name, size in sizes.items() for part in ("weight", "bias")
    }
    if spec.attention.query_key_norm and spec.attention.query_key_norm_over == "projection":
        axes |= {"projection.query_norm.weight": (0, queries), "projection.key_norm.weight": (0, width)}
    return axes | {"output.weight": (1, queries)}


def _remove(weights: dict[str, Tensor], prefix: str, axes: Axes, kept: int) -> None:
    """Keep the `kept` units, or heads, with the largest norms, in their order."""
    parts = {prefix + name: where for name, where in axes.items() if prefix + name in weights}
    rows = [
        weights[name].movedim(axis, 0).reshape(-1, size * weights[name].numel() // weights[name].shape[axis])
        for name, (axis, size) in parts.items()
    ]
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.cat(rows, dim=1))  # everything that belongs to each
    prune.ln_structured(holder, "weight", amount=len(holder.weight) - kept, n=2, dim=0)
    mask = holder.weight_mask
    assert isinstance(mask, Tensor)
    chosen = mask[:, 0].nonzero()[:, 0]
    for name, (axis, size) in parts.items():
        at = (chosen[:, None] * size + torch.arange(size)).flatten()
        weights[name] = weights[name].index_select(axis, at)


# -- single weights ------------------------------------------------------------------------------------------


def _matrices(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The matrices of all layers, as modules and names of parameters."""
    return [
        (module, name)
        for path, module in model.named_modules()
        if ".layers." in path
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim > 1
    ]


def _zero_smallest(model: nn.Module, share: float) -> None:
    matrices = _matrices(model)
    prune.global_unstructured(matrices, pruning_method=prune.L1Unstructured, amount=share)
    for module, name in matrices:
        prune.remove(module, name)  # the zeros stay in the weights
