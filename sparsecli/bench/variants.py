"""Variants: the models to measure, from a recipe with random weights or from trained runs."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsecli import console
from sparsecli.interchange.importing import GgufWeights
from sparsecli.interchange.sources import ForeignModel, open_source
from sparsecli.model.files import find_model, of_images, read_vision_spec, weight_files
from sparsecli.model.loading import read_config
from sparsecli.model.sizes import TOLERANCE, Sizes, count_parameters, disagreement
from sparsecli.recipe.schema import BenchSpec, PaperFigures, PrecisionChanges, VariantSpec
from sparsecli.spec.model import ModelSpec
from sparsecli.spec.vision import AnySpec, VisionSpec
from sparsecli.train.run_directory import read_facts

Group = Literal["dense", "sparse", "mixture"]

UNCHANGED = PrecisionChanges()
GGUF = ".gguf"


@dataclass(frozen=True)
class Variant:
    """A model to measure: a recipe's variant, or a trained model of `--model`."""

    name: str
    group: Group
    spec: ModelSpec
    sizes: Sizes
    run: Path | None = None  # a trained model's folder, or a GGUF file; without it the weights are random
    held_out_loss: float | None = None
    paper: PaperFigures | None = None
    precision: PrecisionChanges = UNCHANGED
    dtypes: Sequence[str] | None = None  # None: those of the bench; of a trained model also other ones
    measured_layers: int | None = None  # number of blocks that are built; None: all
    vision: VisionSpec | None = None  # of a model of images, whose layers are `spec`
    held_out_accuracy: float | None = None  # of a model of images

    @property
    def whole(self) -> bool:
        """Whether all blocks are built."""
        return self.measured_layers is None or self.measured_layers >= self.spec.layers

    @property
    def gguf(self) -> Path | None:
        """The GGUF file that it is, if it is one."""
        return self.run if self.run and self.run.suffix == GGUF else None

    def weight_types(self, dtypes: Sequence[str]) -> list[str]:
        """Those of `dtypes` in which it is measured, or its own. Codes of a GGUF file stay as they are: their types
        are one."""
        if kept := self.spec.quantization.gguf_types:
            return [kept]
        if self.run and self.dtypes:
            return list(self.dtypes)
        return [dtype for dtype in dtypes if self.dtypes is None or dtype in self.dtypes]


def from_recipe(model: AnySpec, bench: BenchSpec) -> list[Variant]:
    """The recipe's variants: its model with the blocks that each variant replaces."""
    return [
        _from_spec(variant, variant.model.apply(model), bench.measured_layers)
        for variant in bench.variants or ()
    ]


def _from_spec(variant: VariantSpec, spec: AnySpec, measured_layers: int | None) -> Variant:
    limits = [limit for limit in (variant.measured_layers, measured_layers) if limit is not None]
    return Variant(
        variant.name,
        variant.group,
        layers_of(spec),
        count_parameters(spec),
        paper=variant.paper,
        precision=variant.precision,
        dtypes=tuple(variant.dtypes) if variant.dtypes else None,
        measured_layers=min(limits, default=None),
        vision=spec if isinstance(spec, VisionSpec) else None,
    )


def layers_of(spec: AnySpec) -> ModelSpec:
    """The layers of a model of images, or a model of text itself."""
    return spec.stack if isinstance(spec, VisionSpec) else spec


def from_runs(references: Sequence[str]) -> list[Variant]:
    """Trained models: run directories (with their held-out loss), model folders or GGUF files."""
    # Models are distinguished and named by absolute path; messages use the path as it was given.
    folders = {Path(os.path.abspath(folder)): folder for folder in map(_find, references)}
    runs = [path.parent if path.name == "model" else path for path in folders]
    named = zip(_names(runs), runs, folders.values(), strict=True)
    return [_from_run(name, run, folder) for name, run, folder in named]


def _find(reference: str) -> Path:
    file = Path(reference)
    return file if file.suffix == GGUF and file.is_file() else find_model(reference)


def _from_run(name: str, run: Path, folder: Path) -> Variant:
    if folder.suffix == GGUF:
        layers = gguf_weights(folder).spec
        return Variant(name, _group(layers), layers, count_parameters(layers), run=folder)
    weight_files(folder)  # a packed model has none: better reported before anything is built
    vision = read_vision_spec(folder) if of_images(folder) else None
    spec: AnySpec = vision or read_config(folder).spec
    layers = layers_of(spec)
    result = read_facts(run).get("result")
    result = result if isinstance(result, dict) else {}
    return Variant(
        name,
        _group(layers),
        layers,
        count_parameters(spec),
        run=folder,
        held_out_loss=_figure(result.get("held_out_loss")),
        vision=vision,
        held_out_accuracy=_figure(result.get("accuracy")),
    )


def _figure(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def gguf_weights(file: Path) -> GgufWeights:
    """The weights of a GGUF file. Raises `Failure` if it is damaged, or of an architecture that ours cannot express."""
    opened = open_source(str(file))
    assert isinstance(opened, ForeignModel)
    return GgufWeights(opened)


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts above it as make it unique."""
    names = []
    for folder in folders:
        length = 1
        while sum(other.parts[-length:] == folder.parts[-length:] for other in folders) > 1:
            length += 1
        names.append("/".join(folder.parts[-length:]))
    return names


def _group(spec: ModelSpec) -> Group:
    """The group of a model. A mixture has experts; a dense model skips no unit and has no multiplicative layer."""
    if spec.feed_forward.kind == "mixture":
        return "mixture"
    attention = spec.attention
    kinds = {
        spec.feed_forward.kind,
        spec.vocabulary.kind,
        attention.projection.removesuffix("_conv"),
        (attention.output_projection or "dense").removesuffix("_conv"),
    }
    return "dense" if kinds <= {"dense", "none"} else "sparse"


def choose(
    variants: Sequence[Variant],
    *,
    dense: bool = False,
    sparse: bool = False,
    mixture: bool = False,
    names: Sequence[str] | None = None,
) -> list[Variant]:
    """The variants of the chosen groups and names; without a flag, all groups.

    Raises `Failure` if no variant is left, or if none has one of the names.
    """
    known = ", ".join(variant.name for variant in variants)
    for name in names or ():
        if all(variant.name != name for variant in variants):
            raise console.Failure(f"--variant: there is no {name!r} (there are: {known})", exit_code=2)
    variants = [variant for variant in variants if not names or variant.name in names]
    flags: dict[Group, bool] = {"dense": dense, "sparse": sparse, "mixture": mixture}
    groups = [group for group, given in flags.items() if given]
    chosen = [variant for variant in variants if not groups or variant.group in groups]
    if not chosen:
        options = " ".join(f"--{group}" for group in groups)
        raise console.Failure(
            f"no variant belongs to group {' or '.join(groups)} (there are: {known}); leave out {options}"
        )
    return chosen


def check_same_size(variants: Sequence[Variant]) -> str | None:
    """A warning if the parameter counts differ by more than `TOLERANCE`, else None."""
    smallest = min(variants, key=lambda variant: variant.sizes.total)
    largest = max(variants, key=lambda variant: variant.sizes.total)
    if disagreement([variant.sizes for variant in variants]) <= TOLERANCE:
        return None
    return (
        f"the models differ in size: {smallest.name} has {smallest.sizes.total:,} parameters, "
        f"{largest.name} {largest.sizes.total:,}; speed-ups between them do not compare equal models"
    )


def part(spec: ModelSpec, layers: int | None) -> ModelSpec:
    """The model with this number of blocks; None: all of them."""
    if layers is None or layers >= spec.layers:
        return spec
    changed: dict[str, object] = {"layers": layers}
    if spec.rotary_layers:
        changed["rotary_layers"] = spec.rotary_layers[:layers]
    if spec.attention.sliding_layers:
        sliding = {"sliding_layers": spec.attention.sliding_layers[:layers]}
        changed["attention"] = spec.attention.model_copy(update=sliding)
    return spec.model_copy(update=changed)


def with_positions(spec: ModelSpec, positions: int) -> ModelSpec:
    """The model with at least this many positions. Learned ones need a larger table, of which a token reads one row."""
    positions = max(positions, spec.max_positions)
    changed: dict[str, object] = {"max_positions": positions}
    if spec.positions == "axial":
        assert spec.axial
        first, *others = spec.axial.shape
        shape = [max(first, -(-positions // math.prod(others))), *others]
        changed["axial"] = spec.axial.model_copy(update={"shape": shape})
    return spec.model_copy(update=changed)
