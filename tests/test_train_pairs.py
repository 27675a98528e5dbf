"""Training models with an encoder: on pairs of every kind, stopped and resumed, and what `generate` makes of them."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_runs import assert_same_run, at_step, send
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import sparsecli
from sparsecli import cli
from sparsecli.console import Failure, RecipeError, Stopped
from sparsecli.recipe.loader import LoadedRecipe, load, parse
from sparsecli.train import command
from sparsecli.train.command import run
from sparsecli.train.trainer import LanguageModelTrainer

MODEL = {
    "d_model": 16,
    "layers": 2,
    "heads": 2,
    "max_positions": 24,
    "feed_forward": {"kind": "sparse", "d_ff": 32, "block_size": 4, "rank": 4, "hard_fraction": 0.5},
    "vocabulary": {"kind": "dense", "size": 320, "tied": True},
    "encoder": {"layers": 1, "max_positions": 40},
    "dropout": 0.1,
}
TERRAFORMER = {
    **MODEL,
    "residual": "reversible",
    "attention_layers": 2,
    "sru": {"width": 4},
    "attention": {"projection": "multiplicative_conv"},
    "encoder": {"layers": 1, "max_positions": 40, "read_by": {"kind": "prefix"}},
}
HASHED = {
    **TERRAFORMER,
    "attention": {"kind": "lsh", "share_query_key": True, "lsh": {"rounds": 2, "chunk_length": 8}},
}
MODELS = {"encoder-decoder": MODEL, "Terraformer": TERRAFORMER, "hashed Terraformer": HASHED}
DOCSTRINGS = {"kind": "docstrings", "source_length": 40, "target_length": 16}
TRAIN = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "eval_steps": 3,
    "save_steps": 3,
    "eval_samples": 5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python files with a function each."""
    place = tmp_path_factory.mktemp("pairs")
    for number in range(30):
        (place / f"{number}.py").write_text(
            f'def add_{number}(value):\n    """Return the value plus {number}."""\n'
            f"    return value + {' + '.join('1' * number) or 0}\n"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSECLI_CACHE", str(place / "cache"))
        yield place


def recipe(folder: Path, name: str, **changes: dict) -> LoadedRecipe:
    """The recipe of a small model on docstrings, with fields of its blocks changed."""
    blocks = {
        "model": MODEL,
        "data": {
            "source": "files",
            "paths": [f"{folder}/*.py"],
            "held_out_fraction": 0.3,
            "pairs": DOCSTRINGS,
            "tokenizer": {"kind": "bpe", "vocabulary_size": 300},
        },
        "train": TRAIN,
    }
    for block, fields in changes.items():
        blocks[block] = fields if "source" in fields else {**blocks[block], **fields}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(blocks))
    return load(str(path))


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> dict:
    """The block of a recipe."""
    return MODELS[request.param]


@pytest.fixture(scope="module")
def finished(folder: Path, model: dict) -> Path:
    """A run on docstrings that nothing interrupted."""
    output = Path(mkdtemp(dir=folder)) / "run"  # the order of tests may ask for the same model again
    assert run(recipe(folder, "docstrings", model=model), output=output)
    return output


# -- training ------------------------------------------------------------------------------------------------


def test_docstrings_end_with_rouge_and_samples(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(recipe(folder, "shown"), output=tmp_path / "run")
    assert result.rouge.keys() == result.lead_rouge.keys() == {"rouge_1", "rouge_2", "rouge_lsum"}
    assert result.exact_match is None
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "held_out_loss" in row]
    assert [row["step"] for row in evaluations] == [3, 6]
    assert all(0 <= row["rouge_1"] <= 100 for row in evaluations)
    assert evaluations[-1]["rouge_lsum"] == result.rouge["rouge_lsum"]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert 1 <= len(samples) <= 5
    assert all(re.fullmatch(r"Return the value plus \d+\.", sample["target"]) for sample in samples)
    printed = capsys.readouterr().out
    assert "ROUGE-1, 2, Lsum" in printed
    assert "ROUGE of the lead" in printed
    assert samples[0]["target"] in printed
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert command.Result(**facts["result"]) == result


@pytest.mark.parametrize(
    ("kind", "data", "figure"),
    [
        ("copy", {"source": "copy", "symbols": 50, "length": 7, "held_out": 10}, "exact_match"),
        (
            "corrupted",
            {
                "source": "files",
                "pairs": {"kind": "corrupted", "source_length": 24, "target_length": 24},
                "held_out_fraction": 0.3,
                "tokenizer": {"kind": "bpe", "vocabulary_size": 310},
            },
            None,
        ),
    ],
)
def test_other_pairs(folder: Path, tmp_path: Path, kind: str, data: dict, figure: str | None) -> None:
    if kind == "corrupted":
        data = {**data, "paths": [f"{folder}/*.py"]}
    result = run(recipe(folder, kind, data=data), output=tmp_path / "run")
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"exact_match", "rouge_1"} & row.keys() == ({figure} if figure else set())
    assert result.exact_match == row.get("exact_match")
    assert (tmp_path / "run" / "samples.jsonl").exists() == (figure is not None)


def test_samples_may_hold_what_ends_a_line_elsewhere(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(20):
        (tmp_path / f"{number}.py").write_text(
            f'def one_{number}():\n    """Return the number one."""\n    return "\u2028 \u2029 \x85" + {number}\n'
        )
    loaded = recipe(folder, "lines", data={"paths": [f"{tmp_path}/*.py"]}, train={"max_steps": 1})
    assert run(loaded, output=tmp_path / "run")
    assert "\u2028" in (tmp_path / "run" / "samples.jsonl").read_text()
    assert "Return the number one." in capsys.readouterr().out


def test_all_target_tokens_of_a_step_count_alike(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"input": f"row {number}", "target": f"{number}" * (1 + number % 9)} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    means, tokens, shares = [], [], []
    step = LanguageModelTrainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        with torch.no_grad():
            means.append(model(**inputs).loss.item())
        tokens.append((inputs["labels"] != -100).sum().item())
        share = step(self, model, inputs, *args)
        shares.append(share.item())
        return share

    monkeypatch.setattr(LanguageModelTrainer, "training_step", training_step)
    loaded = recipe(
        folder,
        "weighed",
        model={"dropout": 0.0, "feed_forward": {"kind": "dense", "d_ff": 32}},
        data={"paths": [str(tmp_path / "rows.jsonl")], "pairs": {"kind": "fields", "source_length": 40,
                                                                 "target_length": 16}},
        train={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2,
               "eval_samples": 0},
    )  # fmt: skip
    run(loaded, output=tmp_path / "run")
    assert len(shares) == 8
    for of_step in (slice(4), slice(4, 8)):
        expected = np.average(means[of_step], weights=tokens[of_step])
        assert sum(shares[of_step]) == pytest.approx(expected, rel=1e-5)
        assert abs(expected - np.mean(means[of_step])) > 1e-4


def test_a_run_without_samples_writes_none(folder: Path, tmp_path: Path) -> None:
    result = run(recipe(folder, "silent", train={"eval_samples": 0}), output=tmp_path / "run")
    assert result.rouge is result.lead_rouge is None
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_a_stopped_run_goes_on_bit_for_bit(
    folder: Path, model: dict, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within an epoch, whose batches of similar lengths must be the same ones again."""
    loaded, output = recipe(folder, "docstrings", model=model), tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 2, send(signal.SIGTERM))
        with pytest.raises(Stopped, match="stopped at step 2 of 6"):
            run(loaded, output=output)
    run(loaded, output=output, resume="auto")
    assert_same_run(output, finished)


@pytest.mark.parametrize("model", ["Terraformer"], indirect=True)
def test_the_penalty_of_what_is_written_belongs_to_the_run(
    folder: Path, finished: Path, model: dict, tmp_path: Path
) -> None:
    loaded = recipe(folder, "run", model=model)
    generate = loaded.recipe.generate.model_copy(update={"repetition_penalty": 1.5})
    changed = LoadedRecipe(loaded.recipe.model_copy(update={"generate": generate}), "run", loaded.path)
    assert run(changed, output=tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert saved["repetition_penalty"] == 1.5
    with pytest.raises(Failure, match=r"generate\.repetition_penalty \(1\.0 then, 1\.5 now\)"):
        run(changed, output=finished, resume="auto")


@pytest.mark.parametrize("model", ["Terraformer"], indirect=True)
def test_a_run_starts_from_another_and_brings_its_tokenizer(
    folder: Path, finished: Path, tmp_path: Path
) -> None:
    loaded = recipe(folder, "further", train={"init_from": str(finished), "max_steps": 1})
    data = loaded.recipe.data.model_copy(update={"tokenizer": None})
    loaded = LoadedRecipe(
        loaded.recipe.model_copy(update={"data": data, "model": None}), "further", loaded.path
    )
    assert run(loaded, output=tmp_path / "run")
    tokenizers = [AutoTokenizer.from_pretrained(place / "model") for place in (finished, tmp_path / "run")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


@pytest.mark.parametrize("model", ["Terraformer"], indirect=True)
def test_an_encoder_goes_on_with_hashing(folder: Path, finished: Path, model: dict, tmp_path: Path) -> None:
    """Which tokens an encoder looks at is no matter of weights; that queries are keys is one."""
    hashed, start = (
        {"kind": "lsh", "lsh": {"chunk_length": 8, "chunks_after": 1}},
        {"init_from": str(finished)},
    )
    changed = {**model, "encoder": {**model["encoder"], "attention": hashed}}
    assert run(recipe(folder, "hashed", model=changed, train=start), output=tmp_path / "run")
    shared = {**changed, "encoder": {**model["encoder"], "attention": {**hashed, "share_query_key": True}}}
    message = (
        r"init_from .*: model\.encoder\.attention\.share_query_key: false in the model, true in the recipe; "
    )
    with pytest.raises(RecipeError, match=message):
        run(recipe(folder, "shared", model=shared, train=start), output=tmp_path / "shared")


def test_a_start_that_is_not_there_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = (
        r"^train\.init_from: runs/terraformer-c4: no such .*; train\.init_from=null starts from random w"
    )
    with pytest.raises(Failure, match=message):
        run(load("terraformer-arxiv"), output=tmp_path / "run", dry_run=True)
    with pytest.raises(Failure, match=r"; sparsecli train terraformer-copy-tokens makes it$"):
        run(load("terraformer-summarize"), output=tmp_path / "run", dry_run=True)
    run(load("terraformer-arxiv", ["train.init_from=null"]), output=tmp_path / "run", dry_run=True)


def test_figures_that_say_nothing_of_symbols_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    result = command.Result(
        steps=1, held_out_loss=4.5, bits_per_byte=1.25, tokens_per_second=0.0, exact_match=0.5
    )
    command.print_result(result, load("terraformer-copy").recipe, Path("runs/copy"))
    shown = [line.split("  ")[0].strip() for line in capsys.readouterr().out.splitlines()[3:] if line.strip()]
    assert shown == ["held-out loss (nats/token)", "copied exactly", "model"]


def test_the_plan_says_at_most_how_many_tokens(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(recipe(folder, "planned"), output=tmp_path / "run", dry_run=True)
    plan = capsys.readouterr().out
    assert f"at most {6 * 4 * 56:,}, {4 * 56} per step" in plan
    assert "samples.jsonl" in plan
    assert not (tmp_path / "run").exists()


def test_too_few_pairs_for_a_batch(folder: Path, tmp_path: Path) -> None:
    loaded = recipe(folder, "large", train={"per_device_train_batch_size": 99})
    with pytest.raises(Failure, match=r"data: \d+ training pairs do not fill a batch of 99"):
        run(loaded, output=tmp_path / "run")


# -- recipes that do not fit ---------------------------------------------------------------------------------

TEXT = {"source": "stdlib", "tokenizer": {"kind": "bpe", "vocabulary_size": 300}}


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({}, TEXT, "data.pairs: missing; a model with an encoder is trained on pairs"),
        (
            {"encoder": None},
            {**TEXT, "pairs": DOCSTRINGS},
            "model.encoder: missing; pairs need a model with an encoder",
        ),
        (
            {},
            {**TEXT, "pairs": {**DOCSTRINGS, "source_length": 41}},
            "data.pairs.source_length: 41 tokens with the end token are more than model.encoder.max_positions 40",
        ),
        (
            {},
            {**TEXT, "pairs": {**DOCSTRINGS, "target_length": 25}},
            "data.pairs.target_length: 25 tokens with the end token are more than model.max_positions 24",
        ),
        ({}, {"source": "copy", "length": 24}, "data.length: 25 tokens with the end token are more than"),
        (
            {},
            {"source": "copy", "length": 9, "symbols": 319},
            "data.symbols: 319 symbols, padding and the end token do not fit model.vocabulary.size 320",
        ),
        ({}, {**TEXT, "pairs": {"kind": "fields"}}, "data.pairs.kind: the standard library has no columns"),
        (
            {},
            {**TEXT, "pairs": {"kind": "corrupted", "source_length": 24, "target_length": 5}},
            "data.pairs.target_length: 5 is less than the 6 tokens of a target",
        ),
    ],
)
def test_pairs_and_models_that_do_not_fit(model: dict, data: dict, message: str) -> None:
    blocks = {"model": {**MODEL, **model}, "data": data, "train": {"max_steps": 1}}
    with pytest.raises(RecipeError) as caught:
        parse(yaml.safe_dump(blocks), "r.yaml")
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"train": {"max_steps": 1, "distillation": {"teacher": "runs/t"}}},
            "distillation from a teacher needs running text, not pairs",
        ),
        ({"convert": {"budget": "kept 1/4"}}, "data: a conversion needs running text, not pairs"),
    ],
)
def test_only_training_reads_pairs(block: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse(yaml.safe_dump({"data": {"source": "copy"}, **block}), "r.yaml")


# -- writing -------------------------------------------------------------------------------------------------


def program(*arguments: str) -> int:
    """The exit code of the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sparsecli", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return ended.value.code or 0


SOURCE = "def add_3(value):\n    return value + 1 + 1 + 1\n"


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_generate_reads_an_input_file_as_transformers_does(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    assert sparsecli
    (tmp_path / "source.py").write_text(SOURCE)
    words = ["generate", "--model", str(finished), "--temperature", "0", "--json", "--max-new-tokens", "12"]
    words += ["--backend", backend]
    assert program(*words, "--input", str(tmp_path / "source.py")) == 0
    ours = json.loads(capsys.readouterr().out)
    model = AutoModelForSeq2SeqLM.from_pretrained(finished / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    batch = tokenizer(SOURCE.removesuffix("\n"), return_tensors="pt", truncation=True, max_length=40)
    with torch.no_grad():
        theirs = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=12
        )[0, 1:]
    ended = theirs.tolist()
    ended = ended[: ended.index(1)] if 1 in ended else ended
    assert ours["tokens"] == ended
    whole = tokenizer.decode(ended)  # the last character of which may be unfinished, and is not shown then
    assert ours["text"] in (whole, whole.removesuffix("\N{REPLACEMENT CHARACTER}"))
    assert program(*words, "--prompt", SOURCE) == 0  # the same, given as a prompt
    assert json.loads(capsys.readouterr().out)["tokens"] == ours["tokens"]


@pytest.mark.parametrize("model", ["Terraformer"], indirect=True)
def test_long_inputs_are_cut_with_a_warning_and_empty_ones_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.py").write_text(SOURCE * 20)
    (tmp_path / "empty.py").write_text(" \n")
    words = ["generate", "--model", str(finished), "--max-new-tokens", "2", "--input"]
    assert program(*words, str(tmp_path / "long.py")) == 0
    assert re.search(r"the input has \d+ tokens; the model reads the first 40", capsys.readouterr().err)
    assert program(*words, str(tmp_path / "empty.py")) == 1
    assert "error: the input is empty; give a text to read\n" in capsys.readouterr().err
    assert program(*words, os.devnull, "--prompt", "x") == 2
    assert "--prompt, --input: cannot be combined; give one of them" in capsys.readouterr().err


def test_targets_end_with_the_positions(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", str(finished), "--max-new-tokens", "99", "--temperature", "5", "--json"]
    found = set()
    for seed in range(4):
        assert program(*words, "--prompt", SOURCE, "--seed", str(seed)) == 0
        written = json.loads(capsys.readouterr().out)
        found.add(written["finish"])
        assert len(written["tokens"]) == 23 or written["finish"] == "end"
    assert "context" in found
