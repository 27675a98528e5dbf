"""The bench: choosing rows, statistics, formats and the comparison, on models of a few thousand weights."""

from __future__ import annotations

import csv
import io
import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from small_models import ALONE, FAMILIES, spec_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from sparsecli import cli, console
from sparsecli.bench import (
    command,
    compare,
    disk,
    entries,
    machine,
    measure,
    peers,
    plan,
    report,
    roofline,
    table,
    traffic,
    variants,
    weights,
)
from sparsecli.bench.native_decoder import DiskDecoder, NativeDecoder
from sparsecli.bench.report import Bandwidth, Machine, Result, Row, Settings
from sparsecli.bench.torch_decoder import TorchDecoder, TorchModel
from sparsecli.decode import native
from sparsecli.decode.engine import Engine
from sparsecli.decode.packing import Precision
from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM
from sparsecli.model.architecture import ModelSpec
from sparsecli.model.sizes import count_parameters
from sparsecli.recipe.loader import LoadedRecipe, load, shipped
from sparsecli.recipe.schema import PaperFigures, Recipe
from sparsecli.train import run_directory

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
needs_native = pytest.mark.skipif(native.available() is not None, reason="the native engine is not built")


def loaded(**bench: object) -> LoadedRecipe:
    recipe = Recipe.model_validate({"model": MODEL, "bench": {**BENCH, **bench}})
    return LoadedRecipe(recipe=recipe, name="tiny", path=Path("tiny.yaml"))


@pytest.fixture(autouse=True)
def _quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "bandwidth", lambda: 20.0)
    monkeypatch.setattr(machine, "BUSY_SECONDS", 0.01)


@pytest.fixture(scope="module")
def result() -> Result:
    """One real run of the tiny recipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "bandwidth", lambda: 20.0)
        return command.run(loaded(), format="json", threads=[1])


def made_up(milliseconds: dict[str, np.ndarray], bandwidth: float = 40.0, **machine: object) -> Result:
    """A result with these samples, (rounds, tokens) for each variant."""
    rounds, tokens = next(iter(milliseconds.values())).shape
    return Result(
        command="sparsecli bench",
        recipe={},
        settings=Settings(context=64, rounds=rounds, tokens_per_round=tokens, warmup_tokens=2),
        versions={},
        machine=Machine(
            **{
                "cpu": "a",
                "isa": "AVX2",
                "threads": 2,
                "bandwidth_gb_s": Bandwidth(before=bandwidth, after=bandwidth),
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
                ms_per_token=measure.times(samples.flatten()),
                ms_per_block=measure.spread(samples.flatten() / 24),
                tokens_per_second=10.0,
                speedup=1.0,
                bandwidth_fraction=0.5,
                held_out_nats=None,
                paper=PaperFigures(ms_per_token=160, ms_per_block=5.9),
                paper_speedup=1.0,
            )
            for name, samples in milliseconds.items()
        ],
    )


def noisy(median: float, seed: int, noise: float = 0.02, rounds: int = 6) -> np.ndarray:
    return median * (1 + noise * np.random.default_rng(seed).standard_normal((rounds, 4)))


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
    assert [candidate.name for candidate in chosen] == names


def test_a_group_without_rows_is_an_error() -> None:
    with pytest.raises(console.Failure, match="no variant belongs to group dense"):
        command.run(loaded(variants=VARIANTS[1:]), dense=True)


@pytest.mark.parametrize("name", [name for name in shipped() if load(name).recipe.bench])
def test_shipped_variants_have_equal_parameter_counts(name: str) -> None:
    recipe = load(name).recipe
    if not recipe.bench.equal_sizes:
        pytest.skip("the paper's own shapes")
    candidates = variants.from_recipe(recipe.model, recipe.bench)
    assert variants.check_same_size(candidates) is None
    assert candidates[0].group == "dense"


def test_the_default_bench_takes_enough_rounds() -> None:
    """A round of its rows takes about two seconds on two idle processors; the whole should stay under 180."""
    assert 9 <= load("bench-800m").recipe.bench.rounds <= 15


def test_unequal_parameter_counts_are_told() -> None:
    recipe = loaded().recipe
    candidates = variants.from_recipe(recipe.model, recipe.bench)
    assert "differ in size" in (variants.check_same_size(candidates) or "")


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_matrices_of_a_model_are_disjoint_aligned_views_of_shared_pools(kind: str) -> None:
    spec = ModelSpec.model_validate({**MODEL, "feed_forward": SPARSE, "vocabulary": LOSS})
    precision = Precision.of(kind, cache="int8")
    pools = weights.Pools.of(weights.packed_elements(spec, precision))
    model = weights.packed_model(spec, precision, pools)
    spans = sorted((array.ctypes.data, array.nbytes) for array in model.tensors.values())
    assert all(start % weights.LINE == 0 for start, _ in spans)
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(spans))
    used = sum(size for start, size in spans if any(_within(start, pool) for pool in pools.arrays.values()))
    assert used > 0.9 * sum(pool.nbytes for pool in pools.arrays.values())


def _within(address: int, pool: np.ndarray) -> bool:
    return 0 <= address - pool.ctypes.data < pool.nbytes


def test_torch_weights_have_every_parameter() -> None:
    spec = ModelSpec.model_validate({**MODEL, "feed_forward": SPARSE})
    pools = weights.Pools.of(weights.torch_elements(spec, "bfloat16"))
    made = weights.torch_weights(spec, "bfloat16", pools)
    assert set(made) == {name for name, _ in variants.empty_model(spec).named_parameters()}
    assert {each.dtype for each in made.values()} == {torch.bfloat16}
    assert all(bool((made[name] == 1).all()) for name in made if name.endswith("norm.weight"))
    assert made["model.embedding.weight"].float().std() == pytest.approx(0.02, rel=0.1)


def test_a_long_pool_repeats_its_tile_out_of_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "TILE", 101)
    pool = weights.Pools.of({"float32": 300}).tensor("float32")
    assert torch.equal(pool[:101], pool[101:202])
    assert not torch.equal(pool[:64], pool[128:192])
    assert pool.isfinite().all()


def test_random_models_choose_many_different_units_and_stay_finite() -> None:
    spec = ModelSpec.model_validate({**MODEL, "d_model": 64, "feed_forward": {**SPARSE, "rank": 16}})
    network = torch_model(spec).network
    seen: list[torch.Tensor] = []
    controller = network.model.blocks[1].feed_forward.controller
    controller.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.argmax(-1)))
    with torch.inference_mode():
        logits = network(torch.arange(32)[None]).logits
    assert logits.isfinite().all()
    shares = torch.bincount(seen[0].flatten(), minlength=8) / seen[0].numel()
    assert shares.max() < 0.5
    assert (shares > 0).sum() >= 6


def torch_model(spec: ModelSpec, profile: bool = False) -> TorchModel:
    pools = weights.Pools.of(weights.torch_elements(spec, "float32"))
    return TorchModel(spec, weights.torch_weights(spec, "float32", pools), profile)


def engine(spec: ModelSpec, kind: str = "float32", profile: bool = False) -> Engine:
    precision = Precision.of(kind)
    pools = weights.Pools.of(weights.packed_elements(spec, precision))
    return Engine(weights.packed_model(spec, precision, pools), threads=1, profile=profile)


def test_one_block_can_stand_for_all() -> None:
    one = [{**VARIANTS[0], "measured_layers": 1}, VARIANTS[1]]
    measured = command.run(loaded(variants=one, dtypes=["float32"]), format="json")
    assert [row.projected for row in measured.rows] == [True, False]
    assert all(row.projected for row in command.run(loaded(measured_layers=1), format="json").rows)
    turn = measure.Turn(SimpleNamespace(), 50, 10, 2, token_ns=[5_000_000], block_stack_ns=[4_000_000])
    assert turn.token_ms.tolist() == [21.0]  # 1 ms outside the blocks, 10 blocks of 2 ms
    assert turn.block_ms.tolist() == [2.0]


def test_parts_of_missing_blocks_are_multiplied_out() -> None:
    turn = measure.Turn(SimpleNamespace(), 50, 10, 2, token_ns=[5_000_000], block_stack_ns=[4_000_000])
    turn.part_seconds = {"attention": 0.003, "head": 0.0005}
    assert turn.parts == {"attention": 15.0, "head": 0.5, "rest": 5.5}


# -- bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bench-800m", "bench-17b"])
def test_bytes_of_one_type_are_those_of_the_active_parameters(name: str) -> None:
    recipe = load(name).recipe
    for candidate in variants.from_recipe(recipe.model, recipe.bench):
        counted = traffic.bytes_per_token(candidate.spec, Precision.of("bfloat16"), 64, vectors="bfloat16")
        assert counted == candidate.sizes.bytes_per_token("bfloat16", 64)


@pytest.mark.parametrize("name", FAMILIES | ALONE)
def test_bytes_of_foreign_models(name: str) -> None:
    spec = spec_of(name)
    counted = traffic.bytes_per_token(spec, Precision.of("bfloat16"), 64, vectors="bfloat16")
    again = spec.tied * spec.d_model * 2  # the token's row of a table that the logits read whole
    assert counted == count_parameters(spec).bytes_per_token("bfloat16", 64) + again


def test_bytes_follow_the_packed_types() -> None:
    spec = ModelSpec.model_validate({**MODEL, "feed_forward": SPARSE, "positions": "rotary"})
    d, units = 32, 64
    shared = {
        "norms": 2 * (2 * 2 * d) * 4 + 2 * d * 4,
        "attention": 2 * 4 * (d * d + d) * 4,
        "controller": 2 * ((4 * d + 4 * 4) + (units * 4 + units * 4) + units * 4),  # int8 rows, scales, bias
        "feed-forward bias": 2 * d * 4,
        "embedding": d * 4,
        "head": 50 * (d + 4),
        "cache": 10 * 2 * 2 * 4 * (8 + 4),
    }
    row = d + 4
    precision = Precision.of("float32", units="int8", controller="int8", head="int8", cache="int8")
    assert traffic.bytes_per_token(spec, precision, 10) == sum(shared.values()) + 2 * 2 * units / 8 * row
    chosen = 2 * 2 * units * (1 - (7 / 8) ** 3) * row
    fixed = sum(shared.values()) + 2 * shared["embedding"] + 2 * shared["cache"]
    assert traffic.bytes_per_token(spec, precision, 10, batch=3) == round((fixed + chosen) / 3)


# -- measuring -----------------------------------------------------------------------------------------------


def test_turns_interleave_and_start_from_the_same_context() -> None:
    log: list[tuple[str, str]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def prefill(self, tokens: list[int]) -> None:
            log.append((self.name, f"prefill {len(tokens)}"))

        def rewind(self) -> None:
            log.append((self.name, "rewind"))

        def step(self, token: int) -> tuple[int, int]:
            log.append((self.name, "step"))
            return 1, 10

    turns = [measure.Turn(Recorder(name), 50, 2, 2, context=5, warmup=1) for name in "ab"]
    with console.progress("test", None) as progress:
        measure.measure(turns, 2, 0, progress)
    turn = ["rewind", "step", "step"]
    expected = [("a", "prefill 5"), ("b", "prefill 5")]
    expected += [(name, what) for _ in range(2) for name in "ab" for what in turn]
    assert log == expected
    assert [len(turn.token_ns) for turn in turns] == [2, 2]


CONV = {**MODEL, "attention": {"projection": "multiplicative_conv"}}


def decoders(batch: int = 1) -> list[object]:
    spec = ModelSpec.model_validate(CONV)
    found: list[object] = [TorchDecoder(torch_model(spec, profile=True), 1, 16, batch)]
    if native.available() is None:
        found.append(NativeDecoder(engine(spec, profile=True), 16, batch))
    return found


@pytest.mark.parametrize("batch", [1, 3])
def test_a_rewound_decoder_repeats_itself(batch: int) -> None:
    for decoder in decoders(batch):
        decoder.prefill([1, 2, 3, 4])

        def three() -> list[int]:
            tokens = [7]
            for _ in range(3):
                token, nanoseconds = decoder.step(tokens[-1])  # noqa: B023
                assert nanoseconds > 0
                tokens.append(token)
            return tokens

        first = three()
        decoder.rewind()
        assert three() == first


def test_a_batch_decodes_different_texts() -> None:
    for alone, together in zip(decoders(), decoders(3), strict=True):
        together.prefill([1, 2, 3, 4])
        together.step(7)
        expected = []
        for index in range(3):
            alone.prefill([measure.others(token, index, 50) for token in [1, 2, 3, 4]])
            expected.append(alone.step(measure.others(7, index, 50))[0])
        assert together.next == expected


def test_a_profile_accounts_for_the_time() -> None:
    for decoder in decoders():
        turn = measure.Turn(decoder, 50, 2, 2, context=4, steps=3, profiled=decoder)
        with console.progress("test", None) as progress:
            measure.measure([turn], 2, 0, progress)
        assert sum(turn.parts.values()) == pytest.approx(turn.token_ms.mean(), rel=0.01)
        assert {"attention", "head", "rest"} <= set(turn.parts)
        assert set(turn.parts) & set(entries.FEED_FORWARD_PARTS)


def test_both_attention_layers_of_a_block_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec.model_validate({**MODEL, "residual": "reversible", "attention_layers": 2})
    model = torch_model(spec, profile=True)
    clock = SimpleNamespace(perf_counter_ns=itertools.count().__next__)
    monkeypatch.setattr("sparsecli.bench.torch_decoder.time", clock)
    TorchDecoder(model, 1, 16).prefill([1, 2, 3])
    assert model.parts["attention"].read() == 2 * spec.layers


def test_a_prompt_is_read_anew_at_every_step() -> None:
    read: list[list[int]] = []
    reader = measure.PromptReader(SimpleNamespace(prefill=read.append), vocabulary=10)
    reader.prefill([1, 2, 9])
    assert reader.step(3) == (0, None)
    assert reader.step(0) == (0, None)
    assert read == [[4, 5, 2], [1, 2, 9]]


def test_prompts_are_rows_of_their_own_beside_torch_as_bfloat16() -> None:
    measured = command.run(loaded(prefill=24), dtypes=["float32"], format="json")
    prompts = [row for row in measured.rows if row.prefill]
    assert [(row.variant, row.dtype) for row in prompts] == [
        ("dense", "float32"),
        ("both", "float32"),
        ("dense", "bfloat16"),
    ]
    for row in prompts:
        assert (row.context, row.ms_per_block, row.bandwidth_fraction, row.paper) == (0, None, None, None)
        assert len(row.ms_per_token.samples) == 2
    assert prompts[1].speedup == pytest.approx(
        prompts[0].ms_per_token.p50 / prompts[1].ms_per_token.p50, rel=0.05
    )


def test_part_of_a_model_reads_no_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    measured = command.run(loaded(measured_layers=1), dtypes=["float32"], prefill=24, format="json")
    assert [row.prefill for row in measured.rows] == [None, None]
    assert "prompts are read by whole models" in capsys.readouterr().err


def test_every_combination_is_a_row_with_a_key_of_its_own() -> None:
    measured = command.run(
        loaded(), dtypes=["float32"], threads=[1], context=[4, 40], batch=[1, 2], format="json"
    )
    assert len({row.key for row in measured.rows}) == len(measured.rows) == 2 * 2 * 2
    assert {(row.context, row.batch) for row in measured.rows} == set(itertools.product([4, 40], [1, 2]))
    assert all(row.parameters == measured.rows[0].parameters for row in measured.rows[::2])
    shown = table.as_markdown(measured)
    assert "| context | batch |" in shown
    assert "| threads |" not in shown
    assert "over its sequences" in shown


def test_threads_are_a_row_each() -> None:
    candidates = variants.from_recipe(loaded().recipe.model, loaded().recipe.bench)
    cases = plan.rows(
        candidates,
        backends=["torch"],
        dtypes=["float32"],
        threads=[1, 2],
        contexts=[4],
        batches=[1],
        prefill=9,
    )
    found = [(case.model.candidate.name, case.model.threads, case.prefill) for case in cases if case.model]
    names = ["dense", "both"]
    assert found[:4] == [(name, 1, prefill) for prefill in (0, 9) for name in names]
    assert found[4:8] == [(name, 2, prefill) for prefill in (0, 9) for name in names]
    assert (cases[-1].model.dtype, cases[-1].prefill) == ("bfloat16", 9)


# -- backends ------------------------------------------------------------------------------------------------


@needs_native
def test_native_rows_with_types_of_their_own() -> None:
    recipe = loaded(
        backends=None,
        dtypes=["bfloat16", "int8"],
        variants=[*VARIANTS, {**VARIANTS[1], "name": "small", "dtypes": ["bfloat16"], "precision": MIXED}],
    )
    measured = command.run(recipe, profile=True, format="json")
    assert measured.machine.isa == native.isa()
    assert [(row.variant, row.backend, row.dtype) for row in measured.rows] == [
        ("dense", "native", "bfloat16"),
        ("both", "native", "bfloat16"),
        ("small", "native", "bfloat16"),
        ("dense", "native", "int8"),
        ("both", "native", "int8"),
    ]
    small = measured.rows[2]
    assert small.changed_parts == "int8 units, head + rescoring"
    assert small.precision["controller"] == "bfloat16"
    assert small.bytes_per_token != measured.rows[1].bytes_per_token
    assert small.speedup is not None
    assert small.ms_feed_forward * 2 == pytest.approx(
        sum(small.parts.get(name, 0) for name in entries.FEED_FORWARD_PARTS), abs=1e-4
    )
    assert "bfloat16, int8 units, head + rescoring" in table.as_markdown(measured)
    assert table.parts_table(measured).row_count > 5 * 5
    assert Result.model_validate_json(table.as_json(measured)) == measured


MIXED = {"units": "int8", "head": "int8", "head_rescoring": True}


def test_without_the_native_engine_torch_measures_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "available", lambda: "it was not built")
    measured = command.run(loaded(backends=None, dtypes=["float32", "int8"]), format="json")
    assert {(row.backend, row.dtype) for row in measured.rows} == {("torch", "float32")}
    told = capsys.readouterr().err
    assert "measuring with PyTorch: it was not built" in told
    assert "rows left out: int8, int4, what has a precision of its own" in told
    with pytest.raises(console.Failure, match="--backend native: it was not built"):
        command.run(loaded(), backends=["native"])
    with pytest.raises(console.Failure, match="need the native backend"):
        command.run(loaded(), dtypes=["int8"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"backends": ["cuda"]}, "--backend: 'cuda' is not one of native, torch"),
        ({"dtypes": ["int2"]}, "--dtype: 'int2' is not one of float32, bfloat16, int8, int4"),
        ({"threads": [10_000]}, "--threads: 10000 is more than 256"),
        ({"names": ["nobody"]}, "--variant: there is no 'nobody' \\(there are: dense, both"),
        ({"over": "torch:int8"}, "--over: no dense or peer row is 'torch:int8' .*: torch:float32, torch:b"),
        ({"peers": ["gpt"]}, "--peer: 'gpt' is not one of"),
    ],
)
def test_what_does_not_exist_is_one_clear_line(options: dict, told: str) -> None:
    with pytest.raises(console.Failure, match=told) as caught:
        command.run(loaded(), **options)
    assert caught.value.exit_code == 2


def test_variants_are_chosen_by_name() -> None:
    measured = command.run(loaded(), names=["both"], dtypes=["float32"], format="json")
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
    monkeypatch.setattr(peers.PeerRow, "load", lambda self, weights, capacity, threads: Slow(capacity))
    measured = command.run(loaded(), peers=["torch.compile"], dtypes=["float32"], format="json")
    rows = [row for row in measured.rows if row.group == "peer"]
    assert [(row.variant, row.backend) for row in rows] == [
        ("dense", "torch.compile"),
        ("both", "torch.compile"),
    ]
    assert (rows[0].ms_per_block, rows[0].threads, rows[0].context) == (None, 1, 8)
    assert "torch.compile: version 1." in table.caption(measured)


# -- from disk -----------------------------------------------------------------------------------------------

BIG_UNITS = {"feed_forward": {"kind": "sparse", "d_ff": 4096, "block_size": 64, "rank": 4}}
ON_DISK = [*VARIANTS, {"name": "big", "group": "sparse", "model": BIG_UNITS}]


@needs_native
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what is read")
def test_units_come_from_a_file_that_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "PROBE_SECONDS", 0.02)
    evicted: list[bool] = []
    evict = DiskDecoder.evict

    def count(self: DiskDecoder) -> None:
        evict(self)
        evicted.append(True)

    monkeypatch.setattr(DiskDecoder, "evict", count)
    recipe = loaded(variants=ON_DISK, backends=["native"])
    measured = command.run(recipe, dtypes=["float32"], from_disk=True, disk_folder=tmp_path, format="json")
    assert [row.variant for row in measured.rows] == ["both", "big"]
    assert len(evicted) == 2 * 2 * 3
    for row in measured.rows:
        assert row.from_disk
        assert row.bandwidth_fraction is None
        assert row.disk_bytes_per_token >= 0
    assert measured.machine.disk.random_kb == 32
    assert list(tmp_path.iterdir()) == []
    assert "Units are read from disk, cold" in table.as_markdown(measured)


@needs_native
def test_nothing_is_left_on_disk_after_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> None:
        assert path.is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(disk, "probe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.run(loaded(variants=ON_DISK, backends=["native"]), from_disk=True, disk_folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@needs_native
def test_too_small_a_disk_is_told_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    monkeypatch.setattr(weights.Pools, "of", lambda *_: pytest.fail("built"))
    with pytest.raises(console.Failure, match=r"are needed for the packed models, 0\.0 GB are free"):
        command.run(loaded(variants=ON_DISK, backends=["native"]), from_disk=True, disk_folder=tmp_path)
    monkeypatch.undo()
    nowhere = tmp_path / "nowhere"
    with pytest.raises(console.Failure, match="name another --disk-folder"):
        command.run(loaded(variants=ON_DISK, backends=["native"]), from_disk=True, disk_folder=nowhere)


# -- figures -------------------------------------------------------------------------------------------------


def test_rows_of_a_run(result: Result) -> None:
    assert [(row.variant, row.dtype) for row in result.rows] == [
        ("dense", "float32"),
        ("both", "float32"),
        ("dense", "bfloat16"),
        ("both", "bfloat16"),
    ]
    dense, both = result.rows[:2]
    assert len(dense.ms_per_token.samples) == 6
    assert dense.speedup == 1.0
    assert both.speedup == pytest.approx(dense.ms_per_token.p50 / both.ms_per_token.p50, rel=1e-3)
    assert both.active_parameters < both.parameters
    assert dense.bytes_per_token == 2 * result.rows[2].bytes_per_token
    assert both.paper_speedup == pytest.approx(160 / 61, abs=1e-4)
    limit_ms = both.bytes_per_token / 20e9 * 1e3
    assert both.bandwidth_fraction == pytest.approx(limit_ms / both.ms_per_token.p50, abs=1e-4)
    assert both.held_out_nats is None


def test_rows_are_compared_with_the_dense_row_that_is_named() -> None:
    measured = command.run(loaded(), over="torch:bfloat16", context=[4, 8], format="json")
    dense = {row.context: row for row in measured.rows if row.variant == "dense" and row.dtype == "bfloat16"}
    for row in measured.rows:
        expected = dense[row.context].ms_per_token.p50 / row.ms_per_token.p50
        assert row.speedup_over == pytest.approx(expected, rel=1e-3)
    assert "the first dense or peer row of torch:bfloat16" in table.as_markdown(measured)


def test_percentiles() -> None:
    spread = measure.spread(np.arange(101.0))
    assert (spread.p10, spread.p50, spread.p90) == (10, 50, 90)


def test_the_recipe_of_a_result_is_what_was_run() -> None:
    measured = command.run(
        loaded(),
        sparse=True,
        dtypes=["bfloat16"],
        context=[5],
        rounds=1,
        tokens=2,
        format="json",
        threads=[1],
    )
    recipe = Recipe.model_validate_json(json.dumps(measured.recipe))
    assert recipe.model == loaded().recipe.model
    assert (
        recipe.bench
        == loaded(
            variants=VARIANTS[1:], dtypes=["bfloat16"], context=5, rounds=1, tokens_per_round=2
        ).recipe.bench
    )


# -- formats -------------------------------------------------------------------------------------------------


def test_json_is_the_documented_format(result: Result) -> None:
    record = json.loads(table.as_json(result))
    assert list(record) == [
        "schema",
        "command",
        "recipe",
        "settings",
        "versions",
        "machine",
        "rows",
        "over",
        "peak_memory_gb",
        "comparison",
    ]
    assert record["schema"] == 1
    assert set(record["machine"]) == {"cpu", "isa", "threads", "bandwidth_gb_s", "memory_gb", "disk"}
    assert set(record["rows"][0]) >= {
        "variant",
        "group",
        "backend",
        "dtype",
        "parameters",
        "active_parameters",
        "bytes_per_token",
        "ms_per_token",
        "ms_per_block",
        "tokens_per_second",
        "speedup",
        "bandwidth_fraction",
        "held_out_nats",
    }
    assert set(record["rows"][0]["ms_per_token"]) == {"p10", "p50", "p90", "samples"}
    assert Result.model_validate_json(table.as_json(result)) == result


def test_every_field_is_documented() -> None:
    text = (Path(__file__).parent.parent / "docs" / "benchmark.md").read_text(encoding="utf-8")
    models = (Result, Settings, Machine, Bandwidth, Row, report.Times, report.Change)
    names = {field.alias or name for model in models for name, field in model.model_fields.items()}
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_csv_and_markdown_have_every_row(result: Result) -> None:
    lines = list(csv.DictReader(io.StringIO(table.as_csv(result))))
    assert [line["variant"] for line in lines] == [row.variant for row in result.rows]
    assert float(lines[1]["ms_per_token_p50"]) == result.rows[1].ms_per_token.p50
    assert lines[0]["held_out_nats"] == ""
    lines = table.as_markdown(result).splitlines()
    assert len({line.count("|") for line in lines[: 2 + len(result.rows)]}) == 1


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_fits_and_keeps_what_matters(width: int) -> None:
    shown = made_up({"dense": noisy(120, 1), "+ Sparse FF + QKV + loss": noisy(15, 2)})
    screen = Console(file=io.StringIO(), width=width, markup=False)
    screen.print(table.table(shown, width))
    lines = screen.file.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    assert "+ Sparse FF + QKV + loss" in text
    for title in ("MB /", "ms /", "speed-", "of memory"):
        assert title in text


def test_numbers_read_well() -> None:
    assert [table.count(n) for n in (999, 819_000_000, 16_900_000_000)] == ["999", "819M", "16.9B"]
    assert [table.milliseconds(n) for n in (126.4, 19.44, 3.619)] == ["126", "19.4", "3.62"]


# -- comparing -----------------------------------------------------------------------------------------------


def verdicts(now: Result, before: Result, threshold: float = 0.05) -> list[str]:
    return [change.verdict for change in compare.compare(now, before, threshold)]


def test_a_slower_row_is_found_and_an_equal_one_is_not() -> None:
    before = made_up({"dense": noisy(100, 1), "both": noisy(20, 2)})
    now = made_up({"dense": noisy(100, 3), "both": noisy(23, 4)})
    assert verdicts(now, before) == ["same", "slower"]
    assert verdicts(before, now) == ["same", "faster"]
    assert verdicts(now, before, threshold=0.3) == ["same", "same"]


def test_one_disturbed_round_is_noise() -> None:
    calm, disturbed = noisy(20, 1, rounds=3), noisy(20, 2, rounds=3)
    disturbed[:2] += 6  # two of three rounds, so that the median moves by 30 %
    before, now = made_up({"both": calm}), made_up({"both": disturbed})
    assert compare.compare(now, before, 0.05)[0].ratio > 1.2
    assert verdicts(now, before) == ["same"]


def test_slower_memory_explains_slower_rows() -> None:
    before = made_up({"both": noisy(20, 1)}, bandwidth=50)
    assert verdicts(made_up({"both": noisy(24, 2)}, bandwidth=40), before) == ["same"]
    assert verdicts(made_up({"both": noisy(30, 2)}, bandwidth=40), before) == ["slower"]


def set_all(record: object, name: str, value: object) -> None:
    """Replace every field called `name`, at any depth."""
    for inner in record.values() if isinstance(record, dict) else record if isinstance(record, list) else []:
        set_all(inner, name, value)
    if isinstance(record, dict) and name in record:
        record[name] = value


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("cpu", "b", "machine.cpu was 'b'"),
        ("isa", "none", "machine.isa was 'none'"),
        ("threads", 3, "dense was measured at 3 threads, context 8, is at 1 thread, context 8"),
        ("context", 9, "dense was measured at 1 thread, context 9, is at 1 thread, context 8"),
        ("batch", 4, "dense was measured at 1 thread, context 8, batch 4, is at 1 thread, context 8"),
        ("parameters", 7, "parameters of dense was 7"),
        ("active_parameters", 7, "active_parameters of dense was 7"),
        ("bytes_per_token", 7, "bytes_per_token of dense was 7"),
        ("projected", True, "projected of dense was True, is False"),
        ("backend", "other", "no row of the same variant, backend and dtype"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_what_cannot_be_compared_is_refused_before_anything_is_measured(
    result: Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    value: object,
    told: str,
    dry_run: bool,
) -> None:
    record = json.loads(table.as_json(result))
    for part in ("machine", "settings", "rows"):
        set_all(record[part], field, value)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setattr(weights.Pools, "of", lambda *_: pytest.fail("built"))
    with pytest.raises(console.Failure, match=f"old.json: .*{told}") as caught:
        command.run(loaded(), against=path, threads=[1], dry_run=dry_run)
    assert caught.value.exit_code == 1


def test_results_from_before_there_were_sizes_compare(result: Result, tmp_path: Path) -> None:
    record = json.loads(table.as_json(result))
    for row in record["rows"]:
        for name in ("precision", "threads", "context", "batch", "prefill", "from_disk", "parts"):
            del row[name]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    earlier = compare.read(path)
    assert {row.key for row in earlier.rows} == {row.key for row in result.rows}
    assert len(compare.compare(result, earlier, 0.05)) == len(result.rows)


@needs_native
def test_another_precision_does_not_compare(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    both = [{**VARIANTS[1], "precision": {"projection": "float32"}}]
    chosen = {"backends": ["native"], "dtypes": ["bfloat16"]}
    command.run(loaded(variants=both, **chosen), output=path, format="json")
    both[0]["precision"] = {"head": "float32", "embedding": "float32"}
    with pytest.raises(console.Failure, match="of both was"):
        command.run(loaded(variants=both, **chosen), against=path, format="json")


def test_slower_memory_is_told_after_the_result_is_written(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(table.as_json(result), encoding="utf-8")
    monkeypatch.setattr(roofline, "bandwidth", lambda: 10.0)
    command.run(loaded(), against=old, output=new, format="json", threads=[1])
    told = " ".join(capsys.readouterr().err.split())
    assert 0 <= told.find("wrote") < told.find("memory reads 10.0 GB/s, 20.0 in the earlier result")
    assert compare.read(new).comparison is not None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "rows": 3}', "\udcff"])
def test_a_malformed_file_is_one_clear_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "old.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(console.Failure) as caught:
        command.run(loaded(), against=path)
    assert str(path) in caught.value.message
    assert len(caught.value.message.splitlines()) == 1


def test_a_result_with_samples_that_do_not_fit_its_settings_is_refused(
    result: Result, tmp_path: Path
) -> None:
    record = json.loads(table.as_json(result))
    record["rows"][0]["ms_per_token"]["samples"].pop()
    path = tmp_path / "old.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(console.Failure, match="samples"):
        compare.read(path)


# -- the command ---------------------------------------------------------------------------------------------


def test_a_regression_is_raised_after_the_result_is_written(
    result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads(table.as_json(result))
    for row in record["rows"]:
        row["ms_per_token"] = {
            name: [value / 100 for value in values] if name == "samples" else values / 100
            for name, values in row["ms_per_token"].items()
        }
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(console.Regression) as caught:
        command.run(loaded(), against=old, fail_above=0.05, output=new, format="json", threads=[1])
    assert caught.value.exit_code == 3
    shown = json.loads(capsys.readouterr().out)
    assert {change["verdict"] for change in shown["comparison"]} == {"slower"}
    assert json.loads(new.read_text(encoding="utf-8")) == shown
    assert sorted(tmp_path.iterdir()) == [new, old]


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        ({"models": ["RUN"], "context": [100]}, "use a smaller --context", 1),
        ({"dtypes": ["float16"]}, "float16", 2),
        ({"rounds": 0}, "--rounds: 0 should be at least 1", 2),
        ({"batch": [1, 0]}, "--batch: 0 should be at least 1", 2),
        ({"prefill": 24, "models": ["RUN"], "threads": [1, 257]}, "--threads: 257 is more than 256", 2),
        ({"models": ["RUN"], "prefill": 100}, "use a smaller --prefill", 1),
        ({"fail_above": 0.05}, "--against", 2),
        ({"output": Path("/nowhere/at/all.json")}, "does not exist", 1),
        ({"against": Path("/nowhere.json")}, "cannot read", 1),
        ({"models": ["nowhere"]}, "nowhere", 1),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path, options: dict[str, object], message: str, code: int
) -> None:
    if options.get("models") == ["RUN"]:
        options = {**options, "models": [str(trained(tmp_path / "run"))]}
    with pytest.raises(console.Failure, match=message) as caught:
        command.run(loaded(), **options)
    assert caught.value.exit_code == code
    assert len(caught.value.message.splitlines()) == 1


def test_a_recipe_without_a_bench_block_is_told() -> None:
    recipe = Recipe.model_validate({"model": MODEL})
    with pytest.raises(console.RecipeError, match="`bench:` block"):
        command.run(LoadedRecipe(recipe=recipe, name="tiny", path=Path("tiny.yaml")))


def test_too_little_memory_is_told_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    monkeypatch.setattr(weights.Pools, "of", lambda *_: pytest.fail("built"))
    with pytest.raises(console.Failure, match="GB are available"):
        command.run(loaded())


@pytest.mark.parametrize(("percent", "told"), [(0.0, False), (75.0, True)])
def test_a_busy_machine_is_told(
    percent: float, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine.psutil, "cpu_percent", lambda interval: percent)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    machine.warn_if_busy()
    assert ("other processes use 1.5 of 2" in capsys.readouterr().err) is told


def test_a_dry_run_builds_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weights.Pools, "of", lambda *_: pytest.fail("built"))
    assert command.run(loaded(), dry_run=True) is None
    shown = capsys.readouterr()
    assert "MB / token" in shown.out
    assert "1 thread, context 8" in shown.out
    assert "files to be written: none" in shown.err
    command.run(loaded(), dry_run=True, format="json", output=Path("result.json"))
    plan = json.loads(capsys.readouterr().out)
    assert plan.keys() == {"dry_run", "rows", "memory_bytes", "disk_bytes", "output"}
    assert {row["context"] for row in plan["rows"]} == {8}
    assert (plan["dry_run"], plan["disk_bytes"], plan["output"]) == (True, None, "result.json")
    assert plan["memory_bytes"] > 0


@pytest.mark.parametrize(("suffix", "start"), [(".csv", "variant,"), (".md", "| variant"), (".json", "{")])
def test_output_follows_the_suffix_as_the_help_says(
    result: Result, tmp_path: Path, suffix: str, start: str
) -> None:
    path = tmp_path / f"result{suffix}"
    command._write(result, path)
    assert path.read_text(encoding="utf-8").startswith(start)
    told = " ".join(CliRunner().invoke(cli.app, ["bench", "--help"]).output.split())
    assert "write the result here: .csv, .md, else JSON." in told


# -- trained runs --------------------------------------------------------------------------------------------


def trained(run: Path, **blocks: object) -> Path:
    """A run of an untrained model with a tokenizer and a held-out loss."""
    spec = ModelSpec.model_validate({**MODEL, **blocks})
    ScalingTransformerForCausalLM(ScalingTransformerConfig.from_spec(spec)).save_pretrained(run / "model")
    tokenizer = Tokenizer(WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(run / "model")
    facts = {"seed": 0, "result": {"held_out_nats": 3.25, "bits_per_byte": 1.5}}
    run_directory.write_facts(run, run_directory.environment() | facts)
    return run


def test_a_trained_run_brings_its_held_out_loss(tmp_path: Path) -> None:
    run = trained(tmp_path / "my-run", feed_forward=SPARSE)
    [candidate] = variants.from_runs([str(run)])
    assert (candidate.name, candidate.group, candidate.held_out_nats) == ("my-run", "sparse", 3.25)
    weights = variants.trained_weights(candidate.run, torch.bfloat16)
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values())
    measured = command.run(loaded(), models=[str(run)], dtypes=["float32"], format="json", threads=[1])
    [row] = measured.rows
    assert (row.variant, row.held_out_nats, row.speedup) == ("my-run", 3.25, None)
    assert measured.recipe is None
    assert Result.model_validate_json(table.as_json(measured)) == measured


@pytest.mark.parametrize(("positions", "context"), [(24, 18), (400, 64)])
def test_the_default_context_is_what_a_trained_run_has_positions_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], positions: int, context: int
) -> None:
    """Of which two warm up and four are measured."""
    run = trained(tmp_path / "run", max_positions=positions)
    recipe = loaded()
    plain = recipe.recipe.model_copy(update={"bench": None})
    command.run(replace(recipe, recipe=plain), models=[str(run)], dry_run=True, format="json")
    assert {row["context"] for row in json.loads(capsys.readouterr().out)["rows"]} == {context}
    if positions < 64:
        with pytest.raises(
            console.Failure, match=r"70 positions are needed .* has 24; use a smaller --context"
        ):
            command.run(replace(recipe, recipe=plain), models=[str(run)], context=[64], dry_run=True)


@pytest.mark.parametrize(
    ("blocks", "group"),
    [
        ({}, "dense"),
        ({"attention": {"projection": "dense_conv"}}, "dense"),
        ({"feed_forward": SPARSE}, "sparse"),
        ({"attention": {"projection": "multiplicative_conv"}}, "sparse"),
        ({"attention": {"output_projection": "multiplicative"}}, "sparse"),
        ({"vocabulary": {"kind": "multiplicative", "size": 50, "modules": 2}}, "sparse"),
    ],
)
def test_a_trained_run_is_grouped_by_its_layers(tmp_path: Path, blocks: dict, group: str) -> None:
    [candidate] = variants.from_runs([str(trained(tmp_path / "run", **blocks))])
    assert candidate.group == group


def test_runs_in_folders_of_the_same_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [str(trained(tmp_path / name)) for name in ("a/runs/quick", "b/runs/quick", "b/runs/slow")]
    monkeypatch.chdir(runs[0])
    again = [*runs, ".", f"{runs[1]}/model"]  # the same models once more
    names = [candidate.name for candidate in variants.from_runs(again)]
    assert names == ["a/runs/quick", "b/runs/quick", "slow"]
