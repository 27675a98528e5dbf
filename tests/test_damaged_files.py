"""Files from elsewhere, changed in many ways: each is read or refused in one clear line, and soon."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from foreign_models import LLAMA, build, save
from robustness.mutations import changed, damaged, header_of, variants
from test_interchange import write_gguf

from sparsecli.bench import compare, render
from sparsecli.bench.result import BenchResult
from sparsecli.console import Failure
from sparsecli.decode.packed.file import open_packed
from sparsecli.decode.packed.file import save as save_packed
from sparsecli.decode.packed.folder import pack_folder, read_weights
from sparsecli.decode.packed.precision import Precision
from sparsecli.interchange.safetensors_files import SafetensorsReader
from sparsecli.interchange.sources import ForeignModel, open_source
from sparsecli.model.auto import build_network
from sparsecli.model.files import CONFIG, INDEX, PACKED, WEIGHTS, check_weights, read_description
from sparsecli.model.loading import load_network, read_config
from sparsecli.model.tokenizer import SETTINGS, read_tokenizer
from sparsecli.recipe import loader

MODEL: dict[str, Any] = {
    "d_model": 16,
    "layers": 2,
    "heads": 2,
    "max_positions": 16,
    "feed_forward": {"kind": "sparse", "d_ff": 16, "block_size": 4, "rank": 2, "units_per_block": [1, 2]},
    "attention": {"projection": "multiplicative_conv", "kind": "lsh", "lsh": {"buckets": [2, 4]}},
    "vocabulary": {"kind": "dense", "size": 300},
    "positions": "axial",
    "axial": {"shape": [4, 4], "widths": [6, 10]},
}
RECIPE = {
    "model": MODEL,
    "data": {
        "source": "stdlib",
        "tokenizer": {"kind": "bpe", "vocabulary_size": 300},
        "sequence_length": 16,
        "pairs": {"kind": "corrupted", "source_length": 16, "noise": 0.5},
    },
    "train": {"max_steps": 2, "learning_rate": 1e-3},
    "bench": {"variants": [{"name": "a", "group": "sparse"}], "threads": 1},
}
SECONDS = 3.0  # of the processor; a file that takes so long could take any time


def check(read: Callable[[], object], what: object) -> bool:
    """Whether `read` refuses, which it does in one line and within `SECONDS`."""
    started = time.process_time()
    refusal: str | None = None
    try:
        read()
    except Failure as failure:
        refusal = failure.message
    except Exception as error:
        raise AssertionError(f"unexpected {type(error).__name__}: {error}: {str(what)[:3000]}") from error
    assert time.process_time() - started < SECONDS, str(what)[:3000]
    if refusal is None:
        return False
    assert refusal.strip()
    assert "codec can't" not in refusal
    assert len(refusal) < 20_000
    return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of ours, with an index of one shard and packed weights beside it."""
    folder = tmp_path_factory.mktemp("damaged") / "model"
    spec = loader.parse(yaml.dump({"model": MODEL}), "r.yaml").model
    assert spec
    save(build_network(spec), folder)
    save_packed(pack_folder(folder, spec, Precision.of("int8")), folder / PACKED)
    names = header_of((folder / WEIGHTS).read_bytes()).keys() - {"__metadata__"}
    (folder / "index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, WEIGHTS)})
    )
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def test_recipes() -> None:
    refused = 0
    for seed in range(200):
        draw = random.Random(seed)
        text = yaml.dump(changed(RECIPE, draw) if seed % 4 else RECIPE, sort_keys=False)
        if seed % 4 == 0:
            text = damaged(text.encode(), draw).decode(errors="replace")
        refused += check(lambda text=text: loader.parse(text, "r.yaml"), text)
    assert refused > 100


def test_configurations(folder: Path) -> None:
    refused = 0
    for content in variants((folder / CONFIG).read_bytes(), 0, 150):
        (folder / CONFIG).write_bytes(content)
        refused += check(lambda: read_description(folder), content)
        if check(lambda: read_config(folder), content):
            continue
        check(lambda: load_network(folder), content)
    assert refused > 50


@pytest.mark.parametrize("name", [WEIGHTS, PACKED])
def test_weights(name: str, folder: Path) -> None:
    spec = read_description(folder).spec
    refused = 0
    for content in variants((folder / name).read_bytes(), 1000, 150):
        (folder / name).write_bytes(content)
        if name == PACKED:
            refused += check(lambda: open_packed(folder / name), content)
            continue
        refused += check(lambda: check_weights(folder, spec), content)
        check(lambda: dict(read_weights(folder)), content)
        check(lambda: SafetensorsReader([folder / name]), content)
    assert refused > 100


def test_an_index_of_shards(folder: Path) -> None:
    spec = read_description(folder).spec
    (folder / WEIGHTS).rename(folder / "shard.safetensors")
    whole = (folder / "index.json").read_text().replace(WEIGHTS, "shard.safetensors").encode()
    for content in variants(whole, 2000, 60):
        (folder / INDEX).write_bytes(content)
        check(lambda: check_weights(folder, spec), content)


def test_settings_of_a_tokenizer(folder: Path) -> None:
    for name in (SETTINGS, "tokenizer.json"):
        content = (folder / name).read_bytes()
        for other in variants(content, 3000, 60):
            (folder / name).write_bytes(other)
            check(lambda: read_tokenizer(folder, 300).encode("some text"), other)
        (folder / name).write_bytes(content)


def test_results(result: BenchResult, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    refused = 0
    for content in variants(render.as_json(result).encode(), 4000, 150):
        path.write_bytes(content)
        if check(lambda: compare.read(path), content):
            refused += 1
            continue
        check(lambda: compare.compare(result, compare.read(path), 0.05), content)
    assert refused > 60


def test_checkpoints_of_others(tmp_path: Path) -> None:
    folder = save(build("llama", **LLAMA), tmp_path / "theirs")
    for content in variants((folder / CONFIG).read_bytes(), 5000, 100):
        (folder / CONFIG).write_bytes(content)
        check(lambda: open_source(str(folder)), content)


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="no gguf package")
def test_gguf_files(tmp_path: Path) -> None:
    original = build("llama", **LLAMA)
    path = tmp_path / "model.gguf"
    write_gguf(original, save(original, tmp_path / "theirs"), path)
    content = path.read_bytes()
    header = content.index(b"output_norm.weight")

    def read() -> None:
        opened = open_source(str(path))
        assert isinstance(opened, ForeignModel)
        assert opened.gguf
        for part in opened.gguf.parts(opened.spec):
            part.floats()
        opened.gguf.write_tokenizer(tmp_path)

    for seed in range(100):
        draw = random.Random(seed)
        other = damaged(content[:header], draw) + content[header:]
        path.write_bytes(other)
        check(read, seed)
