"""The bench of decoders that read what an encoder made: the paper's own shapes, and small ones that run."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from sparsecli.bench import bytes_read, command, render, variants
from sparsecli.console import Failure
from sparsecli.decode.native import binding
from sparsecli.decode.packed.precision import Precision
from sparsecli.model.sizes import Sizes
from sparsecli.recipe.loader import LoadedRecipe, load
from sparsecli.recipe.schema import Recipe
from sparsecli.spec.model import ModelSpec

needs_native = pytest.mark.skipif(binding.available() is not None, reason="the native engine is not built")
SPARSE = {"kind": "sparse", "d_ff": 64, "block_size": 8, "rank": 4}
CONVOLVED = {"projection": "multiplicative_conv"}
ENCODER = {"layers": 2, "max_positions": 32}
MODEL = {
    "d_model": 32,
    "layers": 2,
    "heads": 4,
    "max_positions": 32,
    "feed_forward": {"kind": "dense", "d_ff": 64},
    "vocabulary": {"kind": "dense", "size": 50},
    "encoder": ENCODER,
}
TERRAFORMER = {
    "feed_forward": SPARSE,
    "attention": CONVOLVED,
    "residual": "reversible",
    "attention_layers": 2,
    "sru": {"width": 8},
    "encoder": {**ENCODER, "read_by": {"kind": "prefix"}},
}
VARIANTS = [
    {"name": "dense", "group": "dense", "paper": {"ms_per_token": 160.0}},
    {"name": "both", "group": "sparse", "model": {"feed_forward": SPARSE, "attention": CONVOLVED}},
    {"name": "terraformer", "group": "sparse", "model": TERRAFORMER, "paper": {"ms_per_token": 40.0}},
]
BENCH = {
    "variants": VARIANTS,
    "equal_sizes": False,
    "dtypes": ["int8"],
    "threads": 1,
    "context": 3,
    "source": 5,
    "rounds": 2,
    "tokens_per_round": 2,
    "warmup_tokens": 1,
}
PAPER = {  # millions of parameters by the original's shapes
    "paper-800m": [772.1, 787.8, 876.8, 909.8, 862.3, 792.0],
    "paper-17b": [15776.1, 15795.4, 18181.1, 18209.8, 16985.5, 15776.1, 18209.8, 16985.5],
}


def loaded(**bench: object) -> LoadedRecipe:
    recipe = Recipe.model_validate({"model": MODEL, "bench": {**BENCH, **bench}})
    return LoadedRecipe(recipe=recipe, name="tiny", path=Path("tiny.yaml"))


pytestmark = pytest.mark.usefixtures("quick_probe")


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_models_have_its_parameters(name: str) -> None:
    recipe = load(name).recipe
    found = variants.from_recipe(recipe.model, recipe.bench)
    assert [round(variant.sizes.total / 1e6, 1) for variant in found] == PAPER[name]
    names = [variant.name for variant in found]
    assert names[:4] == ["dense", "+ Sparse FF", "+ Sparse QKV", "+ Sparse FF + QKV"]
    assert "Terraformer" in names


@pytest.mark.parametrize("name", PAPER)
def test_bytes_of_one_type_are_those_of_the_active_parameters(name: str) -> None:
    """What the encoder and the source alone need is not read with a token; the source's keys and values are."""
    recipe = load(name).recipe
    for variant in variants.from_recipe(recipe.model, recipe.bench):
        sizes: Sizes = variant.sizes
        counted = bytes_read.bytes_per_token(
            variant.spec, Precision.of("bfloat16"), 8, vectors="bfloat16", source=16
        )
        assert counted == sizes.bytes_per_token("bfloat16", 8, 16)


def test_hashed_attention_reads_the_keys_that_it_chooses_and_the_buckets_of_all() -> None:
    hashed = {"kind": "lsh", "share_query_key": True, "lsh": {"rounds": 2, "chunk_length": 4}}  # 16 keys
    shape = {**MODEL, **TERRAFORMER, "vocabulary": MODEL["vocabulary"], "positions": "digits"}
    spec = ModelSpec.model_validate({**shape, "attention": hashed})
    full = ModelSpec.model_validate({**shape, "attention": {"share_query_key": True}})

    def counted(spec: ModelSpec, context: int) -> int:
        return bytes_read.bytes_per_token(spec, Precision.of("float32"), context, source=3)

    assert counted(spec, 12) == counted(full, 12)  # itself the 16th
    layers, width = 4, 32
    buckets = 2 * max(1, 128 // 4)  # of texts of 65 to 128 tokens
    read = 15 * 2 * width * 4 + 103 * 4 * 2 * 4  # other keys and values, and buckets of every head and round
    axes = width * 2 * buckets // 2 * 4
    assert counted(spec, 100) - counted(full, 0) == layers * (read + axes - 3 * 2 * width * 4)


@needs_native
@pytest.mark.parametrize("batch", [1, 3])
def test_decoders_with_a_source_are_measured(batch: int) -> None:
    result = command.run(loaded(batch=batch), format="json")
    assert [row.variant for row in result.rows] == ["dense", "both", "terraformer"]
    assert result.settings.source == 5
    assert [row.paper_speedup for row in result.rows] == ([1.0, None, 4.0] if batch == 1 else [None] * 3)
    assert all(row.ms_per_token.p50 > 0 and row.speedup for row in result.rows)
    screen = Console(width=200, record=True)
    screen.print(render.table(result, 200))
    assert "source of 5 tokens" in " ".join(screen.export_text().split())
    assert Recipe.model_validate(result.recipe).bench.source == 5


def test_other_backends_have_no_such_decoders() -> None:
    with pytest.raises(Failure, match="models with an encoder need the native backend"):
        command.run(loaded(backends=["torch"], dtypes=["float32"]), format="json")


def test_a_result_without_sources_says_nothing_of_them() -> None:
    plain = {**MODEL, "encoder": None}
    bench = {**BENCH, "variants": VARIANTS[:1], "backends": ["torch"], "dtypes": ["float32"]}
    recipe = Recipe.model_validate({"model": plain, "bench": bench})
    measured = command.run(LoadedRecipe(recipe=recipe, name="tiny", path=Path("tiny.yaml")), format="json")
    assert measured.settings.source is None
