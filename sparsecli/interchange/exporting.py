"""`sparsecli export`: writes a model in the layout of its original architecture, or as a GGUF file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.interchange.architectures import ForeignArchitecture, ForeignTensor
from sparsecli.interchange.hub import DESCRIPTIONS
from sparsecli.interchange.safetensors_files import SafetensorsReader, check_finite, unstacked, write_shards
from sparsecli.interchange.sources import read_architecture
from sparsecli.model.files import CONFIG, check_weights, find_model, read_description, read_json, weight_files
from sparsecli.model.outputs import check_new, written_beside
from sparsecli.model.tokenizer import GGUF_METADATA
from sparsecli.spec.model import ModelSpec

Format = Literal["huggingface", "gguf"]

TRAINING_FIELDS = {"dropout", "initialization"}
"""Fields that only training reads, which may differ from the import."""


def run(*, model: str, output: Path, format: Format = "huggingface") -> None:
    """The `export` command: a folder that transformers loads without sparsecli, or a file for llama.cpp.

    Raises:
        Failure: no model or a damaged one, one that the format cannot express, or an output that is there already or
            cannot be written.
    """
    folder = find_model(model)
    check_new(output)
    (_export_gguf if format == "gguf" else _export_huggingface)(folder, output)


def _export_gguf(folder: Path, output: Path) -> None:
    from sparsecli.interchange import gguf_exporting

    description = read_description(folder)
    _check_layers(folder, description.spec)
    check_weights(folder, description.spec)
    origin = read_json(folder / CONFIG).get("origin")
    kind = gguf_exporting.export(folder, description, origin["config"] if origin else None, output)
    console.say(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB), a {kind} for llama.cpp")
    if description.spec.quantization.head_candidates:
        console.say("the file has the exact logits; the sketch that finds the likeliest tokens is left out")


def _export_huggingface(folder: Path, output: Path) -> None:
    spec = read_description(folder).spec
    fields = read_json(folder / CONFIG)
    architecture, config = _original_architecture(folder, spec, fields)
    check_weights(folder, spec)
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
            if name != GGUF_METADATA and (folder / name).is_file():
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


def _check_layers(folder: Path, spec: ModelSpec) -> None:
    """Raise Failure where other programs have no such layers."""
    if spec.feed_forward.kind not in ("dense", "mixture"):
        raise Failure(
            f"{folder}: its feed-forward layers are {spec.feed_forward.kind}, not dense any more; "
            "no other program has such a layer"
        )


def _original_architecture(
    folder: Path, spec: ModelSpec, fields: dict[str, Any]
) -> tuple[ForeignArchitecture, dict[str, Any]]:
    """The original architecture of an imported model, and its config.json."""
    _check_layers(folder, spec)
    if spec.quantization.gguf:
        raise Failure(f"{folder}: its weights keep the codes of a GGUF file; export it with --format gguf")
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
