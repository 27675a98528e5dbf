"""What is measured: the variants of a recipe with random weights, or trained runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sparsecli import console
from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM
from sparsecli.model.architecture import ModelSpec
from sparsecli.model.checkpoint import load_model, read_config
from sparsecli.model.folder import find_model
from sparsecli.model.memory import aligned, huge_page_tensor
from sparsecli.model.sizes import TOLERANCE, Sizes, count_parameters, disagreement
from sparsecli.recipe.schema import BenchSpec, PaperFigures
from sparsecli.train.run_directory import read_facts

TILE = 16_777_213  # an odd length, so that no two matrices start at the same phase of the repeated tile
STANDARD_DEVIATION = 0.02
BIAS_SCALE = 1e-3


@dataclass(frozen=True)
class Candidate:
    """A model to measure."""

    name: str
    group: Literal["dense", "sparse"]
    spec: ModelSpec
    sizes: Sizes
    run: Path | None = None  # a trained model's folder; without it the weights are random
    held_out_nats: float | None = None
    paper: PaperFigures | None = None


# -- choosing ------------------------------------------------------------------------------------------------


def from_recipe(model: ModelSpec, bench: BenchSpec) -> list[Candidate]:
    """The recipe's variants: its model with the blocks that each variant replaces."""
    specs = [variant.apply(model) for variant in bench.variants]
    return [
        Candidate(variant.name, variant.group, spec, count_parameters(spec), paper=variant.paper)
        for variant, spec in zip(bench.variants, specs, strict=True)
    ]


def from_runs(references: Sequence[str]) -> list[Candidate]:
    """Trained models: run directories (with their held-out loss) or Hugging Face folders."""
    # The absolute path tells models apart and names them; messages keep to the path as it was given.
    folders = {Path(os.path.abspath(folder)): folder for folder in map(find_model, references)}
    runs = [path.parent if path.name == "model" else path for path in folders]
    named = zip(_names(runs), runs, folders.values(), strict=True)
    return [_from_run(name, run, folder) for name, run, folder in named]


def _from_run(name: str, run: Path, folder: Path) -> Candidate:
    spec = read_config(folder).spec
    nats = (read_facts(run).get("result") or {}).get("held_out_nats")
    return Candidate(name, _group(spec), spec, count_parameters(spec), run=folder, held_out_nats=nats)


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, after as many parts above it as tell it from the others."""
    names = []
    for folder in folders:
        length = 1
        while sum(other.parts[-length:] == folder.parts[-length:] for other in folders) > 1:
            length += 1
        names.append("/".join(folder.parts[-length:]))
    return names


def _group(spec: ModelSpec) -> Literal["dense", "sparse"]:
    """Dense: no unit of the feed-forward layer is skipped, and no layer is multiplicative."""
    attention = spec.attention
    kinds = {
        spec.feed_forward.kind,
        spec.vocabulary.kind,
        attention.projection.removesuffix("_conv"),
        (attention.output_projection or "dense").removesuffix("_conv"),
    }
    return "dense" if kinds <= {"dense", "none"} else "sparse"


def choose(candidates: Sequence[Candidate], *, dense: bool, sparse: bool) -> list[Candidate]:
    """Those of the wanted groups; neither flag means both. Raises `Failure` when none is left."""
    wanted = {"dense": dense or not sparse, "sparse": sparse or not dense}
    chosen = [candidate for candidate in candidates if wanted[candidate.group]]
    if not chosen:
        missing = "dense" if dense else "sparse"
        names = ", ".join(candidate.name for candidate in candidates)
        raise console.Failure(
            f"no variant belongs to group {missing} (there are: {names}); leave out --{missing}"
        )
    return chosen


def check_same_size(candidates: Sequence[Candidate]) -> str | None:
    """A sentence when the parameter counts differ by more than `TOLERANCE`, else None."""
    smallest = min(candidates, key=lambda candidate: candidate.sizes.total)
    largest = max(candidates, key=lambda candidate: candidate.sizes.total)
    if disagreement([candidate.sizes for candidate in candidates]) <= TOLERANCE:
        return None
    return (
        f"the models differ in size: {smallest.name} has {smallest.sizes.total:,} parameters, "
        f"{largest.name} {largest.sizes.total:,}; speed-ups between them are not of equal models"
    )


def part(spec: ModelSpec, layers: int | None) -> ModelSpec:
    """The model with only so many of its blocks; None: all of them."""
    return spec if layers is None or layers >= spec.layers else spec.model_copy(update={"layers": layers})


# -- weights -------------------------------------------------------------------------------------------------


def empty_model(spec: ModelSpec) -> ScalingTransformerForCausalLM:
    """The model without storage: nothing but its parameters is ever stored, so that they are all it lacks."""
    with torch.device("meta"):
        return ScalingTransformerForCausalLM(ScalingTransformerConfig.from_spec(spec))


def random_pool(elements: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal numbers for all variants of one dtype, which lie on the same memory: they never run at once.

    One random tile is repeated, since drawing billions of numbers would take longer than measuring.
    """
    generator = torch.Generator().manual_seed(seed)
    tile = torch.empty(min(TILE, elements)).normal_(0, STANDARD_DEVIATION, generator=generator).to(dtype)
    pool = huge_page_tensor(elements, dtype)
    for start in range(0, elements, TILE):
        part = pool[start : start + TILE]
        part.copy_(tile[: len(part)])
    return pool


def _layout(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Matrices, which come from the pool; vectors (biases, normalisation) get their own memory."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.dim() > 1)


def pool_elements(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Elements of the pool that one model needs, alignment included."""
    return sum(aligned(parameter.numel(), dtype) for _, parameter in _layout(empty_model(spec)))


def random_weights(spec: ModelSpec, pool: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights by name: matrices as views into `pool`, biases small, normalisation weights one."""
    model = empty_model(spec)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    position = 0
    for name, parameter in _layout(model):
        weights[name] = pool[position : position + parameter.numel()].view(parameter.shape)
        position += aligned(parameter.numel(), pool.dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() <= 1:
            if "norm" in name and name.endswith("weight"):
                weights[name] = torch.ones(parameter.shape, dtype=pool.dtype)
            else:
                values = torch.empty(parameter.shape).normal_(0, BIAS_SCALE, generator=generator)
                weights[name] = values.to(pool.dtype)
    return weights


def trained_weights(folder: Path, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
    """A trained model's parameters by name."""
    model, _ = load_model(folder, dtype)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
