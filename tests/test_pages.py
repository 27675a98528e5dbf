"""Everything a newcomer types works: each command and each snippet of README and docs.

The commands run in the order in which they stand in the text.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from foreign_models import LLAMA, build, save
from shipped_runs import SHORT_BENCH, SHORT_CONVERT, foreign, imported, run, shortened, trained
from test_interchange import write_gguf

from sparsecli.decode.native import binding
from sparsecli.recipe.loader import load, shipped

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for kind, block in fenced if kind == language]


def commands() -> list[object]:
    lines = [(page, line) for page in PAGES for block in blocks(page, "") for line in block.splitlines()]
    found = [(page, line) for page, line in lines if re.match(r"(sparsecli |echo .*\| *sparsecli )", line)]
    assert len(found) >= 20
    first: dict[str, tuple[Path, str]] = {}
    for page, line in found:
        first.setdefault(line.split("#")[0].strip(), (page, line))
    return [pytest.param(line, id=f"{page.stem}: {command}") for command, (page, line) in first.items()]


@pytest.mark.usefixtures("quick_probe")
@pytest.mark.parametrize("line", commands())
def test_commands_of_the_pages(place: Path, line: str) -> None:
    """The command as it is written, shortened where it would take minutes.

    A shipped recipe that is not changed is only planned here; it is run in test_shipped.py.
    """
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
    if "smollm2" in words and words[0] != "import":
        imported("smollm2")
    if as_shipped(words):
        words.append("--dry-run")
    if words[0] == "train":
        if "train.init_from=runs/full" in words and not Path("runs/full").exists():
            run("train", *shortened("quickstart"), "model.attention={}", "--output", "runs/full")
        words = words if "--resume" in words else [*shorten_training(words), "--output", fresh("trained")]
    elif words[0] == "sparsify-convert":
        trained("quickstart-dense")  # stands in for models that would have to be fetched
        words += ["--model", "runs/quickstart-dense", *SHORT_CONVERT, "--output", fresh("converted")]
    elif words[0] == "import":
        words[1] = foreign()
        words[words.index("--output") + 1] = fresh("imported")
    elif words[0] == "export":
        imported(words[1])
        place = words.index("--output") + 1
        words[place] = fresh("exported") + Path(words[place]).suffix
    elif words[0] == "generate":
        if {"small", "lookup"} & {*words} and (reason := binding.available()):
            pytest.skip(f"packed models and drafts need the native engine: {reason}")
        if "--input" in words:
            Path(words[words.index("--input") + 1]).write_text("def add(a, b):\n    return a + b\n")
        if "--chat" in words:
            Path("smollm2", "chat_template.jinja").write_text("{{ messages[-1].content }}")
            stdin = "def\n"
        trained("quickstart")
        named = [word for word in words[1:2] if word in shipped()]
        for name in [*named, *(Path(word).name for word in words if word.startswith("runs/"))]:
            trained(name)
        words += ["--max-new-tokens", "2"]
    elif words[0] == "serve":
        if reason := binding.available():
            pytest.skip(f"serve needs the native engine: {reason}")
        for word in words:
            if word.startswith("runs/"):
                trained(Path(word).name)
        serves([*words, "--port", "0"])
        return
    elif words[0] == "evaluate":
        for word in words[1:]:
            if word in shipped() or word.startswith("runs/"):
                trained(Path(word).name)
        if "--text" in words:
            Path(words[words.index("--text") + 1]).write_text("def add(a, b):\n    return a + b\n" * 99)
        if not any("vision" in word for word in words):
            words += ["--tokens", "512"]
    elif "--from" in words:
        if not Path("before.json").exists():
            run("bench", *SHORT_BENCH, "--output", "before.json")
    elif words[0] == "bench":
        for file in (word for word in words if word.endswith(".gguf")):
            if reason := binding.available():
                pytest.skip(f"codes of a GGUF file need the native engine: {reason}")
            pytest.importorskip("gguf")
            small = build("llama", **LLAMA | {"intermediate_size": 64, "max_position_embeddings": 512})
            write_gguf(small, save(small, Path(fresh("theirs"))), Path(file), quantized="Q4_0")
        if any("vision" in word for word in words):
            words += [] if "--dry-run" in words else ["--rounds", "1", "--tokens", "1"]
        elif "--model" in words:
            words += ["--rounds", "1", "--tokens", "1", "--context", "4"]
        elif "--dry-run" not in words:
            words += SHORT_BENCH
            if "--context" in words:
                words[words.index("--context") + 1] = "4,8"
            if "--fail-above" in words:  # one token a row shows no regression; just compare
                at = words.index("--fail-above")
                words = words[:at] + words[at + 2 :]
    run(*words, stdin=stdin)


def serves(words: list[str]) -> None:
    """The command answers, and ends with a signal."""
    process = subprocess.Popen([sys.executable, "-m", "sparsecli", *words], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    line = process.stderr.readline()
    found = re.search(r"serving \S+ at (\S+) ", line)
    assert found, line + process.stderr.read()
    body = {"prompt": "def", "max_tokens": 2}
    answer = httpx.post(f"{found[1]}/v1/completions", json=body, timeout=60).json()
    process.terminate()
    assert answer["usage"]["completion_tokens"] <= 2
    assert process.wait(60) == 0


def as_shipped(words: list[str]) -> bool:
    """A shipped recipe and nothing else, or to convert a model that ours stands in for."""
    if words[0] == "sparsify-convert" and words[2::2] == ["--model"]:
        words = words[:2]
    return len(words) == 2 and words[0] != "evaluate" and words[1] in shipped()


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
    if "sparsecli.decode" in code and (reason := binding.available()):
        pytest.skip(reason)
    for name in ["quickstart", *re.findall(r"runs/([\w-]+)", code)]:
        trained(name)
    exec(compile(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", foreign()), "snippet", "exec"), {})
