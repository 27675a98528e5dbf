"""Everything a newcomer types works: each shipped recipe, each command and each snippet of README and docs.

Recipes run at their real sizes on a small part of the standard library, for a few steps; benchmarks build one block.
The commands run in the order in which they stand in the text.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecli import cli
from sparsecli.data import corpus
from sparsecli.decode import native
from sparsecli.recipe.loader import load, shipped

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT_TRAIN = [
    "train.max_steps=2",
    "train.warmup_steps=0",
    "train.eval_steps=2",
    "train.save_steps=2",
]
SMALL_TERRAFORMER = [
    *("model.d_model=32", "model.layers=2", "model.heads=4", "model.attention.modules=4"),
    *("model.feed_forward.d_ff=128", "model.feed_forward.rank=4", "model.encoder.layers=2"),
    *("model.max_positions=64", "model.encoder.max_positions=96", "model.vocabulary.size=4096"),
]
LARGE = {
    "terraformer-c4": [
        *SMALL_TERRAFORMER,
        "data={source: stdlib, tokenizer: {kind: bpe, vocabulary_size: 4096}}",
        "data.pairs={kind: corrupted, source_length: 96, target_length: 64}",
    ],
    "terraformer-arxiv": [
        *SMALL_TERRAFORMER,
        *("train.init_from=null", "train.eval_samples=2", "train.gradient_accumulation_steps=1"),
        "model.attention.lsh.chunk_length=16",
        "model.attention.lsh.buckets=8",
        "data={source: files, paths: [rows.jsonl], tokenizer: {kind: bpe, vocabulary_size: 4096}}",
        "data.pairs={kind: fields, input: article, target: abstract, source_length: 96, target_length: 32}",
        "data.held_out_fraction=0.5",
    ],
    "reformer-enwik8": [
        *("model.d_model=32", "model.layers=2", "model.heads=4", "model.max_positions=256"),
        "model.axial={shape: [16, 16], widths: [8, 24]}",
        *("model.feed_forward.d_ff=64", "model.attention.lsh.chunk_length=32"),
        *("data.paths=[enwik8]", "data.sequence_length=256", "train.gradient_accumulation_steps=1"),
    ],
}
"""Recipes for machines and texts that a test does not have: the same at small sizes on the text at hand."""
SHORT_CONVERT = [
    "convert.calibration_tokens=512",
    "convert.tuning_tokens=256",
    "convert.controller_steps=2",
    "convert.distillation.tokens=256",
    "convert.distillation.batch_size=1",
    "data.held_out_tokens=512",
]
SHORT_BENCH = [
    "bench.measured_layers=1",
    "bench.rounds=1",
    "bench.tokens_per_round=1",
    "bench.warmup_tokens=0",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    """A working directory, and a standard library of a few packages."""
    folder = tmp_path_factory.mktemp("newcomer")
    library = tmp_path_factory.mktemp("library")
    for package in ("asyncio", "email", "json", "logging", "unittest"):
        source = Path(corpus.sysconfig.get_path("stdlib")) / package
        (library / package).mkdir()
        for path in source.glob("*.py"):
            (library / package / path.name).write_bytes(path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SPARSECLI_CACHE", str(folder / "cache"))
        patch.setattr(corpus, "sysconfig", SimpleNamespace(get_path=lambda name: str(library)))
        yield folder


def run(*arguments: str, stdin: str | None = None) -> None:
    """The program, in this process; it must end well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sparsecli", *arguments])
        if stdin is not None:
            read, write = os.pipe()
            with os.fdopen(write, "w") as pipe:
                pipe.write(stdin)
            patch.setattr(sys, "stdin", os.fdopen(read))
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code, arguments


def trained(name: str) -> str:
    """The run directory of a shipped recipe, trained or converted for a moment on first use."""
    output = f"runs/{name}"
    if not Path(output, "model").exists():
        if load(name).recipe.convert:
            trained("quickstart-dense")
            run("sparsify-convert", name, "--model", "runs/quickstart-dense", *SHORT_CONVERT)
        else:
            run("train", *shortened(name))
    return output


def foreign() -> str:
    """A small Llama as transformers writes it; stands in for checkpoints that would have to be fetched."""
    folder = Path("theirs")
    if not folder.exists():
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=4096, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder)
        for path in Path(trained("quickstart"), "model").glob("tokenizer*"):
            (folder / path.name).write_bytes(path.read_bytes())
    return str(folder)


def imported(name: str) -> None:
    """A model folder of that name, imported on first use."""
    if not Path(name).exists():
        run("import", foreign(), "--output", name)


def shortened(name: str) -> list[str]:
    """The shipped recipe for a moment; where it starts from another model, from ours and on the text at hand."""
    recipe, overrides = load(name).recipe, []
    assert recipe.train
    if name in LARGE:
        write_texts()
        overrides = LARGE[name]
    elif recipe.train.init_from:
        overrides = [
            f"train.init_from={trained('quickstart-convert')}",
            "train.gradient_accumulation_steps=1",
        ]
        overrides += [f"train.distillation.teacher={trained('quickstart-dense')}"]
        overrides += ["data={source: stdlib, sequence_length: 64}"]
    short = [*SHORT_TRAIN, "train.eval_samples=4"]
    if recipe.data and recipe.data.source == "copy":
        short = [*short, "data.held_out=8"]
    else:
        short = [*short, "data.held_out_tokens=512"]
    return [name, *overrides, *short]


def write_texts() -> None:
    """What recipes of texts that have to be fetched read in their place."""
    words = " ".join(f"word {number % 40}" for number in range(2000))
    Path("enwik8").write_text(words)
    rows = [{"article": f"{n} {words[n * 100 :][:600]}", "abstract": f"about {n}"} for n in range(40)]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.mark.parametrize("name", [name for name in shipped() if load(name).recipe.train])
def test_training_recipes(place: Path, name: str) -> None:
    assert Path(trained(name), "loss.png").stat().st_size > 5000


@pytest.mark.parametrize("name", [name for name in shipped() if load(name).recipe.convert])
def test_converting_recipes(place: Path, name: str) -> None:
    assert "| fitted |" in Path(trained(name), "report.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if "17b" in name else name
        for name in shipped()
        if load(name).recipe.bench
    ],
)
def test_benchmark_recipes(place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("bench", name, *SHORT_BENCH)
    table = capsys.readouterr().out
    for variant in load(name).recipe.bench.variants:
        assert variant.name in table


# -- what the pages say --------------------------------------------------------------------------------------


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[object]:
    lines = [(page, line) for page in PAGES for block in blocks(page, "") for line in block.splitlines()]
    found = [(page, line) for page, line in lines if re.match(r"(sparsecli |echo .*\| *sparsecli )", line)]
    assert len(found) >= 20
    return [pytest.param(line, id=f"{page.stem}: {line.split('#')[0].strip()}") for page, line in found]


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_pages(place: Path, line: str) -> None:
    """The command as it is written, shortened where it would take minutes."""
    before, _, command = line.rpartition("| sparsecli ") if "| sparsecli " in line else ("", "", line[10:])
    stdin = " ".join(shlex.split(before)[1:]) + "\n" if before else None
    words = shlex.split(command, comments=True)
    if ">" in words:
        words = words[: words.index(">")]
    if words[0] == "recipes" and words[1] == "cp" and Path(words[3]).exists():
        Path(words[3]).unlink()
    for word in words:
        if word == "my.yaml" and not Path(word).exists() and words[:2] != ["recipes", "cp"]:
            Path(word).write_text(load("quickstart").path.read_text())
        if word.startswith("runs/") and "model" not in words[1] and words[0] != "train":
            trained(Path(word).name)
    if words[0] == "train":
        words = words if "--resume" in words else [*shorten_training(words), "--output", fresh("trained")]
    elif words[0] == "sparsify-convert":
        trained("quickstart-dense")  # stands in for models that would have to be fetched
        words += ["--model", "runs/quickstart-dense", *SHORT_CONVERT, "--output", fresh("converted")]
    elif words[0] == "import":
        words[1] = foreign()
        words[words.index("--output") + 1] = fresh("imported")
    elif words[0] == "export":
        imported(words[1])
        words[words.index("--output") + 1] = fresh("exported")
    elif words[0] == "generate":
        if "smollm2" in words:
            imported("smollm2")
        if "small" in words and (reason := native.available()):
            pytest.skip(f"packed models need the native engine: {reason}")
        if "--input" in words:
            Path(words[words.index("--input") + 1]).write_text("def add(a, b):\n    return a + b\n")
        trained("quickstart")
        for name in [Path(word).name for word in words if word.startswith("runs/")]:
            trained(name)
        words += ["--max-new-tokens", "2"]
    elif words[0] == "bench":
        if "--model" in words:
            words += ["--rounds", "1", "--tokens", "1", "--context", "4"]
        elif {"bench-17b", "paper-17b"} & set(words):
            words.append("--dry-run")
        else:
            words += SHORT_BENCH
            if "--fail-above" in words:  # one token a row shows no regression; just compare
                at = words.index("--fail-above")
                words = words[:at] + words[at + 2 :]
    run(*words, stdin=stdin)


def shorten_training(words: list[str]) -> list[str]:
    """A command of the pages with the shipped recipe that it names, or a copy of one, shortened."""
    name, *others = words[1:]
    _, *changes = shortened(name if name in shipped() else "quickstart")
    return ["train", name, *others, *changes]


def fresh(name: str) -> str:
    number = len(list(Path().glob(f"{name}-*")))
    return f"{name}-{number}"


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, id=f"{page.stem}: {code.splitlines()[0]}")
        for page in PAGES
        for code in blocks(page, "python")
    ],
)
def test_snippets_of_the_pages(place: Path, code: str) -> None:
    if "sparsecli.decode" in code and (reason := native.available()):
        pytest.skip(reason)
    for name in ["quickstart", *re.findall(r"runs/([\w-]+)", code)]:
        trained(name)
    exec(compile(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", foreign()), "snippet", "exec"), {})
