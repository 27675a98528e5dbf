"""Models that a run starts from or learns from: found without PyTorch, so that a wrong name is reported at once."""

from __future__ import annotations

from pathlib import Path

from sparsecli.console import Failure
from sparsecli.model.files import find_model
from sparsecli.recipe.schema import Recipe


def initial_model(recipe: Recipe) -> Path | None:
    """The folder of `train.init_from`; None without it. Raises Failure if it holds no model."""
    if recipe.train is None or recipe.train.init_from is None:
        return None
    try:
        return find_model(recipe.train.init_from)
    except Failure as failure:
        instead = "; train.init_from=null starts from random weights" if recipe.model else ""
        raise Failure(f"train.init_from: {failure}{instead}") from None


def teacher_model(recipe: Recipe) -> Path | None:
    """The folder of `train.distillation.teacher`; None without it. Raises Failure if it holds no model."""
    if recipe.train is None or recipe.train.distillation is None:
        return None
    try:
        return find_model(recipe.train.distillation.teacher)
    except Failure as failure:
        raise Failure(f"train.distillation.teacher: {failure}") from None
