"""The bench: choosing rows, statistics, formats and the comparison, on models of a few thousand weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_benches import LOSS, MODEL, SPARSE, VARIANTS, loaded, needs_native, torch_model

from sparsecli import console
from sparsecli.bench import command, figures, host, models, peers, random_weights, render, timing, variants
from sparsecli.bench.decoders.native import DiskDecoder
from sparsecli.bench.result import BenchResult
from sparsecli.decode.native import binding
from sparsecli.decode.packed.precision import Precision
from sparsecli.recipe.loader import load, shipped
from sparsecli.spec.model import ModelSpec

pytestmark = pytest.mark.usefixtures("quick_probe")


# -- choosing and building -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dense", "sparse", "names"),
    [
        (True, False, ["dense"]),
        (False, True, ["both"]),
        (True, True, ["dense", "both"]),
        (False, False, ["dense", "both"]),
    ],
)
def test_groups_choose_rows(dense: bool, sparse: bool, names: list[str]) -> None:
    recipe = loaded().recipe
    chosen = variants.choose(variants.from_recipe(recipe.model, recipe.bench), dense=dense, sparse=sparse)
    assert [variant.name for variant in chosen] == names


def test_mixtures_are_a_group_of_their_own() -> None:
    recipe = load("bench-800m").recipe
    everything = variants.from_recipe(recipe.model, recipe.bench)
    names = [variant.name for variant in variants.choose(everything, mixture=True)]
    assert names == ["MoE 1 of 64", "MoE 2 of 128", "MoE 1 of 21", "MoE 2 of 43", "MoE 2 of 8"]
    both = variants.choose(everything, dense=True, sparse=True)
    assert [variant.name for variant in [*both, *variants.choose(everything, mixture=True)]] == [
        variant.name for variant in variants.choose(everything)
    ]


def test_a_group_without_rows_is_an_error() -> None:
    with pytest.raises(console.Failure, match=r"group sparse or mixture .*; leave out --sparse --mixture"):
        command.run(loaded(variants=VARIANTS[:1]), sparse=True, mixture=True)
    with pytest.raises(console.Failure, match="no variant belongs to group dense"):
        command.run(loaded(variants=VARIANTS[1:]), dense=True)


@pytest.mark.parametrize(
    "name", [name for name in shipped() if (bench := load(name).recipe.bench) and bench.variants]
)
def test_shipped_variants_have_equal_parameter_counts(name: str) -> None:
    recipe = load(name).recipe
    if not recipe.bench.equal_sizes:
        pytest.skip("the paper's own shapes")
    found = variants.from_recipe(recipe.model, recipe.bench)
    assert variants.check_same_size(found) is None
    assert found[0].group == "dense"


def test_the_default_bench_takes_enough_rounds() -> None:
    """A round of its rows takes about two seconds on two idle processors; the whole should stay under 180."""
    assert 9 <= load("bench-800m").recipe.bench.rounds <= 15


def test_unequal_parameter_counts_are_told() -> None:
    recipe = loaded().recipe
    found = variants.from_recipe(recipe.model, recipe.bench)
    assert "differ in size" in (variants.check_same_size(found) or "")


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_matrices_of_a_model_are_disjoint_aligned_views_of_shared_pools(kind: str) -> None:
    spec = ModelSpec.model_validate({**MODEL, "feed_forward": SPARSE, "vocabulary": LOSS})
    precision = Precision.of(kind, cache="int8")
    pools = random_weights.Pools.of(random_weights.packed_elements(spec, precision))
    model = random_weights.packed_model(spec, precision, pools)
    spans = sorted((array.ctypes.data, array.nbytes) for array in model.tensors.values())
    assert all(start % random_weights.LINE == 0 for start, _ in spans)
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(spans))
    used = sum(size for start, size in spans if any(_within(start, pool) for pool in pools.arrays.values()))
    assert used > 0.9 * sum(pool.nbytes for pool in pools.arrays.values())


def _within(address: int, pool: np.ndarray) -> bool:
    return 0 <= address - pool.ctypes.data < pool.nbytes


def test_torch_weights_have_every_parameter() -> None:
    spec = ModelSpec.model_validate({**MODEL, "feed_forward": SPARSE})
    pools = random_weights.Pools.of(random_weights.torch_elements(spec, "bfloat16"))
    made = random_weights.torch_weights(spec, "bfloat16", pools)
    assert set(made) == {name for name, _ in random_weights.empty_model(spec).named_parameters()}
    assert {each.dtype for each in made.values()} == {torch.bfloat16}
    assert all(bool((made[name] == 1).all()) for name in made if name.endswith("norm.weight"))
    assert made["model.embedding.weight"].float().std() == pytest.approx(0.02, rel=0.1)


def test_a_long_pool_repeats_its_tile_out_of_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "TILE", 101)
    pool = random_weights.Pools.of({"float32": 300}).tensor("float32")
    assert torch.equal(pool[:101], pool[101:202])
    assert not torch.equal(pool[:64], pool[128:192])
    assert pool.isfinite().all()


def test_random_models_choose_many_different_units_and_stay_finite() -> None:
    spec = ModelSpec.model_validate({**MODEL, "d_model": 64, "feed_forward": {**SPARSE, "rank": 16}})
    network = torch_model(spec).network
    seen: list[torch.Tensor] = []
    layer = network.model.layers[1].feed_forward
    layer.register_forward_pre_hook(
        lambda _, x: seen.append(layer.controller(x[0].flatten(0, -2)).argmax(-1))
    )
    with torch.inference_mode():
        logits = network(torch.arange(32)[None]).logits
    assert logits.isfinite().all()
    shares = torch.bincount(seen[0].flatten(), minlength=8) / seen[0].numel()
    assert shares.max() < 0.5
    assert (shares > 0).sum() >= 6


def test_one_block_can_stand_for_all() -> None:
    one = [{**VARIANTS[0], "measured_layers": 1}, VARIANTS[1]]
    measured = command.run(loaded(variants=one, dtypes=["float32"]), format="json")
    assert [row.projected for row in measured.rows] == [True, False]
    assert all(row.projected for row in command.run(loaded(measured_layers=1), format="json").rows)
    timed = timing.Timing(SimpleNamespace(), 50, 10, 2, token_ns=[5_000_000], block_stack_ns=[4_000_000])
    assert timed.token_ms.tolist() == [21.0]  # 1 ms outside the blocks, 10 blocks of 2 ms
    assert timed.block_ms.tolist() == [2.0]


def test_parts_of_missing_blocks_are_multiplied_out() -> None:
    timed = timing.Timing(SimpleNamespace(), 50, 10, 2, token_ns=[5_000_000], block_stack_ns=[4_000_000])
    timed.part_seconds = {"attention": 0.003, "head": 0.0005}
    assert timed.parts == {"attention": 15.0, "head": 0.5, "rest": 5.5}


# -- backends ------------------------------------------------------------------------------------------------


@needs_native
def test_native_rows_with_types_of_their_own() -> None:
    recipe = loaded(
        profile=True,
        backends=None,
        dtypes=["bfloat16", "int8"],
        variants=[*VARIANTS, {**VARIANTS[1], "name": "small", "dtypes": ["bfloat16"], "precision": MIXED}],
    )
    measured = command.run(recipe, format="json")
    assert measured.machine.isa == binding.isa()
    assert [(row.variant, row.backend, row.dtype) for row in measured.rows] == [
        ("dense", "native", "bfloat16"),
        ("both", "native", "bfloat16"),
        ("small", "native", "bfloat16"),
        ("dense", "native", "int8"),
        ("both", "native", "int8"),
    ]
    small = measured.rows[2]
    assert small.weights == "bfloat16, int8 units, head + rescoring"
    assert small.precision["controller"] == "bfloat16"
    assert small.bytes_per_token != measured.rows[1].bytes_per_token
    assert small.speedup is not None
    assert small.ms_feed_forward * 2 == pytest.approx(
        sum(small.parts.get(name, 0) for name in figures.FEED_FORWARD_PARTS), abs=1e-4
    )
    assert "bfloat16, int8 units, head + rescoring" in render.as_markdown(measured)
    assert render.parts_table(measured).row_count > 5 * 5
    assert BenchResult.model_validate_json(render.as_json(measured)) == measured


MIXED = {"units": "int8", "head": "int8", "head_rescoring": True}


def test_without_the_native_engine_torch_measures_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(binding, "available", lambda: "it was not built")
    measured = command.run(loaded(backends=None, dtypes=["float32", "int8"]), format="json")
    assert {(row.backend, row.dtype) for row in measured.rows} == {("torch", "float32")}
    told = capsys.readouterr().err
    assert "measuring with PyTorch: it was not built" in told
    assert "rows left out: int8, int4, codes of GGUF files, rows with a precision of their own" in told
    with pytest.raises(console.Failure, match="--backend native: it was not built"):
        command.run(loaded(backends=["native"]))
    with pytest.raises(console.Failure, match="need the native backend"):
        command.run(loaded(dtypes=["int8"]))


@pytest.mark.parametrize(
    ("bench", "options", "told"),
    [
        ({"threads": [10_000]}, {}, "--threads: 10000 is more than 256"),
        ({}, {"names": ["nobody"]}, "--variant: there is no 'nobody' \\(there are: dense, both"),
        (
            {},
            {"over": "torch:int8"},
            "--over: no dense or peer row is 'torch:int8' .*: torch:float32, torch:b",
        ),
    ],
)
def test_what_does_not_exist_is_one_clear_line(bench: dict, options: dict, told: str) -> None:
    with pytest.raises(console.Failure, match=told) as caught:
        command.run(loaded(**bench), **options)
    assert caught.value.exit_code == 2


def test_variants_are_chosen_by_name() -> None:
    measured = command.run(loaded(dtypes=["float32"]), names=["both"], format="json")
    assert [row.variant for row in measured.rows] == ["both"]


def test_a_peer_is_a_row_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        settings = "version 1"

        def __init__(self, capacity: int) -> None:
            assert capacity == 12

        def prefill(self, tokens: list[int]) -> None: ...

        def rewind(self) -> None: ...

        def step(self, token: int) -> tuple[int, None]:
            return token, None

    monkeypatch.setattr(peers.Peer, "missing", lambda self: None)
    monkeypatch.setattr(
        peers.Peer, "load_module", lambda self: SimpleNamespace(refusal=lambda spec, dtype: None)
    )
    monkeypatch.setattr(peers.PeerModel, "load", lambda self, weights, capacity, threads: Slow(capacity))
    measured = command.run(loaded(peers=["torch.compile"], dtypes=["float32"]), format="json")
    rows = [row for row in measured.rows if row.group == "peer"]
    assert [(row.variant, row.backend) for row in rows] == [
        ("dense", "torch.compile"),
        ("both", "torch.compile"),
    ]
    assert (rows[0].ms_per_block, rows[0].threads, rows[0].context) == (None, 1, 8)
    assert "torch.compile: version 1." in render.caption(measured)


# -- from disk -----------------------------------------------------------------------------------------------

BIG_UNITS = {"feed_forward": {"kind": "sparse", "d_ff": 4096, "block_size": 64, "rank": 4}}
ON_DISK = [*VARIANTS, {"name": "big", "group": "sparse", "model": BIG_UNITS}]


@needs_native
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what is read")
def test_units_come_from_a_file_that_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "DISK_SECONDS", 0.02)
    monkeypatch.setattr(host, "file_system", lambda folder: "ext4")
    evicted: list[bool] = []
    evict = DiskDecoder.evict

    def count(self: DiskDecoder) -> None:
        evict(self)
        evicted.append(True)

    monkeypatch.setattr(DiskDecoder, "evict", count)
    recipe = loaded(variants=ON_DISK, backends=["native"], dtypes=["float32"], from_disk=True)
    measured = command.run(recipe, disk_folder=tmp_path, format="json")
    assert [row.variant for row in measured.rows] == ["both", "big"]
    assert len(evicted) == 2 * 2 * 3
    for row in measured.rows:
        assert row.from_disk
        assert row.bandwidth_fraction is None
        assert row.disk_bytes_per_token >= 0
    assert measured.machine.disk.random_kb == 32
    assert list(tmp_path.iterdir()) == []
    assert "Units are read from disk" in render.as_markdown(measured)


@pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
def test_a_folder_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    mounts = [
        SimpleNamespace(mountpoint="/", fstype="ext4"),
        SimpleNamespace(mountpoint=str(tmp_path), fstype=kind),
    ]
    monkeypatch.setattr(host.psutil, "disk_partitions", lambda all: mounts)
    with pytest.raises(
        console.Failure, match=f"is on {kind}, which is in memory; choose a --disk-folder on a disk"
    ):
        host.check_evictable(tmp_path / "below")
    host.check_evictable(tmp_path.parent)


@needs_native
def test_nothing_is_left_on_disk_after_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> None:
        assert path.is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(host, "disk_speed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.run(loaded(variants=ON_DISK, backends=["native"], from_disk=True), disk_folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@needs_native
def test_too_small_a_disk_is_told_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    monkeypatch.setattr(random_weights.Pools, "of", lambda *_: pytest.fail("built"))
    with pytest.raises(console.Failure, match=r"are needed for the packed models, 0\.0 GB are free"):
        command.run(loaded(variants=ON_DISK, backends=["native"], from_disk=True), disk_folder=tmp_path)
    monkeypatch.undo()
    nowhere = tmp_path / "nowhere"
    with pytest.raises(console.Failure, match="name another --disk-folder"):
        command.run(loaded(variants=ON_DISK, backends=["native"], from_disk=True), disk_folder=nowhere)
