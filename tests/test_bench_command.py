"""The command `bench`: what it writes, what it refuses, and trained runs beside one another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from foreign_models import LLAMA, build, save
from small_benches import MODEL, SPARSE, loaded, needs_native
from test_interchange import write_gguf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from sparsecli import cli, console
from sparsecli.bench import command, host, models, random_weights, render, variants
from sparsecli.bench.peers import PEERS
from sparsecli.bench.result import BenchResult
from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM
from sparsecli.recipe.loader import LoadedRecipe
from sparsecli.recipe.schema import BenchSpec, Recipe
from sparsecli.spec.model import ModelSpec
from sparsecli.train import run_directory

pytestmark = pytest.mark.usefixtures("quick_probe")


# -- the command ---------------------------------------------------------------------------------------------


def test_a_regression_is_raised_after_the_result_is_written(
    result: BenchResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads(render.as_json(result))
    for row in record["rows"]:
        row["ms_per_token"] = {
            name: [value / 100 for value in values] if name == "samples" else values / 100
            for name, values in row["ms_per_token"].items()
        }
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(console.Regression) as caught:
        command.run(loaded(threads=[1]), against=old, fail_above=0.05, output=new, format="json")
    assert caught.value.exit_code == 3
    shown = json.loads(capsys.readouterr().out)
    assert {change["verdict"] for change in shown["comparison"]} == {"slower"}
    assert json.loads(new.read_text(encoding="utf-8")) == shown
    assert sorted(tmp_path.iterdir()) == [new, old]


@pytest.mark.parametrize(
    ("bench", "options", "message", "code"),
    [
        ({"context": [100]}, {"runs": ["RUN"]}, "use a smaller --context", 1),
        ({"prefill": 24, "threads": [1, 257]}, {"runs": ["RUN"]}, "--threads: 257 is more than 256", 2),
        ({"prefill": 100}, {"runs": ["RUN"]}, "use a smaller --prefill", 1),
        ({}, {"against": Path("/nowhere.json")}, "cannot read", 1),
        ({}, {"runs": ["nowhere"]}, "nowhere", 1),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path, bench: dict[str, object], options: dict[str, object], message: str, code: int
) -> None:
    if options.get("runs") == ["RUN"]:
        options = {**options, "runs": [str(trained(tmp_path / "run"))]}
    with pytest.raises(console.Failure, match=message) as caught:
        command.run(loaded(**bench), **options)
    assert caught.value.exit_code == code
    assert len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize("bench", [None, {"rounds": 3}])
def test_a_recipe_without_variants_is_told(bench: dict[str, object] | None) -> None:
    recipe = Recipe.model_validate({"model": MODEL, "bench": bench})
    with pytest.raises(console.RecipeError, match="`bench:` block with variants"):
        command.run(LoadedRecipe(recipe=recipe, name="tiny", path=Path("tiny.yaml")))


def test_too_little_memory_is_told_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    monkeypatch.setattr(random_weights.Pools, "of", lambda *_: pytest.fail("built"))
    with pytest.raises(console.Failure, match="GB are available"):
        command.run(loaded())


@pytest.mark.parametrize(("percent", "told"), [(0.0, False), (75.0, True)])
def test_a_busy_machine_is_told(
    percent: float, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host.psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(host.psutil, "cpu_percent", lambda interval: percent)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    host.warn_if_busy()
    assert ("other processes use 1.5 of 2" in capsys.readouterr().err) is told


def test_a_dry_run_builds_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(random_weights.Pools, "of", lambda *_: pytest.fail("built"))
    assert command.run(loaded(), dry_run=True) is None
    shown = capsys.readouterr()
    assert "MB / token" in shown.out
    assert "1 thread, context 8" in shown.out
    assert "files to be written: none" in shown.err
    command.run(loaded(), dry_run=True, format="json", output=Path("result.json"))
    plan = json.loads(capsys.readouterr().out)
    assert plan.keys() == {"dry_run", "rows", "memory_bytes", "disk_bytes", "output", "html", "plot"}
    assert {row["context"] for row in plan["rows"]} == {8}
    assert (plan["dry_run"], plan["disk_bytes"], plan["output"]) == (True, None, "result.json")
    assert plan["memory_bytes"] > 0


@pytest.mark.parametrize(("suffix", "start"), [(".csv", "variant,"), (".md", "| variant"), (".json", "{")])
def test_output_follows_the_suffix_as_the_help_says(
    result: BenchResult, tmp_path: Path, suffix: str, start: str
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
    facts = {"seed": 0, "result": {"held_out_loss": 3.25, "bits_per_byte": 1.5}}
    run_directory.write_facts(run, run_directory.environment() | facts)
    return run


def test_a_trained_run_brings_its_held_out_loss(tmp_path: Path) -> None:
    run = trained(tmp_path / "my-run", feed_forward=SPARSE)
    [variant] = variants.from_runs([str(run)])
    assert (variant.name, variant.group, variant.held_out_loss) == ("my-run", "sparse", 3.25)
    weights = models.trained_weights(variant.run, torch.bfloat16)
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values())
    measured = command.run(loaded(dtypes=["float32"], threads=[1]), runs=[str(run)], format="json")
    [row] = measured.rows
    assert (row.variant, row.held_out_loss, row.speedup) == ("my-run", 3.25, None)
    assert measured.recipe is None
    assert BenchResult.model_validate_json(render.as_json(measured)) == measured


@pytest.mark.parametrize(("positions", "context"), [(24, 18), (400, 64)])
def test_the_default_context_is_what_a_trained_run_has_positions_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], positions: int, context: int
) -> None:
    """Of which two warm up and four are measured."""
    run = trained(tmp_path / "run", max_positions=positions)
    recipe = loaded()
    plain = recipe.recipe.model_copy(update={"bench": None})
    command.run(replace(recipe, recipe=plain), runs=[str(run)], dry_run=True, format="json")
    assert {row["context"] for row in json.loads(capsys.readouterr().out)["rows"]} == {context}
    if positions < 64:
        plain = plain.model_copy(update={"bench": BenchSpec(context=[64])})
        with pytest.raises(
            console.Failure, match=r"70 positions are needed .* has 24; use a smaller --context"
        ):
            command.run(replace(recipe, recipe=plain), runs=[str(run)], dry_run=True)


@pytest.mark.parametrize(
    ("blocks", "group"),
    [
        ({}, "dense"),
        ({"attention": {"projection": "dense_conv"}}, "dense"),
        ({"feed_forward": SPARSE}, "sparse"),
        ({"feed_forward": {"kind": "mixture", "d_ff": 32, "experts": 4}}, "mixture"),
        ({"attention": {"projection": "multiplicative_conv"}}, "sparse"),
        ({"attention": {"output_projection": "multiplicative"}}, "sparse"),
        ({"vocabulary": {"kind": "multiplicative", "size": 50, "modules": 2}}, "sparse"),
    ],
)
def test_a_trained_run_is_grouped_by_its_layers(tmp_path: Path, blocks: dict, group: str) -> None:
    [variant] = variants.from_runs([str(trained(tmp_path / "run", **blocks))])
    assert variant.group == group


def test_runs_in_folders_of_the_same_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [str(trained(tmp_path / name)) for name in ("a/runs/quick", "b/runs/quick", "b/runs/slow")]
    monkeypatch.chdir(runs[0])
    again = [*runs, ".", f"{runs[1]}/model"]  # the same models once more
    names = [variant.name for variant in variants.from_runs(again)]
    assert names == ["a/runs/quick", "b/runs/quick", "slow"]


# -- GGUF files ----------------------------------------------------------------------------------------------

needs_llama = pytest.mark.skipif(PEERS["llama.cpp"].missing() is not None, reason="llama.cpp is not there")


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A tiny Llama in Q4_0."""
    original = build("llama", **LLAMA | {"intermediate_size": 64})
    write_gguf(original, save(original, tmp_path / "theirs"), tmp_path / "model.gguf", quantized="Q4_0")
    return tmp_path / "model.gguf"


@needs_llama
@needs_native
def test_a_gguf_file_is_measured_as_it_is_in_both(gguf_file: Path, tmp_path: Path) -> None:
    settings = {"backends": ["native"], "context": [8], "rounds": 2, "tokens_per_round": 2, "threads": [1]}
    recipe = Recipe.model_validate({"bench": {**settings, "peers": ["llama.cpp"]}})
    tiny = LoadedRecipe(recipe=recipe, name="tiny", path=Path("tiny.yaml"))
    before = sorted(tmp_path.iterdir())
    measured = command.run(tiny, runs=[str(gguf_file)], format="markdown")
    assert measured
    assert sorted(tmp_path.iterdir()) == before
    described = [(row.backend, row.variant, row.dtype, row.prefill) for row in measured.rows]
    assert described == [
        (backend, "model.gguf", "Q4_0", prefill)
        for backend in ("native", "llama.cpp")
        for prefill in (None, 256)
    ]
    ours, prompt, theirs, _ = measured.rows
    assert ours.bits_per_weight == theirs.bits_per_weight == prompt.bits_per_weight
    assert 4.5 < ours.bits_per_weight < 5  # vectors are float32
    assert ours.bytes_per_token == theirs.bytes_per_token
    assert ours.speedup_over_peer == pytest.approx(theirs.ms_per_token.p50 / ours.ms_per_token.p50, abs=1e-3)
    assert BenchResult.model_validate_json(render.as_json(measured)) == measured


@needs_llama
def test_what_a_peer_does_not_read_is_told(gguf_file: Path, tmp_path: Path) -> None:
    run = str(trained(tmp_path / "run"))
    for peer, reference, told in (
        ("openvino", str(gguf_file), "openvino has random weights; leave out --model"),
        ("llama.cpp", run, r"llama.cpp runs GGUF files as they are; name one, --model FILE\.gguf"),
    ):
        with pytest.raises(console.Failure, match=told) as caught:
            command.run(loaded(peers=[peer]), runs=[reference], dry_run=True)
        assert caught.value.exit_code == 2
    with pytest.raises(console.Failure, match=r"codes of GGUF files, .* need the native backend"):
        command.run(loaded(backends=["torch"]), runs=[str(gguf_file)], dry_run=True)
