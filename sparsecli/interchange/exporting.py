"""`sparsecli export`: writes an imported model in the layout of its original architecture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.interchange.architectures import ForeignArchitecture, ForeignTensor
from sparsecli.interchange.safetensors_files import SafetensorsReader, check_finite, unstacked, write_shards
from sparsecli.interchange.sources import DESCRIPTIONS, read_architecture
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

TRAINING_FIELDS = {"dropout", "initialization"}
"""Fields that only training reads, which may differ from the import."""


def run(*, model: str, output: Path) -> None:
    """The `export` command: a folder that transformers loads without sparsecli.

    Raises:
        Failure: no model or a damaged one, one that was converted or never imported, or an output that is there
            already or cannot be written.
    """
    folder = find_model(model)
    spec = read_description(folder).spec
    fields = read_json(folder / CONFIG)
    architecture, config = _original_architecture(folder, spec, fields)
    check_weights(folder, spec)
    if output.exists():
        raise Failure(f"{output}: is there already; choose another --output")
    tensors = SafetensorsReader(weight_files(folder))

    def to_foreign(part: ForeignTensor) -> Mapping[str, Tensor]:
        ours = [tensors.read(name) for name in part.ours]
        for name, tensor in zip(part.ours, ours, strict=True):
            check_finite(name, tensor)
        return unstacked(part.name, part.layout.to_foreign(ours, spec))

    with written_beside(output) as beside:
        config["dtype"] = fields.get("dtype", "float32")
        (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in DESCRIPTIONS[1:]:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, beside / name)
        write_shards(
            beside,
            architecture.foreign_tensors(spec),
            size=lambda part: (
                sum(tensors.types[name].itemsize for name in part.ours) // len(part.ours) * part.elements
            ),
            make=to_foreign,
            description="exporting tensors",
        )
    console.say(f"wrote {output}, a {architecture.class_name} for transformers")


def _original_architecture(
    folder: Path, spec: ModelSpec, fields: dict[str, Any]
) -> tuple[ForeignArchitecture, dict[str, Any]]:
    """The original architecture of an imported model, and its config.json."""
    if spec.feed_forward.kind not in ("dense", "mixture"):
        raise Failure(
            f"{folder}: its feed-forward layers are {spec.feed_forward.kind}, not dense any more; "
            "no other program has such a layer"
        )
    origin = fields.get("origin")
    if not isinstance(origin, dict) or not isinstance(origin.get("config"), dict):
        raise Failure(
            f"{folder}: was not imported from another architecture, so it cannot be exported to one"
        )
    config = {name: value for name, value in origin["config"].items() if name != "torch_dtype"}
    try:
        architecture, original = read_architecture(config)
    except Failure as failure:
        raise Failure(f"{folder / CONFIG}: origin.config: {failure.message}") from failure
    for name in ModelSpec.model_fields.keys() - TRAINING_FIELDS:
        now, then = getattr(spec, name), getattr(original, name)
        if now != then:
            raise Failure(
                f"{folder}: {name} is not as it was imported; {architecture.class_name} cannot express it"
            )
    return architecture, {**config, "architectures": [architecture.class_name]}
