"""Small models run fastest on one thread, and the same on every machine; tests run beside one another."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for programs in the background


def pytest_collection_finish() -> None:
    """Collections of garbage pass over what imports have made: the Trainer's take 10 ms instead of 400 ms."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_processor() -> Iterator[None]:
    """Engines take one thread unless a test asks for more: those that share processors wait for one another's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
        yield


@pytest.fixture
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks that neither measure the machine's memory nor wait to see whether it is busy."""
    from sparsecli.bench import host

    monkeypatch.setattr(host, "bandwidth", lambda **_: 20.0)
    monkeypatch.setattr(host, "BUSY_SECONDS", 0.01)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read and tokenized is kept for this test alone."""
    monkeypatch.setenv("SPARSECLI_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def result() -> object:
    """One real run of the tiny benchmark."""
    from small_benches import loaded

    from sparsecli.bench import command, host

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "bandwidth", lambda **_: 20.0)
        return command.run(loaded(threads=[1]), format="json")


@pytest.fixture(scope="session")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A working directory where runs of shipped recipes pile up, and a small standard library."""
    from shipped_runs import settle

    return settle(tmp_path_factory)


@pytest.fixture
def place(newcomer: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """That working directory, worked in."""
    from shipped_runs import move_in

    move_in(*newcomer, monkeypatch)
    return newcomer[0]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A recipe of a tiny model and its text; what is read and packed is kept beside it."""
    from small_runs import write_recipe

    path = write_recipe(tmp_path_factory.mktemp("train"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSECLI_CACHE", str(path.parent / "cache"))
        yield path


@pytest.fixture(scope="module")
def finished(recipe_file: Path) -> tuple[Path, object]:
    """An uninterrupted run of it: its folder and its result."""
    from sparsecli.recipe.loader import load
    from sparsecli.train.command import run

    output = recipe_file.parent / "finished"
    result = run(load(str(recipe_file)), output=output)
    assert result is not None
    return output, result


@pytest.fixture
def tiny(recipe_file: Path) -> object:
    """That recipe, loaded."""
    from sparsecli.recipe.loader import load

    return load(str(recipe_file))
