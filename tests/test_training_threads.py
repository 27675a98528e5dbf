"""A training takes the processors that other programs leave, and a resumed one its own number of threads."""

from collections.abc import Iterator

import psutil
import pytest
import torch

from sparsecli.train import threads
from sparsecli.train.threads import choose_threads


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "SECONDS", 0.01)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 8)
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("percent", "left"), [(0.0, 8), (5.0, 8), (12.5, 7), (50.0, 4), (95.0, 1), (100.0, 1)]
)
def test_threads_are_as_many_as_idle_processors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], percent: float, left: int
) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: percent)
    choose_threads({})
    assert torch.get_num_threads() == left
    assert ("of 8 processors" in capsys.readouterr().err) == (left < 8)


def test_a_resumed_run_keeps_its_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 100.0)
    choose_threads({"threads": 3})
    assert torch.get_num_threads() == 3
    assert "3 threads, as when this run was started; OMP_NUM_THREADS=8 changes it" in capsys.readouterr().err


@pytest.mark.parametrize("facts", [{"threads": 64}, {"threads": "many"}, {}])
def test_other_facts_do_not_matter(monkeypatch: pytest.MonkeyPatch, facts: dict[str, object]) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 0.0)
    choose_threads(facts)
    assert torch.get_num_threads() == 8


def test_the_environment_has_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 100.0)
    choose_threads({"threads": 2})
    assert torch.get_num_threads() == 8
