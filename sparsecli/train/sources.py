"""What a run begins with, found before PyTorch is imported, which takes seconds."""

from __future__ import annotations

from pathlib import Path

from sparsecli.data.corpus import matching
from sparsecli.model.files import named_model
from sparsecli.recipe.data import FilesCorpus
from sparsecli.recipe.schema import Recipe


def initial_model(recipe: Recipe) -> Path | None:
    """The folder of `train.init_from`. Raises `Failure` if there is no such model."""
    start = recipe.train and recipe.train.init_from
    instead = "; train.init_from=null starts from random weights" if recipe.model else ""
    return named_model("train.init_from", start, instead) if start else None


def teacher(recipe: Recipe) -> Path | None:
    """The folder of `train.distillation.teacher`. Raises `Failure` if there is no such model."""
    distillation = recipe.train and recipe.train.distillation
    return named_model("train.distillation.teacher", distillation.teacher) if distillation else None


def check(recipe: Recipe) -> None:
    """Raise `Failure` if a model or a file that the recipe names is not there."""
    initial_model(recipe)
    teacher(recipe)
    if isinstance(recipe.data, FilesCorpus):
        for key in ("paths", "held_out_paths"):
            for pattern in getattr(recipe.data, key) or ():
                matching(pattern, f"data.{key}")
