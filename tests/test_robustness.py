"""The robustness commands (make crash, fuzz, soak), small: that they pass, and that they notice what is broken."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from robustness import fuzz, mutations, soak
from robustness.processes import fork, undesigned
from small_runs import files_up_to, write_recipe

from sparsecli.cli import main
from sparsecli.console import Failure
from sparsecli.decode.native import binding
from sparsecli.model.files import read_json
from sparsecli.model.outputs import BESIDE, held, written_beside
from sparsecli.recipe import commands
from sparsecli.train.result import known_result
from sparsecli.train.run_directory import alone, read_facts

ROOT = Path(__file__).parents[1]
needs_native = pytest.mark.skipif(binding.available() is not None, reason="the native engine is not there")


def command(*words: str) -> str:
    """What a robustness command prints. It has to find no fault."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("robustness.crash", "--kills", "3", "--only", "train", "import", "pipes", "two"),
        ("robustness.fuzz", "--inputs", "60", "--flips", "50", "--workers", "1"),
        ("robustness.soak", "--tokens", "3000", "--clients", "4"),
    ],
)
def test_small(words: tuple[str, ...]) -> None:
    assert command(*words).strip()


# -- what the commands would notice --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "said", "left", "found"),
    [
        (0, "", False, "read"),
        (2, "error: r.yaml: wrong\n", False, "refused"),
        (1, "error: unexpected KeyError: 'x'; ...\n", False, "error: unexpected"),
        (70, "", False, "exit code 70"),
        (1, "", False, "exit code 1 without an error"),
        (1, "error: x\n", True, "refused, and left"),
        (1, "error: not enough memory; use a smaller model\n", False, "asked for more"),
        (1, f"error: {'x' * 3000}\n", False, "an error of 3007 characters"),
    ],
)
def test_ends_of_a_command(code: int, said: str, left: bool, found: str) -> None:
    assert fuzz.ended(code, said, left).startswith(found)


def test_a_worker_that_dies_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that hangs. The other inputs are tried all the same."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "x").write_bytes(b"x")
    kind = fuzz.Kind("x", tmp_path / "files", "x", lambda content, draw: content, (("--version",),))

    def try_input(
        kind: object, place: Path, content: bytes, arguments: object, log: int
    ) -> tuple[str, float, float]:
        tried = place.parent / "tried"
        number = len(tried.read_text()) if tried.exists() else 0
        with open(tmp_path / "count", "a") as count:
            count.write(".")
        if len((tmp_path / "count").read_text()) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return "read", 0.0, float(number)

    monkeypatch.setattr(fuzz, "try_input", try_input)
    found = {each.index: each.ended for each in fuzz.search([kind], tmp_path, 4, 0, 1)}
    assert sorted(found) == [0, 1, 2, 3]
    assert found[1].startswith("crash, exit code -9")
    assert [found[index] for index in (0, 2, 3)] == ["read"] * 3


def test_a_command_in_a_fork(tmp_path: Path) -> None:
    def fails() -> None:
        raise Failure("x")

    def exits() -> None:
        raise SystemExit(3)

    assert fork(lambda: None, tmp_path / "log").wait() == 0
    assert fork(exits, tmp_path / "log").wait() == 3
    failed = fork(fails, tmp_path / "log")
    assert failed.wait() == 70
    assert "exit code 70" in str(undesigned(failed))


def test_growth_of_memory() -> None:
    grows = [(tokens, 100 + tokens / 100) for tokens in range(0, 1001, 10)]
    assert soak.growth(grows, 1000) == pytest.approx(7)
    flat = [(tokens, 100 + min(tokens, 250) / 10) for tokens in range(0, 1001, 10)]
    assert soak.growth(flat, 1000) == pytest.approx(0, abs=1e-9)


def test_mutations_are_repeatable_and_change_something() -> None:
    content = json.dumps({"a": [1, 2, {"b": "text"}], "c": None}).encode()
    for mutate in (mutations.changed_text, mutations.rewritten):
        made = [mutate(content, random.Random(seed)) for seed in range(40)]
        assert made == [mutate(content, random.Random(seed)) for seed in range(40)]
        assert len({*made}) > 20


# -- faults that they have found -----------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an error, with exit code 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sparsecli", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 1, line
    assert "unexpected" not in line
    assert len(line) < 1100
    return line


@pytest.mark.parametrize(
    "value", ["1" + "0" * 400, '"x"', "{}", "[" * 5000 + "]" * 5000, '"' + "a" * 100_000 + '"']
)
def test_a_damaged_result_of_a_run(tmp_path: Path, value: str) -> None:
    figures = f'{{"steps": 2, "held_out_loss": {value}, "bits_per_byte": 1.0, "tokens_per_second": 1.0}}'
    (tmp_path / "run.json").write_text(f'{{"result": {figures}}}')
    with pytest.raises(Failure, match=r"run\.json: .*delete it to continue without it"):
        known_result(tmp_path)


@pytest.mark.parametrize("value", ['""', "null", "[1]", "1.5"])
def test_a_number_of_processes_that_is_none(tmp_path: Path, value: str) -> None:
    (tmp_path / "run.json").write_text(f'{{"processes": {value}}}')
    with pytest.raises(Failure, match=r"run\.json: does not hold the facts of a run; delete it"):
        read_facts(tmp_path)


def test_a_number_that_no_float_holds(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": ' + "9" * 301 + "}")
    with pytest.raises(Failure, match="a number has 301 digits"):
        read_json(tmp_path / "x.json")


def test_prompts_that_are_nested_too_deep(
    finished: tuple[Path, object], capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished[0].parent / "prompts.jsonl"
    path.write_text("[" * 5000)
    line = refused(capsys, "generate", "--model", finished[0], "--prompts", path)
    assert "prompts.jsonl:1: expected a JSON string" in line


def test_an_error_with_a_long_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "generate", "--model", tmp_path / ("a" * 5000)).endswith("…")


def test_a_model_is_the_same_with_a_cached_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its config.json does not keep what holds for training alone."""
    from sparsecli.recipe.loader import load
    from sparsecli.train.command import run

    monkeypatch.setenv("SPARSECLI_CACHE", str(tmp_path / "cache"))
    recipe = load(str(write_recipe(tmp_path)), ["train.max_steps=2", "train.eval_steps=2"])
    for name in ("first", "second"):
        run(recipe, output=tmp_path / name)
    files = [
        {
            path.name: path.read_bytes()
            for path in (tmp_path / name / "model").iterdir()
            if path.suffix != ".md"
        }
        for name in ("first", "second")
    ]
    assert files[0] == files[1]
    assert b"local" not in files[0]["tokenizer_config.json"]
    assert json.loads(files[0]["config.json"])["use_cache"] is True


def test_a_copy_of_a_recipe_on_a_full_disk(tmp_path: Path) -> None:
    with files_up_to(100), pytest.raises(Failure, match=r"my\.yaml: cannot be written: File too large"):
        commands.copy("quickstart", tmp_path / "my.yaml")
    commands.copy("quickstart", tmp_path / "my.yaml")


def test_two_processes_train_in_one_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    output = tmp_path / "runs" / "run"
    with alone(output):
        with (
            pytest.raises(Failure, match="another process trains in this folder; wait for it"),
            alone(output),
        ):
            pass
        assert output.is_dir()
    assert not output.exists()  # nothing was written


def test_what_a_killed_import_left_is_deleted(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    output = tmp_path / "model"
    dead, used, other = (tmp_path / name for name in (f"model.1{BESIDE}", f"model.2{BESIDE}", "model.3"))
    for folder in (dead, used, other):
        folder.mkdir()
    with held(used) as free, written_beside(output) as made:
        assert free
        (made / "x").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"model", used.name, other.name}


def test_another_process_has_written_it_meanwhile(tmp_path: Path) -> None:
    def write() -> None:
        with written_beside(tmp_path / "model") as made:
            (made / "x").touch()
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "y").touch()

    with pytest.raises(Failure, match="model: another process has written it meanwhile"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("nested", "fits"), [(90, True), (101, False), (900, False), (5000, False)])
def test_json_that_is_nested_too_deep(tmp_path: Path, nested: int, fits: bool) -> None:
    """900 levels can be read, but what they are copied to fails later."""
    path = tmp_path / "x.json"
    path.write_text('{"a": ' + "[" * (nested - 1) + "]" * (nested - 1) + "}")
    if fits:
        assert read_json(path)
        return
    with pytest.raises(Failure, match=r"x\.json: does not load: is nested too deep"):
        read_json(path)


@pytest.mark.parametrize("fields", [{"dtype": 1e300}, {"rope_scaling": {"dtype": [1]}}])
def test_a_dtype_that_is_no_name(fields: dict[str, object]) -> None:
    from sparsecli.interchange.sources import read_architecture

    with pytest.raises(Failure, match="dtype: expected the name of a type, got"):
        read_architecture({"model_type": "llama", **fields})


def test_a_damaged_sentencepiece_model(tmp_path: Path) -> None:
    """A piece that is no text, and special tokens that are none of its pieces."""
    from test_interchange import write_model
    from transformers.utils.sentencepiece_model_pb2_new import ModelProto

    from sparsecli.interchange.sentencepiece_tokenizer import read_sentencepiece

    path = tmp_path / "tokenizer.model"
    write_model(path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"<s>", b"<\xff>", 1))
    with pytest.raises(Failure, match=r"tokenizer\.model: .*a piece is not UTF-8 text"):
        read_sentencepiece(path)
    model = ModelProto.FromString(whole)
    model.trainer_spec.eos_id = 10**6
    path.write_bytes(model.SerializeToString())
    assert read_sentencepiece(path)[1].keys() == {"bos_token", "unk_token"}


def test_an_index_of_shards_without_metadata(finished: tuple[Path, object]) -> None:
    """transformers needs them; its error named another file."""
    from sparsecli.model.files import INDEX, WEIGHTS, check_weights, find_model, read_description

    folder = find_model(str(finished[0]))
    spec = read_description(folder).spec
    whole = folder / WEIGHTS
    names = mutations.header_of(whole.read_bytes()).keys() - {"__metadata__"}
    shard = whole.rename(folder / "shard.safetensors")
    try:
        for metadata, fits in (({"metadata": {}}, True), ({"metadata": 1}, False), ({}, False)):
            index = metadata | {"weight_map": dict.fromkeys(names, shard.name)}
            (folder / INDEX).write_text(json.dumps(index))
            if fits:
                check_weights(folder, spec)
                continue
            with pytest.raises(Failure, match=r"model\.safetensors\.index\.json: has no metadata"):
                check_weights(folder, spec)
    finally:
        (folder / INDEX).unlink()
        shard.rename(whole)


def test_a_kind_of_file_that_is_refused_as_it_is(tmp_path: Path) -> None:
    """Such a kind would test nothing."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "x.yaml").write_text("wrong: 1")
    kind = fuzz.Kind(
        "x", tmp_path / "files", "x.yaml", mutations.rewritten, (("recipes", "check", "x.yaml"),)
    )
    checked = fork(lambda: fuzz.check_whole([kind], tmp_path), tmp_path / "log")
    assert checked.wait() == 70
    assert "recipes check x.yaml: x.yaml as it is: " in (tmp_path / "whole.said").read_text()
