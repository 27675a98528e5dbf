"""Loss and accuracy of a model of images on the images that its run, or a recipe, holds out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sparsecli import console
from sparsecli.console import Failure, progress
from sparsecli.data.images import prepare_images
from sparsecli.interchange.hub import fetch
from sparsecli.model.files import find_model, of_images, read_vision_spec, recipe_of
from sparsecli.model.loading import load_classifier
from sparsecli.recipe.data import ImagesSpec
from sparsecli.recipe.loader import LoadedRecipe, load

BATCH = 64
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class ImageEvaluation:
    """Figures of a model on held-out images."""

    model: str
    data: str
    images: int
    dtype: str
    nats_per_image: float
    accuracy: float
    """Share of the images whose likeliest class is theirs."""
    standard_error: float
    """Of the accuracy."""

    def show(self, json: bool) -> None:
        """Write the figures to stdout."""
        if json:
            console.json_out(asdict(self))
            return
        rows = [
            ("model", f"{self.model}, {self.dtype}"),
            ("images", f"{self.images:,}, {self.data}"),
            ("loss (nats/image)", f"{self.nats_per_image:.4f}"),
            ("accuracy", f"{self.accuracy:.2%} ± {self.standard_error:.2%}"),
        ]
        console.print_table(["evaluation", ""], rows)


def folder_of_images(
    model: str | None, loaded: LoadedRecipe | None, types: Collection[str] | None
) -> Path | None:
    """The folder of the model that `evaluate` is to measure, if that is a model of images.

    Args:
        model: as in `find_model`, or a name on the hub.
    """
    try:
        if model is None or Path(model).exists():
            folder = find_model(model, loaded.output if loaded else None, types)
        else:
            folder = fetch(model)
    except Failure:
        return None  # whoever opens it says why
    return folder if of_images(folder) else None


def evaluate_images(
    folder: Path, loaded: LoadedRecipe | None, dtype: str | None, json: bool
) -> ImageEvaluation:
    """Evaluate and print the result. The images are those that `loaded`, else the recipe of the model's run, holds out.

    Raises:
        Failure: there are no such images, or they do not fit the model.
    """
    if dtype is not None and dtype not in DTYPES:
        raise Failure(f"--dtype: {dtype} is for models of text; expected float32 or bfloat16", exit_code=2)
    stored = recipe_of(folder)
    recipe = loaded or (load(str(stored)) if stored else None)
    data = recipe.recipe.data if recipe else None
    if recipe is None or not isinstance(data, ImagesSpec):
        raise Failure(f"{folder}: name a recipe whose data block has images to evaluate on", exit_code=2)
    spec = read_vision_spec(folder)
    network = load_classifier(folder, getattr(torch, dtype or "float32"))
    examples = prepare_images(data, spec.image_size, spec.classes).held_out
    nats = correct = 0.0
    with torch.inference_mode(), progress("evaluating", len(examples)) as bar:
        for start in range(0, len(examples), BATCH):
            indices = range(start, min(start + BATCH, len(examples)))
            batch = examples.collate([examples[index] for index in indices])
            output = network(batch["pixel_values"].to(network.dtype), labels=batch["labels"])
            nats += output.loss.item() * len(indices)
            correct += (output.logits.argmax(dim=-1) == batch["labels"]).sum().item()
            bar.advance(len(indices))
    accuracy = correct / len(examples)
    result = ImageEvaluation(
        model=str(folder),
        data=f"held out by {recipe.path if loaded is None else recipe.name}",
        images=len(examples),
        dtype=dtype or "float32",
        nats_per_image=nats / len(examples),
        accuracy=accuracy,
        standard_error=(accuracy * (1 - accuracy) / len(examples)) ** 0.5,
    )
    result.show(json)
    return result
