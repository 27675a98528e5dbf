"""Shipped recipes, and the commands that list, show, copy and check recipes."""

from __future__ import annotations

import json

import pytest

from sparsecli.console import Failure, RecipeError
from sparsecli.model.sizes import disagreement
from sparsecli.recipe import commands, loader


@pytest.mark.parametrize("name", loader.shipped())
def test_shipped_recipe(name):
    loaded = loader.load(name)
    assert loaded.recipe.description
    assert loader.parse(loader.dump(loaded.recipe), "dumped.yaml") == loaded.recipe


def test_shipped_names():
    assert set(loader.shipped()) >= {
        "quickstart",
        "quickstart-dense",
        "quickstart-dense-conv",
        "quickstart-mixture",
        "quickstart-convert",
        "quickstart-upcycle",
        "upcycle-smollm2",
        "bench-800m",
        "bench-17b",
    }


def test_conversion_fits_its_dense_model():
    convert = loader.load("quickstart-convert").recipe
    dense = loader.load("quickstart-dense").recipe
    assert convert.convert.feed_forward.d_ff == dense.model.feed_forward.d_ff
    assert convert.data == dense.data


def test_twins_agree_in_size():
    counts = {
        name: commands.sizes(loader.load(name).recipe)[0][1].total
        for name in ("quickstart", "quickstart-dense", "quickstart-dense-conv", "quickstart-mixture")
    }
    assert max(counts.values()) / min(counts.values()) < 1.01


def test_the_mixture_is_quickstart_but_for_its_units():
    mixture, sparse = loader.load("quickstart-mixture").recipe, loader.load("quickstart").recipe
    assert mixture.model.model_copy(update={"feed_forward": sparse.model.feed_forward}) == sparse.model
    assert (mixture.data, mixture.train, mixture.seed) == (sparse.data, sparse.train, sparse.seed)


def test_mixtures_of_the_benchmark_read_what_sparse_layers_read():
    loaded = loader.load("bench-800m").recipe
    read = {label: size.active for label, size in commands.sizes(loaded)}
    spec = {variant.name: variant.model.feed_forward for variant in loaded.bench.variants}
    sparse = spec["+ Sparse FF"]
    units = sparse.d_ff * sparse.units_per_block / sparse.block_size
    for name in ("MoE 1 of 64", "MoE 2 of 128"):
        used = spec[name].d_ff * spec[name].experts_per_token / spec[name].experts
        assert used == pytest.approx(units, rel=0.04)
        assert read[name] < read["+ Sparse FF"]
    for name in ("MoE 1 of 21", "MoE 2 of 43"):
        assert read[name] == pytest.approx(read["+ Sparse FF"], rel=0.002)


@pytest.mark.parametrize("name", ["bench-800m", "bench-17b"])
def test_variants_agree_in_size(name):
    rows = commands.sizes(loader.load(name).recipe)
    assert [label for label, _ in rows][:5] == [
        "dense",
        "+ Sparse FF",
        "+ Sparse QKV",
        "+ Sparse FF + QKV",
        "+ Sparse FF + QKV + loss",
    ]
    assert disagreement([size for _, size in rows]) < 0.01


def test_check_refuses_variants_of_different_size(tmp_path):
    path = tmp_path / "50%b.yaml"
    path.write_text(
        "model: {d_model: 32, layers: 2, heads: 4, max_positions: 64, vocabulary: {kind: dense, size: 300}, "
        "feed_forward: {kind: dense, d_ff: 128}}\n"
        "bench: {variants: [{name: a, group: dense}, {name: b, group: sparse, "
        "model: {vocabulary: {kind: dense, size: 600}}}]}\n"
    )
    with pytest.raises(RecipeError, match=r"50%b.yaml: bench.variants: .* differ by \d+\.\d %, .* 1 %;"):
        commands.check([str(path)])


def test_check_reports_every_recipe_and_then_fails(tmp_path, capsys):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(loader.shipped()["quickstart"].read_text())
    bad.write_text("sed: 1")
    with pytest.raises(RecipeError, match=r"bad.yaml:1:1: sed: unknown key"):
        commands.check([str(bad), str(good)])
    assert "good" in capsys.readouterr().out


def test_list_and_show(capsys):
    commands.list_shipped()
    assert "quickstart-dense" in capsys.readouterr().out
    commands.show("quickstart")
    assert capsys.readouterr().out == loader.shipped()["quickstart"].read_text()
    with pytest.raises(RecipeError, match="did you mean quickstart"):
        commands.show("quikstart")


def test_copy_never_overwrites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands.copy("quickstart", None)
    copied = tmp_path / "quickstart.yaml"
    assert copied.read_text() == loader.shipped()["quickstart"].read_text()
    copied.write_text("mine")
    with pytest.raises(Failure, match=r"quickstart.yaml: already exists"):
        commands.copy("quickstart", None)
    assert copied.read_text() == "mine"
    (tmp_path / "folder").mkdir()
    commands.copy("quickstart", tmp_path / "folder")
    assert (tmp_path / "folder" / "quickstart.yaml").exists()


def test_schema_describes_every_field(capsys):
    commands.schema()
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["seed"]["description"]
    undocumented = [
        f"{name}.{key}"
        for name, block in schema["$defs"].items()
        for key, value in block["properties"].items()
        if "description" not in value and key not in ("kind", "source")
    ]
    assert undocumented == []
