"""`sparsecli export`: a dense model that was imported, back in the layout of its own architecture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.interchange.families import Family, Part
from sparsecli.interchange.shards import StoredTensors, check_finite, write_shards
from sparsecli.interchange.sources import DESCRIPTIONS, read_family
from sparsecli.model.files import (
    CONFIG,
    check_weights,
    find_model,
    read_description,
    read_json,
    weight_files,
    written_beside,
)
from sparsecli.spec.model import ModelSpec

FREE = {"dropout", "initialization"}
"""What may change without the model becoming another one: only training reads it."""


def run(*, model: str, output: Path) -> None:
    """The `export` command: a folder that transformers loads without sparsecli.

    Raises:
        Failure: no model or a damaged one, one that is not dense or was never imported, or an output that is there
            already or cannot be written.
    """
    folder = find_model(model)
    spec = read_description(folder).spec
    fields = read_json(folder / CONFIG)
    family, config = _origin(folder, spec, fields)
    check_weights(folder, spec)
    if output.exists():
        raise Failure(f"{output}: is there already; choose another --output")
    tensors = StoredTensors(weight_files(folder))

    def fold(part: Part) -> Mapping[str, Tensor]:
        ours = [tensors.read(name) for name in part.ours]
        for name, tensor in zip(part.ours, ours, strict=True):
            check_finite(name, tensor)
        return {part.name: part.form.fold(ours, spec)}

    with written_beside(output) as beside:
        config["dtype"] = fields.get("dtype", "float32")
        (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in DESCRIPTIONS[1:]:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, beside / name)
        write_shards(
            beside,
            family.parts(spec),
            size=lambda part: (
                sum(tensors.types[name].itemsize for name in part.ours) // len(part.ours) * part.elements
            ),
            make=fold,
            description="exporting tensors",
        )
    console.say(f"wrote {output}, a {family.architecture} for transformers")


def _origin(folder: Path, spec: ModelSpec, fields: dict[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family of an imported model, and the config.json that it came with."""
    if spec.feed_forward.kind != "dense":
        raise Failure(
            f"{folder}: its feed-forward layers are {spec.feed_forward.kind}, not dense any more; "
            "no other program has such a layer"
        )
    origin = fields.get("origin")
    if not isinstance(origin, dict) or not isinstance(origin.get("config"), dict):
        raise Failure(f"{folder}: was not imported from another architecture, so there is none to go back to")
    config = {name: value for name, value in origin["config"].items() if name != "torch_dtype"}
    try:
        family, original = read_family(config)
    except Failure as failure:
        raise Failure(f"{folder / CONFIG}: origin.config: {failure.message}") from failure
    for name in ModelSpec.model_fields.keys() - FREE:
        now, then = getattr(spec, name), getattr(original, name)
        if now != then:
            raise Failure(
                f"{folder}: {name} is not as it was imported; {family.architecture} cannot express it"
            )
    return family, {**config, "architectures": [family.architecture]}
