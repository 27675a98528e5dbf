"""Stages of training in which layers use more units than the model's own k, so that they begin as nearly dense ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sparsecli.console import Failure
from sparsecli.spec.feed_forward import FeedForwardSpec


def check_start_units(block: str, start: int, feed_forward: FeedForwardSpec) -> None:
    """Raise `Failure`, naming the recipe's block, unless the model's layers can use so many units of each of theirs."""
    units = getattr(feed_forward, "block_size", None)
    if units is None:
        raise Failure(
            f"{block}.start_units_per_block: the model's feed-forward layers choose no units; leave it out"
        )
    if start > units:
        raise Failure(
            f"{block}.start_units_per_block: {start} is more than the model's units per block, {units}"
        )


@contextmanager
def in_stage(model: nn.Module, start: int | None, step: int, steps: int) -> Iterator[None]:
    """While open, layers that choose units use as many of each block as in a step of the first half of `steps`.

    They start with `start` units per block; None: with their own k. Each stage halves the number, until all layers have
    reached their k.
    """
    choosing = [vars(module) for module in model.modules() if "units_per_block" in vars(module)]
    own = [values["units_per_block"] for values in choosing]
    for values, units in zip(choosing, own, strict=True):
        if start:
            values["units_per_block"] = max(units, start >> _stage(start, min(own), step, steps))
    try:
        yield
    finally:
        for values, units in zip(choosing, own, strict=True):
            values["units_per_block"] = units


def _stage(start: int, least: int, step: int, steps: int) -> int:
    """How often `start` has been halved at a step: at equal intervals in the first half, until at most `least`."""
    stages = 0
    while start >> stages > least:
        stages += 1
    return min(stages, 2 * step * stages // steps)
