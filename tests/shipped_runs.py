"""What a newcomer has: a working directory, a small standard library, and runs of the shipped recipes in it.

Recipes run at their real sizes on a small part of the standard library, for a few steps.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecli import cli
from sparsecli.data import corpus
from sparsecli.recipe.data import ImagesSpec
from sparsecli.recipe.loader import load
from sparsecli.spec.vision import VisionSpec

SHORT_TRAIN = [
    "train.max_steps=2",
    "train.per_device_train_batch_size=4",
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
    "vision-mnist": ["model.image_size=8", "data={source: digits}"],
}
"""Recipes for machines and texts that a test does not have: the same at small sizes on the text at hand."""
SHORT_STUDY = [
    *("model.d_model=32", "model.layers=1", "study.equal_parameters=null", "study.seeds=[0]"),
    *(
        "study.learning_rates=[1e-3]",
        "study.tuning_tokens=512",
        "data.sequence_length=64",
    ),  # the last two are for text
]
SHORT_CONVERT = [
    "convert.calibration_tokens=512",
    "convert.tuning_tokens=256",
    "convert.controller_steps=2",
    "convert.distillation.tokens=256",
    "convert.distillation.batch_size=1",
    "convert.distillation.learning_rate=1e-4",  # without trials
    "data.held_out_tokens=512",
]
SHORT_BENCH = [
    "bench.measured_layers=1",
    "bench.context=1",
    "bench.rounds=1",
    "bench.tokens_per_round=1",
    "bench.warmup_tokens=0",
]


def short_bench(name: str) -> list[str]:
    """Changes of a shipped recipe for a moment's measurement. Images follow no context."""
    if isinstance(load(name).recipe.model, VisionSpec):
        return [*(change for change in SHORT_BENCH if "context" not in change), "bench.batch=1"]
    return SHORT_BENCH


def settle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An empty working directory, and a standard library of a few packages."""
    folder, library = tmp_path_factory.mktemp("newcomer"), tmp_path_factory.mktemp("library")
    for package in ("asyncio", "email", "json", "logging", "unittest"):
        source = Path(corpus.sysconfig.get_path("stdlib")) / package
        (library / package).mkdir()
        for path in source.glob("*.py"):
            (library / package / path.name).write_bytes(path.read_bytes())
    return folder, library


def move_in(folder: Path, library: Path, patch: pytest.MonkeyPatch) -> None:
    """Work in `folder`, with that library, until `patch` is undone."""
    patch.chdir(folder)
    patch.setattr("sparsecli.convert.run.ROUNDS", 1)
    patch.setenv("SPARSECLI_CACHE", str(folder / "cache"))
    patch.setattr(corpus, "sysconfig", SimpleNamespace(get_path=lambda name: str(library)))


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
    images = isinstance(recipe.data, ImagesSpec)
    if recipe.study:
        overrides = [*(SHORT_STUDY[:5] if images else SHORT_STUDY), *short_bench(name)]
        if name == "study-frontier":  # its predictors read 128 inputs
            overrides.append("model.d_model=160")
    elif name in LARGE:
        write_texts()
        overrides = LARGE[name]
    elif recipe.train.distillation:
        overrides = [
            f"train.init_from={trained('quickstart-convert')}",
            "train.gradient_accumulation_steps=1",
        ]
        overrides += [f"train.distillation.teacher={trained('quickstart-dense')}"]
        overrides += ["data={source: stdlib, sequence_length: 64}"]
    elif recipe.train.init_from:
        trained(Path(recipe.train.init_from).name)
    short = [*SHORT_TRAIN, "train.eval_samples=4"]
    if recipe.data and recipe.data.source == "stdlib" and recipe.data.packages:
        short = [*short, "data.packages=null"]
    if recipe.data and recipe.data.source == "copy":
        short = [*short, "data.held_out=8"]
    else:
        short = [*short, "data.held_out_images=32" if images else "data.held_out_tokens=512"]
    return [name, *overrides, *short]


def write_texts() -> None:
    """What recipes of texts that have to be fetched read in their place."""
    words = " ".join(f"word {number % 40}" for number in range(2000))
    Path("enwik8").write_text(words)
    rows = [{"article": f"{n} {words[n * 100 :][:600]}", "abstract": f"about {n}"} for n in range(40)]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
