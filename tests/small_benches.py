"""A tiny benchmark, and results with given samples, for the tests of `bench`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparsecli.bench import random_weights, timing
from sparsecli.bench.decoders.torch import TorchModel
from sparsecli.bench.result import Bandwidth, BenchResult, Machine, Row, Settings
from sparsecli.decode.engine import Engine
from sparsecli.decode.native import binding
from sparsecli.decode.packed.precision import Precision
from sparsecli.recipe.loader import LoadedRecipe
from sparsecli.recipe.schema import PaperFigures, Recipe
from sparsecli.spec.model import ModelSpec

LOSS = {"kind": "multiplicative", "size": 50, "modules": 2}
DENSE = {"kind": "dense", "d_ff": 64}
SPARSE = {"kind": "sparse", "d_ff": 64, "block_size": 8, "rank": 4}
MODEL = {
    "d_model": 32,
    "layers": 2,
    "heads": 4,
    "max_positions": 32,
    "feed_forward": DENSE,
    "vocabulary": {"kind": "dense", "size": 50},
}
VARIANTS = [
    {"name": "dense", "group": "dense", "paper": {"ms_per_token": 160.0, "ms_per_block": 5.9}},
    {
        "name": "both",
        "group": "sparse",
        "model": {"feed_forward": SPARSE, "attention": {"projection": "multiplicative_conv"}},
        "paper": {"ms_per_token": 61.0, "ms_per_block": 1.9},
    },
]
BENCH = {
    "variants": VARIANTS,
    "backends": ["torch"],
    "dtypes": ["float32", "bfloat16"],
    "threads": 1,
    "context": 8,
    "rounds": 2,
    "tokens_per_round": 3,
    "warmup_tokens": 1,
}
needs_native = pytest.mark.skipif(binding.available() is not None, reason="the native engine is not built")


def loaded(**bench: object) -> LoadedRecipe:
    recipe = Recipe.model_validate({"model": MODEL, "bench": {**BENCH, **bench}})
    return LoadedRecipe(recipe=recipe, name="tiny", path=Path("tiny.yaml"))


def made_up(milliseconds: dict[str, np.ndarray], bandwidth: float = 40.0, **machine: object) -> BenchResult:
    """A result with these samples, (rounds, tokens) for each variant."""
    rounds, tokens = next(iter(milliseconds.values())).shape
    return BenchResult(
        command="sparsecli bench",
        recipe={},
        settings=Settings(context=64, rounds=rounds, tokens_per_round=tokens, warmup_tokens=2),
        versions={},
        machine=Machine(
            **{
                "cpu": "a",
                "isa": "AVX2",
                "threads": 2,
                "bandwidth_gb_s": Bandwidth(before=bandwidth, after=bandwidth, best=bandwidth),
                "memory_gb": 8.0,
                **machine,
            }
        ),
        rows=[
            Row(
                variant=name,
                group="dense",
                backend="torch",
                dtype="float32",
                threads=2,
                context=64,
                parameters=820_000_000,
                active_parameters=788_000_000,
                bytes_per_token=3_166_000_000,
                ms_per_token=timing.times(samples.flatten()),
                ms_per_block=timing.spread(samples.flatten() / 24),
                tokens_per_second=10.0,
                speedup=1.0,
                bandwidth_fraction=0.5,
                held_out_loss=None,
                paper=PaperFigures(ms_per_token=160, ms_per_block=5.9),
                paper_speedup=1.0,
            )
            for name, samples in milliseconds.items()
        ],
    )


def noisy(median: float, seed: int, noise: float = 0.02, rounds: int = 6) -> np.ndarray:
    return median * (1 + noise * np.random.default_rng(seed).standard_normal((rounds, 4)))


def torch_model(spec: ModelSpec, profile: bool = False) -> TorchModel:
    pools = random_weights.Pools.of(random_weights.torch_elements(spec, "float32"))
    return TorchModel(spec, random_weights.torch_weights(spec, "float32", pools), profile)


def engine(spec: ModelSpec, kind: str = "float32", profile: bool = False) -> Engine:
    precision = Precision.of(kind)
    pools = random_weights.Pools.of(random_weights.packed_elements(spec, precision))
    return Engine(random_weights.packed_model(spec, precision, pools), threads=1, profile=profile)
