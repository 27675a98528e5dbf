"""Arguments in, exit code out: what each command hands on, and how errors of every sort end."""

from __future__ import annotations

import errno
import inspect
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import sparsecli
from sparsecli import cli, console, doctor, pack
from sparsecli.bench import command as bench
from sparsecli.cli.options import shipped_names
from sparsecli.convert import command as convert
from sparsecli.evaluate import command as evaluate
from sparsecli.generate import command as generate
from sparsecli.generate.decoder import DecoderOptions
from sparsecli.interchange import exporting, hub, importing
from sparsecli.model import files
from sparsecli.model.files import find_model
from sparsecli.recipe.loader import load, shipped
from sparsecli.serve import command as serve
from sparsecli.train import command as train

PROGRAM = [sys.executable, "-c", "from sparsecli.cli import main; main()"]
IMPLEMENTATIONS = {
    "train": train.run,
    "sparsify-convert": convert.run,
    "generate": generate.generate,
    "serve": serve.run,
    "evaluate": evaluate.run,
    "import": importing.run,
    "export": exporting.run,
    "pack": pack.run,
    "bench": bench.run,
    "doctor": doctor.run,
}
SMALLEST = {
    "train": ["quickstart"],
    "sparsify-convert": ["quickstart-convert"],
    "generate": ["--prompt", "x"],
    "serve": [],
    "evaluate": [],
    "import": ["theirs", "--output", "ours"],
    "export": ["ours", "--output", "theirs"],
    "pack": [],
    "bench": [],
    "doctor": [],
}


@pytest.fixture
def run(monkeypatch):
    """Call the program in this process; the result is its exit code."""

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["sparsecli", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0

    return call


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the functions that do the work: they record their arguments, and raise `calls.error`.

    No model needs to be there.
    """
    record = SimpleNamespace(first=None, positional=(), options={}, error=None)

    def run(*positional, **options):
        record.positional, record.options = positional, options
        record.first = positional[0] if positional else None
        if record.error:
            raise record.error

    for function in IMPLEMENTATIONS.values():
        monkeypatch.setattr(sys.modules[function.__module__], function.__name__, run)

    @contextmanager
    def opened(reference, output=None, keep=True, types=None):
        try:
            folder = find_model(reference, output)
        except console.Failure:
            folder = Path("nowhere")
        yield folder

    monkeypatch.setattr(generate, "model_folder", opened)
    monkeypatch.setattr(hub, "check_reference", lambda *_, **__: None)
    monkeypatch.setattr(files, "check_exists", lambda _: None)
    return record


# -- what is handed on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", IMPLEMENTATIONS)
def test_arguments_fit_the_implementation(command, run, calls):
    assert run(command, *SMALLEST[command]) == 0
    inspect.signature(IMPLEMENTATIONS[command]).bind(*calls.positional, **calls.options)


def test_train(run, calls):
    assert run("train", "quickstart", "train.max_steps=7", "--seed", "3", "model.layers=2") == 0
    recipe = calls.first.recipe
    assert (recipe.train.max_steps, recipe.model.layers, recipe.seed) == (7, 2, 3)
    others = {"stop_after": None, "profile": False}
    assert calls.options == {"output": Path("runs/quickstart"), "resume": None, "dry_run": False} | others
    assert run("train", "quickstart", "output=there", "--resume", "auto", "--dry-run") == 0
    assert calls.options == {"output": Path("there"), "resume": "auto", "dry_run": True} | others
    assert run("train", "quickstart", "--stop-after", "1.5h", "--profile") == 0
    assert (calls.options["stop_after"], calls.options["profile"]) == (5400, True)
    assert run("train", "quickstart", "output=there", "--output", "here") == 0
    assert calls.options["output"] == Path("here")


def test_convert(run, calls):
    assert run("sparsify-convert", "quickstart-convert", "--model", "runs/a", "--json") == 0
    assert calls.first.name == "quickstart-convert"
    output = Path("runs/quickstart-convert")
    expected = {"model": "runs/a", "output": output, "dry_run": False, "format": "json", "peers": None}
    assert calls.options == expected | {"html": None, "plot": None}


def test_bench(run, calls):
    against = ["--against", str(shipped()["quickstart"])]
    assert run("bench", "--dense", "--sparse", "--dtype", "float32", "--fail-above", "5%", *against) == 0
    assert calls.first.name == "bench-800m"
    options = calls.options
    assert (options["dense"], options["sparse"], options["mixture"]) == (True, True, False)
    assert options["fail_above"] == 0.05
    assert (options["format"], options["runs"]) == ("table", [])
    bench = calls.first.recipe.bench
    assert (bench.dtypes, bench.threads, bench.profile) == (["float32"], None, False)
    assert run("bench", "bench-17b", "--fail-above", "0.1", *against, "--model", "a", "--model", "b") == 0
    assert calls.first.name == "bench-17b"
    assert (calls.options["fail_above"], calls.options["runs"]) == (0.1, ["a", "b"])


def test_a_first_override_is_no_recipe(run, calls):
    assert run("bench", "bench.rounds=9", "bench.context=3") == 0
    assert calls.first.name == "bench-800m"
    assert (calls.first.recipe.bench.rounds, calls.first.recipe.bench.context) == (9, [3])


def test_options_of_bench_are_keys_of_the_recipe(run, calls):
    lists = ["--threads", "1,2", "--context", "64", "--batch", "1,4,16", "--backend", "native"]
    others = ["--dtype", "int8", "--dtype", "int4", "--peer", "openvino", "--prefill", "9", "--rounds", "2"]
    flags = ["--tokens", "3", "--seed", "5", "--profile", "--from-disk", "bench.rounds=7", "bench.source=2"]
    assert run("bench", *lists, *others, *flags) == 0
    recipe = calls.first.recipe
    bench = recipe.bench
    assert (bench.threads, bench.context, bench.batch) == ([1, 2], [64], [1, 4, 16])
    assert (bench.backends, bench.dtypes, bench.peers) == (["native"], ["int8", "int4"], ["openvino"])
    assert (bench.prefill, bench.rounds, bench.tokens_per_round, bench.source) == (9, 2, 3, 2)
    assert (bench.profile, bench.from_disk, recipe.seed) == (True, True, 5)
    assert run("bench", "quickstart", "--rounds", "3", "--model", "runs/a") == 0  # it has no bench block
    assert (calls.first.recipe.bench.rounds, calls.first.recipe.bench.variants) == (3, None)


@pytest.mark.parametrize("numbers", ["0", "1,", "a", "1,-2", ""])
def test_bench_refuses_lists_that_are_none(numbers, run, calls, capsys):
    assert run("bench", f"--batch={numbers}") == 2
    assert "expected whole numbers above 0 such as 1,2" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["x", "-1%", "inf", "nan", ""])
def test_bench_refuses_shares_that_are_none(share, run, calls, capsys):
    assert run("bench", f"--fail-above={share}") == 2
    assert "expected a share such as 5%" in capsys.readouterr().err


def test_generate_options_go_before_the_recipe(run, calls):
    assert run("generate", "quickstart", "generate.top_k=9", "generate.top_p=0.5", "--top-p", "0.25") == 0
    options = calls.options["options"]
    assert (options.top_k, options.top_p) == (9, 0.25)
    assert calls.options["prompt"] == "def "
    assert calls.options["seed"] == options_seed("quickstart")
    assert (
        run("generate", "--temperature", "0", "--stop", "a", "--stop", "b", "--prompt", "x", "--seed", "4")
        == 0
    )
    options = calls.options["options"]
    assert (options.temperature, options.stop, calls.options["seed"]) == (0, ["a", "b"], 4)


def options_seed(name):
    return load(name).recipe.seed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "a", "--prompt", "x"], "--prompts: cannot be combined with --prompt"),
        (["--prompts", "a", "--draft", "lookup"], "--prompts: cannot be combined with --draft"),
        (["--chat", "--json"], "--chat: cannot be combined with --json"),
        (["--chat", "--prompt-file", "x"], "--chat: cannot be combined with --prompt-file"),
        (["--prompt", "x", "--logprobs", "2"], "--logprobs: needs --json or --prompts"),
        (["--json", "--logprobs", "2", "--draft", "self"], "--logprobs: cannot be combined with --draft"),
        (["--prompt", "x", "--system", "s"], "--system: needs --chat"),
    ],
)  # fmt: skip
def test_options_of_generate_that_exclude_one_another(options, message, run, calls, capsys):
    assert run("generate", *options) == 2
    assert message in capsys.readouterr().err


def test_seeds_are_random_unless_given(run, calls):
    seeds = []
    for _ in range(2):
        assert run("generate", "--prompt", "x") == 0
        seeds.append(calls.options["seed"])
    assert seeds[0] != seeds[1]


def test_generate_writes_as_the_run_was_told_to(run, calls, tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "model" / "config.json").write_text("{}")
    recipe = Path("runs/mine/recipe.yaml")
    monkeypatch.chdir(tmp_path)
    for model in ([], ["--model", "runs/mine"], ["--model", "runs/mine/model"]):
        recipe.unlink(missing_ok=True)
        assert run("generate", *model, "--prompt", "x") == 0
        assert calls.options["options"].repetition_penalty == 1
        recipe.write_text("generate: {repetition_penalty: 1.2, top_k: 7, prompt: other}")
        assert run("generate", *model, "--prompt", "x", "--top-k", "3") == 0
        options = calls.options["options"]
        assert (options.repetition_penalty, options.top_k, calls.options["prompt"]) == (1.2, 3, "x")


def test_generate_takes_no_recipe_that_only_lies_beside_a_model(run, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("theirs").mkdir()
    Path("theirs/config.json").write_text("{}")
    Path("recipe.yaml").write_text("generate: {repetition_penalty: 1.2}")
    assert run("generate", "--model", "theirs", "--prompt", "x") == 0
    assert calls.options["options"].repetition_penalty == 1


def test_generate_hands_on_how_to_decode(run, calls):
    chosen = ("--backend", "native", "--dtype", "int8", "--cache-dtype", "bfloat16", "--threads", "2")
    assert run("generate", "--prompt", "x", *chosen) == 0
    assert calls.options["decoder"] == DecoderOptions("native", "int8", "bfloat16", threads=2)
    assert run("generate", "--prompt", "x") == 0
    assert calls.options["decoder"] == DecoderOptions()


def test_pack(run, calls):
    assert run("pack", "runs/a", "--dtype", "int8", "--output", "there") == 0
    assert calls.options == {"model": "runs/a", "output": Path("there"), "dtype": "int8", "dry_run": False}


def test_generate_hands_on_what_drafts(run, calls):
    assert run("generate", "--prompt", "x", "--draft", "lookup") == 0
    assert calls.options["draft"] == "lookup"
    assert run("generate", "--prompt", "x") == 0
    assert calls.options["draft"] is None


def test_evaluate(run, calls, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("b.txt").write_text("text")
    assert (
        run("evaluate", "--model", "a", "--text", "b.txt", "--against", "c", "--against-dtype", "int8") == 0
    )
    assert calls.first is None
    assert calls.options["decoder"] == DecoderOptions()
    expected = {"model": "a", "text": "b.txt", "text_field": "text", "against": "c", "against_dtype": "int8"}
    assert calls.options.items() >= expected.items()
    options = [
        "--backend",
        "torch",
        "--dtype",
        "bfloat16",
        "--threads",
        "2",
        "--window",
        "9",
        "--tokens",
        "99",
    ]
    assert run("evaluate", "quickstart", "data.held_out_tokens=512", *options, "--json") == 0
    assert calls.first.recipe.data.held_out_tokens == 512
    assert calls.options["decoder"] == DecoderOptions("torch", "bfloat16", None, 2)
    assert (calls.options["window"], calls.options["tokens"], calls.options["json"]) == (9, 99, True)
    assert run("evaluate", "--window", "1") == 2
    assert "--window: expected a whole number of at least 2, got 1" in capsys.readouterr().err


def test_generate_names_a_wrong_option(run, calls, capsys):
    assert run("generate", "--prompt", "x", "--top-p", "2") == 2
    assert capsys.readouterr().err == "error: --top-p: expected a number above 0 and of at most 1, got 2.0\n"


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "terraformer-copy-lsh", "--prompt", "1", "model.attention.lsh.rounds=8"],
        ["generate", "quickstart", "--prompt", "x", "--model", "run", "generate.top_k=1", "train.bf16=false"],
        ["bench", "quickstart", "--model", "run", "model.dropout=0.1"],
        ["evaluate", "quickstart", "model.layers=3"],
        ["sparsify-convert", "quickstart-convert", "--model", "run", "train={max_steps: 1}"],
    ],
)
def test_overrides_that_would_change_nothing_are_refused(run, calls, capsys, words):
    """A trained model stays as it is, whatever the recipe's blocks say about training one."""
    assert run(*words) == 2
    shown = capsys.readouterr().err
    key = words[-1].partition("=")[0]
    assert shown.startswith(f"error: {key}: has no effect: {words[0]}")
    assert shown.count("\n") == 1
    assert calls.first is None


def test_generate_override_needs_a_recipe(run, calls, capsys):
    assert run("generate", "generate.top_k=3", "--prompt", "x") == 2
    assert "no recipe to change" in capsys.readouterr().err


def stdin_from(monkeypatch, path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", path.open())


def test_prompt_comes_from_one_place(run, calls, tmp_path, monkeypatch, capsys):
    piped, file = tmp_path / "piped", tmp_path / "prompt.txt"
    piped.write_text("piped\n\n")
    file.write_text("from file\r\n")
    stdin_from(monkeypatch, piped)
    assert run("generate", "quickstart") == 0
    assert calls.options["prompt"] == "piped\n"
    stdin_from(monkeypatch, piped)
    assert run("generate", "--prompt", "-") == 0
    assert calls.options["prompt"] == "piped\n"
    stdin_from(monkeypatch, piped)
    assert run("generate", "--prompt", "option\n") == 0
    assert calls.options["prompt"] == "option\n"
    assert run("generate", "--prompt-file", str(file)) == 0
    assert calls.options["prompt"] == "from file"
    file.write_bytes(b"\xef\xbb\xbfmarked\r\n")  # as some editors write
    assert run("generate", "--prompt-file", str(file)) == 0
    assert calls.options["prompt"] == "marked"
    assert run("generate", "--prompt-file", str(file), "--prompt", "x") == 2
    assert "--prompt, --prompt-file: cannot be combined; give one of them" in capsys.readouterr().err


def test_prompt_that_is_missing_or_no_text(run, calls, tmp_path, monkeypatch, capsys):
    stdin_from(monkeypatch, Path(os.devnull))
    assert run("generate", "bench-800m") == 2
    assert "--prompt: missing" in capsys.readouterr().err
    assert run("generate", "--prompt-file", str(tmp_path / "none")) == 1
    assert "No such file" in capsys.readouterr().err
    latin = tmp_path / "latin"
    latin.write_bytes(b"caf\xe9")
    assert run("generate", "--prompt-file", str(latin)) == 1
    assert capsys.readouterr().err == f"error: {latin}: byte 3 is not UTF-8 text\n"


# -- how it ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (console.Failure("no model"), 1, "error: no model\n"),
        (console.RecipeError("a\nb"), 2, "error: a\nerror: b\n"),
        (console.Regression("slower"), 3, "error: slower\n"),
        (console.Mismatch("differs"), 4, "error: differs\n"),
        (console.Stopped("stopped at step 3"), 75, "stopped at step 3\n"),
        (console.Stopped("stopped", exit_code=130), 130, "stopped\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/d/f"),
            1,
            "error: /d/f: No space left on device\n",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), 1, "error: Permission denied\n"),
        (
            OSError("1024 requested and 512 written"),
            1,
            "error: not all data could be written (disk full?)\n",
        ),
        (
            Exception("I/O error: No space left on device (os error 28)"),
            1,
            "error: No space left on device\n",
        ),
        (MemoryError(), 1, "error: not enough memory; use a smaller model, context or batch\n"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            1,
            "error: not enough memory; use a smaller model, context or batch\n",
        ),
        (
            ValueError("boom\nmore"),
            1,
            "error: unexpected ValueError: boom; `sparsecli --debug ...` shows the traceback\n",
        ),
    ],
)
def test_every_error_is_one_message_and_a_code(error, code, shown, run, calls, capsys):
    calls.error = error
    assert run("train", "quickstart") == code
    assert capsys.readouterr() == ("", shown)


def test_debug_shows_where(run, calls, capsys):
    calls.error = ValueError("boom")
    assert run("--debug", "train", "quickstart") == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "raise record.error" in shown
    assert run("train", "quickstart") == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["train"],
        ["train", "quickstart", "--nothing"],
        ["bench", "--threads", "0"],
        ["generate", "--threads", "0"],
        ["generate", "--threads", "10000"],
        ["generate", "--backend", "cuda"],
        ["pack", "--dtype", "int2"],
        ["bench", "--format", "xml"],
        ["recipes", "show"],
    ],
)
def test_usage_errors(arguments, run, calls, capsys):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["bench", "--fail-above", "5%"], 2, "--fail-above needs --against FILE, an earlier result in JSON"),
        (
            ["bench", "--plot", "x.bmp"],
            2,
            "--plot: expected a file that ends with one of .png, .svg, .pdf, got x.bmp",
        ),
        (["bench", "--output", "no/x.json"], 1, "no/x.json: the folder no does not exist"),
        (["bench", "--against", "x.json"], 1, "--against: x.json is not there; expected a file"),
        (["bench", "--from", "x.json"], 1, "--from: x.json is not there; expected a file"),
        (
            ["export", "m", "--format", "gguf", "--output", "x"],
            2,
            "--output: expected the name of a file that ends with .gguf, got x",
        ),
        (
            ["push", "m", "smol"],
            2,
            "NAME: expected USER/NAME of letters, digits, '-', '_' and '.', got 'smol'",
        ),
        (["generate", "--model", "x.gguf", "--prompt", "x"], 1, "x.gguf: no such file or folder"),
        (
            ["generate", "--model", "smolm2.gguf", "--prompt", "x"],
            1,
            "smolm2.gguf: no such file or folder; did you mean smollm2.gguf?",
        ),
        (
            ["pack", "runs/quickstart-dense"],
            1,
            "runs/quickstart-dense: no such file or folder; sparsecli train quickstart-dense makes it",
        ),
        (
            ["sparsify-convert", "quickstart-convert", "--model", "runs/quickstart-convert/model"],
            1,
            "runs/quickstart-convert/model: no such file or folder; "
            "sparsecli sparsify-convert quickstart-convert makes it",
        ),
        (
            ["train", "quickstart", "train.init_from=nowhere"],
            1,
            "train.init_from: nowhere: no such file or folder; train.init_from=null starts from random weights",
        ),
        (
            ["train", "quickstart", "train.distillation={teacher: nowhere}"],
            1,
            "train.distillation.teacher: nowhere: no such file or folder",
        ),
        (
            ["train", "quickstart", "data.source=files", "data.paths=[none.txt]"],
            1,
            "data.paths: no file matches none.txt (looked from {cwd})",
        ),
        (
            ["train", "quickstart", "data.tokenizer={kind: saved, path: nowhere}"],
            1,
            "data.tokenizer.path: nowhere is not a folder",
        ),
        (
            [
                "sparsify-convert",
                "quickstart-convert",
                "--model",
                ".",
                "data={source: files, paths: [no.txt]}",
            ],
            1,
            "data.paths: no file matches no.txt (looked from {cwd})",
        ),
    ],
)
def test_what_needs_no_heavy_import_is_refused_first(arguments, code, line, tmp_path):
    (tmp_path / "smollm2.gguf").touch()
    heavy = (
        "import sys; from sparsecli.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    )
    ended = subprocess.run(
        [sys.executable, "-c", heavy, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert (ended.stderr, ended.returncode) == (f"error: {line.format(cwd=tmp_path)}\n", code)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["generate", "--threads", "0"], "--threads: expected a whole number of at least 1, got 0"),
        (["generate", "--threads", "x"], "--threads: expected a whole number, got 'x'"),
        (["bench", "--threads", "0"], "--threads: expected whole numbers above 0 such as 1,2, got '0'"),
        (["bench", "--fail-above", "x"], "--fail-above: expected a share such as 5% or 0.05, got 'x'"),
        (
            ["train", "quickstart", "--stop-after", "30"],
            "--stop-after: expected a time such as 90s, 30m or 2h, got '30'",
        ),
        (
            ["train", "quickstart", "--stop-after", "-1s"],
            "--stop-after: expected a time such as 90s, 30m or 2h, got '-1s'",
        ),
        (
            ["train", "quickstart", "--stop-after", "nanh"],
            "--stop-after: expected a time such as 90s, 30m or 2h, got 'nanh'",
        ),
        (["generate", "--threads", "257"], "--threads: expected a whole number of at most 256, got 257"),
        (["generate", "--top-p", "x"], "--top-p: expected a number, got 'x'"),
        (["pack", "--dtype", "x"], "--dtype: expected one of float32, bfloat16, int8, int4, got 'x'"),
        (["train"], "RECIPE: missing; see sparsecli train --help"),
        (["import", "x"], "--output: missing; see sparsecli import --help"),
        (["export", "a", "b", "--output", "c"], "b: unexpected argument; see sparsecli export --help"),
        (["learn"], "learn: no such command; see sparsecli --help"),
        (["train", "--nothing"], "--nothing: no such option; see sparsecli train --help"),
        (
            ["train", "--outptu", "x"],
            "--outptu: no such option, did you mean --output?; see sparsecli train --help",
        ),
        (["bench", "--rounds", "0"], "--rounds: bench.rounds: expected a whole number above 0, got 0"),
        (
            ["bench", "--backend", "cuda"],
            "--backend: bench.backends[0]: expected one of native, torch, got 'cuda'",
        ),
        (
            ["bench", "--dtype", "int8", "--dtype", "int2"],
            "--dtype: bench.dtypes[1]: expected one of float32, bfloat16, int8, int4, got 'int2', did you mean int8?",
        ),
        (
            ["bench", "--peer", "gpt"],
            "--peer: bench.peers[0]: expected one of llama.cpp, openvino, ctranslate2, torch.compile, got 'gpt'",
        ),
        (["generate", "--top-k"], "--top-k: expected a value"),
        (["train", "quickstart", "--resume", "yes"], "--resume: expected one of auto, got 'yes'"),
    ],
)
def test_the_command_line_is_refused_in_one_style(arguments, line, run, calls, capsys):
    assert run(*arguments) == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")


def test_without_arguments_the_help_is_shown(run, capsys):
    assert run() == 2
    assert "Usage: sparsecli" in capsys.readouterr().err


def test_generate_looks_for_the_model_once(run, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "model" / "config.json").write_text("{}")
    assert run("generate", "--prompt", "x") == 0
    assert calls.first == Path("runs/a/model")


def test_recipe_errors_come_from_real_files(tmp_path):
    (tmp_path / "r.yaml").write_text("seed: x\nmodle: 3\n")
    ended = subprocess.run([*PROGRAM, "train", "r.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [
        "error: r.yaml:1:1: seed: expected a whole number of at least 0, got 'x'",
        "error: r.yaml:2:1: modle: unknown key, did you mean model?",
    ]
    assert os.listdir(tmp_path) == ["r.yaml"]


def test_a_reader_that_leaves_is_no_error():
    # The reader is gone before the program writes.
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run([*PROGRAM, "recipes", "schema"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert ended.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*PROGRAM, "recipes", "schema"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (ended.returncode, ended.stderr) == (1, "error: No space left on device\n")


# -- small commands ------------------------------------------------------------------------------------------


def test_version(run, capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"sparsecli {sparsecli.__version__}\n"


def test_help_names_every_command_and_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['sparsecli', '--help']; from sparsecli import cli\n"
        "try: cli.main()\n"
        "finally: print('loaded:', sorted({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    for command in (*IMPLEMENTATIONS, "recipes"):
        assert f"\n  {command} " in shown
    assert "loaded: []" in shown
    assert "..." not in shown.partition("Commands:")[2], "a summary is cut short"


def test_loading_a_recipe_needs_no_torch():
    code = (
        "import sys; from sparsecli.recipe.loader import load; load('quickstart')\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recipes(run, capsys, tmp_path):
    assert run("recipes", "ls") == 0
    assert "quickstart-convert" in capsys.readouterr().out
    assert run("recipes", "ls", "--json") == 0
    assert [each["recipe"] for each in json.loads(capsys.readouterr().out)] == list(shipped())
    assert run("recipes", "show", "quickstart") == 0
    assert capsys.readouterr().out == shipped()["quickstart"].read_text()
    target = tmp_path / "mine.yaml"
    assert run("recipes", "cp", "quickstart", str(target)) == 0
    assert run("recipes", "cp", "quickstart", str(target)) == 1
    taken = f"error: {target}: already exists; choose another DESTINATION\n"
    assert capsys.readouterr().err == f"wrote {target}\n{taken}"
    for place, reason in (
        (tmp_path / "none" / "x.yaml", f"the folder {tmp_path / 'none'} does not exist"),
        (target / "x.yaml", f"cannot be written: {target} is a file, not a folder"),
    ):
        assert run("recipes", "cp", "quickstart", str(place)) == 1
        assert capsys.readouterr().err == f"error: {place}: {reason}\n"
    assert run("recipes", "check", str(target)) == 0
    assert "4,497,792" in capsys.readouterr().out
    assert run("recipes", "schema") == 0
    assert '"properties"' in capsys.readouterr().out


def test_completion_offers_shipped_recipes():
    assert sorted(shipped_names("bench-8")) == ["bench-800m", "bench-800m-sparsity"]


def test_every_command_is_documented():
    groups = cli.app.registered_groups
    commands = [command for group in groups for command in group.typer_instance.registered_commands]
    assert all(inspect.getdoc(command.callback) for command in commands)
