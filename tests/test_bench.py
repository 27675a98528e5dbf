"""The bench: choosing rows, statistics, formats and the comparison, on models of a few thousand weights."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from sparsecli import cli, console
from sparsecli.bench import command, compare, machine, measure, report, roofline, variants
from sparsecli.bench.report import Bandwidth, Machine, Result, Row, Settings
from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM
from sparsecli.model.architecture import ModelSpec
from sparsecli.model.memory import ALIGNMENT
from sparsecli.recipe.loader import LoadedRecipe, load
from sparsecli.recipe.schema import PaperFigures, Recipe
from sparsecli.train import run_directory

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
BENCH = {"variants": VARIANTS, "context": 8, "rounds": 2, "tokens_per_round": 3, "warmup_tokens": 1}


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
        return command.run(loaded(), format="json", threads=1)


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


@pytest.mark.parametrize("name", ["bench-800m", "bench-17b"])
def test_shipped_variants_have_equal_parameter_counts(name: str) -> None:
    recipe = load(name).recipe
    candidates = variants.from_recipe(recipe.model, recipe.bench)
    assert variants.check_same_size(candidates) is None
    assert candidates[0].group == "dense"


def test_the_default_bench_takes_enough_rounds() -> None:
    """A round of its ten rows takes about six seconds on two idle processors; the whole should stay under 100."""
    assert 9 <= load("bench-800m").recipe.bench.rounds <= 15


def test_unequal_parameter_counts_are_told() -> None:
    recipe = loaded().recipe
    candidates = variants.from_recipe(recipe.model, recipe.bench)
    assert "differ in size" in (variants.check_same_size(candidates) or "")


def test_weights_of_a_model_are_disjoint_aligned_views_of_one_pool() -> None:
    spec = ModelSpec.model_validate({**MODEL, "feed_forward": SPARSE})
    pool = variants.random_pool(variants.pool_elements(spec, torch.bfloat16), torch.bfloat16)
    weights = variants.random_weights(spec, pool)
    ends = 0
    for weight in (weight for weight in weights.values() if weight.dim() > 1):
        start = weight.data_ptr() - pool.data_ptr()
        assert start % ALIGNMENT == 0
        assert start >= ends
        ends = start + weight.nbytes
    assert ends <= pool.nbytes
    assert set(weights) == {name for name, _ in variants.empty_model(spec).named_parameters()}
    assert all(bool((weights[name] == 1).all()) for name in weights if name.endswith("norm.weight"))


def test_a_long_pool_repeats_its_tile_out_of_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "TILE", 101)
    pool = variants.random_pool(300, torch.float32)
    assert torch.equal(pool[:101], pool[101:202])
    assert not torch.equal(pool[:64], pool[128:192])
    assert pool.isfinite().all()


def test_random_models_choose_many_different_units_and_stay_finite() -> None:
    spec = ModelSpec.model_validate({**MODEL, "d_model": 64, "feed_forward": {**SPARSE, "rank": 16}})
    pool = variants.random_pool(variants.pool_elements(spec, torch.float32), torch.float32)
    weights = variants.random_weights(spec, pool)
    decoder = measure.TorchBackend().load(spec, weights, torch.float32, capacity=32)
    seen: list[torch.Tensor] = []
    controller = decoder.model.model.blocks[1].feed_forward.controller
    controller.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.argmax(-1)))
    with torch.inference_mode():
        logits = decoder.model(torch.arange(32)[None]).logits
    assert logits.isfinite().all()
    shares = torch.bincount(seen[0].flatten(), minlength=8) / seen[0].numel()
    assert shares.max() < 0.5
    assert (shares > 0).sum() >= 6


def test_one_block_can_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = command.run(loaded(measured_layers=1), format="json", threads=1)
    assert all(row.projected for row in whole.rows)
    turn = measure.Turn(SimpleNamespace(), 50, 10, 2, token_ns=[5_000_000], block_stack_ns=[4_000_000])
    assert turn.token_ms.tolist() == [21.0]  # 1 ms outside the blocks, 10 blocks of 2 ms
    assert turn.block_ms.tolist() == [2.0]


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

    turns = [measure.Turn(Recorder(name), 50, 2, 2) for name in "ab"]
    settings = Settings(context=5, rounds=2, tokens_per_round=1, warmup_tokens=1)
    with console.progress("test", None) as progress:
        measure.measure(turns, settings, 0, progress)
    turn = ["rewind", "step", "step"]
    expected = [("a", "prefill 5"), ("b", "prefill 5")]
    expected += [(name, what) for _ in range(2) for name in "ab" for what in turn]
    assert log == expected
    assert [len(turn.token_ns) for turn in turns] == [2, 2]


def test_a_rewound_decoder_repeats_itself() -> None:
    spec = ModelSpec.model_validate({**MODEL, "attention": {"projection": "multiplicative_conv"}})
    pool = variants.random_pool(variants.pool_elements(spec, torch.float32), torch.float32)
    decoder = measure.TorchBackend().load(spec, variants.random_weights(spec, pool), torch.float32, 16)
    decoder.prefill([1, 2, 3, 4])

    def three() -> list[int]:
        tokens = [7]
        for _ in range(3):
            token, nanoseconds = decoder.step(tokens[-1])
            assert nanoseconds > 0
            tokens.append(token)
        return tokens

    first = three()
    decoder.rewind()
    assert three() == first


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


def test_percentiles() -> None:
    spread = measure.spread(np.arange(101.0))
    assert (spread.p10, spread.p50, spread.p90) == (10, 50, 90)


def test_the_recipe_of_a_result_is_what_was_run() -> None:
    measured = command.run(
        loaded(),
        sparse=True,
        dtypes=["bfloat16"],
        context=5,
        rounds=1,
        tokens=2,
        format="json",
        threads=1,
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
    record = json.loads(report.as_json(result))
    assert list(record) == [
        "schema",
        "command",
        "recipe",
        "settings",
        "versions",
        "machine",
        "rows",
        "comparison",
    ]
    assert record["schema"] == 1
    assert set(record["machine"]) == {"cpu", "isa", "threads", "bandwidth_gb_s", "memory_gb"}
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
    assert Result.model_validate_json(report.as_json(result)) == result


def test_every_field_is_documented() -> None:
    text = (Path(__file__).parent.parent / "docs" / "benchmark.md").read_text(encoding="utf-8")
    models = (Result, Settings, Machine, Bandwidth, Row, report.Times, report.Change)
    names = {field.alias or name for model in models for name, field in model.model_fields.items()}
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_csv_and_markdown_have_every_row(result: Result) -> None:
    lines = list(csv.DictReader(io.StringIO(report.as_csv(result))))
    assert [line["variant"] for line in lines] == [row.variant for row in result.rows]
    assert float(lines[1]["ms_per_token_p50"]) == result.rows[1].ms_per_token.p50
    assert lines[0]["held_out_nats"] == ""
    table = report.as_markdown(result).splitlines()
    assert len({line.count("|") for line in table[: 2 + len(result.rows)]}) == 1


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_fits_and_keeps_what_matters(width: int) -> None:
    shown = made_up({"dense": noisy(120, 1), "+ Sparse FF + QKV + loss": noisy(15, 2)})
    screen = Console(file=io.StringIO(), width=width, markup=False)
    screen.print(report.table(shown, width))
    lines = screen.file.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    assert "+ Sparse FF + QKV + loss" in text
    for title in ("MB /", "ms /", "speed-", "of memory"):
        assert title in text


def test_numbers_read_well() -> None:
    assert [report.count(n) for n in (999, 819_000_000, 16_900_000_000)] == ["999", "819M", "16.9B"]
    assert [report.milliseconds(n) for n in (126.4, 19.44, 3.619)] == ["126", "19.4", "3.62"]


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
        ("threads", 3, "machine.threads was 3, is 1"),
        ("context", 9, "settings.context was 9, is 8"),
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
    record = json.loads(report.as_json(result))
    for part in ("machine", "settings", "rows"):
        set_all(record[part], field, value)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setattr(variants, "random_pool", lambda *_: pytest.fail("built"))
    with pytest.raises(console.Failure, match=f"old.json: .*{told}") as caught:
        command.run(loaded(), against=path, threads=1, dry_run=dry_run)
    assert caught.value.exit_code == 1


def test_slower_memory_is_told_after_the_result_is_written(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(report.as_json(result), encoding="utf-8")
    monkeypatch.setattr(roofline, "bandwidth", lambda: 10.0)
    command.run(loaded(), against=old, output=new, format="json", threads=1)
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
    record = json.loads(report.as_json(result))
    record["rows"][0]["ms_per_token"]["samples"].pop()
    path = tmp_path / "old.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(console.Failure, match="samples"):
        compare.read(path)


# -- the command ---------------------------------------------------------------------------------------------


def test_a_regression_is_raised_after_the_result_is_written(
    result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads(report.as_json(result))
    for row in record["rows"]:
        row["ms_per_token"] = {
            name: [value / 100 for value in values] if name == "samples" else values / 100
            for name, values in row["ms_per_token"].items()
        }
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(console.Regression) as caught:
        command.run(loaded(), against=old, fail_above=0.05, output=new, format="json", threads=1)
    assert caught.value.exit_code == 3
    shown = json.loads(capsys.readouterr().out)
    assert {change["verdict"] for change in shown["comparison"]} == {"slower"}
    assert json.loads(new.read_text(encoding="utf-8")) == shown
    assert sorted(tmp_path.iterdir()) == [new, old]


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        ({"context": 100}, "use a smaller --context", 1),
        ({"dtypes": ["float16"]}, "float16", 2),
        ({"rounds": 0}, "--rounds", 2),
        ({"fail_above": 0.05}, "--against", 2),
        ({"output": Path("/nowhere/at/all.json")}, "does not exist", 1),
        ({"against": Path("/nowhere.json")}, "cannot read", 1),
        ({"models": ["nowhere"]}, "nowhere", 1),
    ],
)
def test_bad_input_is_one_clear_line(options: dict[str, object], message: str, code: int) -> None:
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
    monkeypatch.setattr(variants, "random_pool", lambda *_: pytest.fail("built"))
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
    monkeypatch.setattr(variants, "random_pool", lambda *_: pytest.fail("built"))
    assert command.run(loaded(), dry_run=True) is None
    shown = capsys.readouterr()
    assert "MB / token float32" in shown.out
    assert "files to be written: none" in shown.err


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
    measured = command.run(loaded(), models=[str(run)], dtypes=["float32"], format="json", threads=1)
    [row] = measured.rows
    assert (row.variant, row.held_out_nats, row.speedup) == ("my-run", 3.25, None)
    assert measured.recipe is None
    assert Result.model_validate_json(report.as_json(measured)) == measured


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
