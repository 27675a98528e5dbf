"""What a conversion keeps on its way, for one that was stopped or has another budget, and when it keeps nothing."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_conversions import losses, search, trained
from small_runs import send

from sparsecli.bench.decoders.native import NativeDecoder
from sparsecli.console import Failure, Mismatch, Stopped
from sparsecli.convert import command, resume
from sparsecli.convert import search as searching
from sparsecli.convert.methods import METHODS, fitting
from sparsecli.convert.resume import fingerprint, open_work_folder, work_path
from sparsecli.convert.run import Conversion
from sparsecli.decode.engine import Engine
from sparsecli.decode.native import binding
from sparsecli.model.loading import load_model
from sparsecli.recipe.loader import LoadedRecipe, load
from sparsecli.recipe.schema import Recipe

pytestmark = pytest.mark.skipif(binding.available() is not None, reason="the native engine is not there")


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedRecipe, Path]:
    return trained(tmp_path_factory.mktemp("convert"))


@pytest.fixture(autouse=True)
def cache(dense_run: tuple[LoadedRecipe, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECLI_CACHE", str(dense_run[1].parent / "cache"))
    monkeypatch.setattr("sparsecli.convert.run.ROUNDS", 1)


# -- stopped and resumed -------------------------------------------------------------------------------------


def test_a_stopped_conversion_goes_on(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, dense = dense_run
    report = command.run(loaded, model=str(dense), output=tmp_path / "whole")
    assert report

    def stop(*_: object) -> None:
        raise Stopped("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("sparsecli.convert.run.distil", stop)
        with pytest.raises(Stopped):
            command.run(loaded, model=str(dense), output=tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()
    other = load(str(loaded.path), ["seed=5"])
    with pytest.raises(Failure, match="an unfinished conversion of another recipe or model"):
        command.run(other, model=str(dense), output=tmp_path / "stopped")
    monkeypatch.setattr(Conversion, "_fit", None)  # it is not fitted again
    again = command.run(loaded, model=str(dense), output=tmp_path / "stopped")
    assert again
    assert losses(again) == losses(report)
    weights = [
        (tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "stopped")
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_while_layers_are_fitted(
    dense_run: tuple[LoadedRecipe, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    """Each part that was fitted is kept: only the one that was interrupted is fitted again."""
    loaded, dense = dense_run
    changed = search(
        loaded, "perplexity +5 %", "convert.methods=[precision]", "convert.quantization={head: 4}"
    )
    fitted: list[str] = []

    def fit(*arguments: Any, **options: Any) -> None:
        fitted.append(arguments[1].config.spec.feed_forward.kind)
        if len(fitted) == 3:
            send(number)()
        fitting.fit_model(*arguments, **options)

    monkeypatch.setattr(searching, "fit_model", fit)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Stopped, match="stopped; run the same command again to resume") as raised:
        command.run(changed, model=str(dense), output=tmp_path / "found")
    assert raised.value.exit_code == code
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert fitted == ["precision", "precision", "dense"]  # chosen units, none, then the logits
    assert command.run(changed, model=str(dense), output=tmp_path / "found")
    assert fitted[3:] == ["dense"]
    assert not work_path(tmp_path / "found").exists()


def test_decoding_is_measured_with_the_threads_of_the_recipe(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, dense = dense_run
    measured: list[int] = []

    class Watched(NativeDecoder):
        def __init__(self, engine: Engine, *arguments: int) -> None:
            measured.append(engine.threads)
            super().__init__(engine, *arguments)

    monkeypatch.setattr("sparsecli.convert.evaluate.NativeDecoder", Watched)
    quick = ["convert.distillation.tokens=0", "convert.controller_steps=1"]
    report = command.run(
        load(str(loaded.path), [*quick, "bench.threads=3"]), model=str(dense), output=tmp_path / "sparse"
    )
    assert report
    assert report.threads == 3
    assert set(measured) == {3}
    with pytest.raises(Failure, match=r"bench\.threads: 999 is more than 256"):
        command.run(load(str(loaded.path), ["bench.threads=999"]), model=str(dense), output=tmp_path / "no")


def test_what_a_kill_behind_the_last_step_left_is_deleted(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, dense = dense_run
    quick = load(str(loaded.path), ["convert.distillation.tokens=0", "convert.controller_steps=1"])
    output, work = tmp_path / "sparse", work_path(tmp_path / "sparse")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume.WorkFolder, "close", killed)
        patch.setattr(resume, "_delete", lambda folder: None)
        with pytest.raises(Stopped):
            command.run(quick, model=str(dense), output=output)
    assert (output / "recipe.yaml").is_file()
    assert work.is_dir()
    command.run(load(str(quick.path)), model=str(dense), output=tmp_path / "other", dry_run=True)
    with pytest.raises(Failure, match="already holds a run"):
        command.run(quick, model=str(dense), output=output, dry_run=True)
    assert work.is_dir()  # a dry run changes nothing
    with pytest.raises(Failure, match="already holds a run"):
        command.run(quick, model=str(dense), output=output)
    assert not work.exists()
    assert (output / "report.json").is_file()


def test_a_damaged_note_is_another_conversion_s(dense_run: tuple[LoadedRecipe, Path], tmp_path: Path) -> None:
    work = work_path(tmp_path / "sparse")
    for content in (b"[]", b"\xff", b"{"):
        work.mkdir(exist_ok=True)
        (work / "conversion.json").write_bytes(content)
        with pytest.raises(Failure, match=r"sparse\.converting: holds an unfinished conversion of"):
            command.run(dense_run[0], model=str(dense_run[1]), output=tmp_path / "sparse")


# -- budgets -------------------------------------------------------------------------------------------------


def test_a_budget_that_nothing_can_keep_is_refused_beforehand(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path
) -> None:
    loaded, dense = dense_run
    for budget, least in (("bytes 1 KB", r"bytes 0\.02 MB"), ("kept 1/32", r"kept 12\.5 %")):
        changed = search(loaded, budget, "convert.methods=[selector]")
        for dry_run in (True, False):
            with pytest.raises(Mismatch, match=f"no candidate meets .*; `budget: {least}` can be met"):
                command.run(changed, model=str(dense), output=tmp_path / "found", dry_run=dry_run)
    assert not list(tmp_path.iterdir())


def test_a_wider_budget_takes_what_was_built(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, dense = dense_run
    given = [
        "convert.methods=[controller]",
        "convert.distillation.tokens=2048",
        "convert.distillation.patience=8",
    ]

    def refuse(*_: object) -> None:
        raise Mismatch("not kept")

    narrow = search(loaded, "perplexity +300 %", *given)
    with monkeypatch.context() as patch:
        patch.setattr(Conversion, "_check_budget", refuse)
        patch.setattr(Conversion, "_needs_recovery", lambda *_: True)
        with pytest.raises(Mismatch):
            command.run(narrow, model=str(dense), output=tmp_path / "found")
    monkeypatch.setattr(Conversion, "_fit", None)  # it is not fitted again
    report = command.run(
        search(loaded, "perplexity +900 %", *given), model=str(dense), output=tmp_path / "found"
    )
    assert report
    assert report.distillation_tokens == 2048
    assert list(losses(report)) == ["dense", "fitted", "refitted", "distilled"]


def test_another_budget_goes_on_from_the_fits(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, dense = dense_run
    monkeypatch.setattr(METHODS["controller"], "fit_groups", ((4, 2),))
    given = ["convert.methods=[controller]", "convert.distillation.tokens=0"]
    with pytest.raises(
        Mismatch, match=r"no candidate meets .* can be met, and resumes from these m"
    ) as raised:
        command.run(search(loaded, "perplexity +0.1 %", *given), model=str(dense), output=tmp_path / "found")
    assert raised.value.exit_code == 4
    again = raised.value.message.split("`")[1].removeprefix("budget: ")
    monkeypatch.setattr(searching, "fit_model", None)
    assert command.run(search(loaded, again, *given), model=str(dense), output=tmp_path / "found")


def test_candidates_are_tried_until_one_keeps_the_budget_on_tuning_text(
    dense_run: tuple[LoadedRecipe, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What was predicted too well is not taken, however many that are, and is not built twice."""
    loaded, dense = dense_run
    given = ["convert.methods=[controller]", "convert.distillation.tokens=0", "convert.quantization={}"]
    monkeypatch.setattr(METHODS["controller"], "fit_groups", ((8, 4, 2),))
    monkeypatch.setattr(searching, "window_losses", lambda *arguments: np.zeros(1))  # far too well
    with pytest.raises(
        Mismatch, match=r"no candidate meets .* on tuning text once it is built; `budget: p"
    ) as e:
        command.run(
            search(loaded, "perplexity +0.0001 %", *given), model=str(dense), output=tmp_path / "found"
        )
    assert e.value.exit_code == 4
    assert capsys.readouterr().err.count("building") == 3
    assert not (tmp_path / "found").exists()
    again = e.value.message.split("`")[1].removeprefix("budget: ")
    report = command.run(search(loaded, again, *given), model=str(dense), output=tmp_path / "found")
    assert report
    assert capsys.readouterr().err.count("building") == 1


# -- folders -------------------------------------------------------------------------------------------------


def test_a_source_is_known_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF one")
    before = fingerprint(file)
    assert fingerprint(file) == before
    file.write_bytes(b"GGUF two")
    assert fingerprint(file) != before


def decided(seed: int = 0) -> Recipe:
    return Recipe(seed=seed)


def test_one_conversion_at_a_time(dense_run: tuple[LoadedRecipe, Path], tmp_path: Path) -> None:
    loaded, dense = dense_run
    pytest.importorskip("fcntl")
    with open_work_folder(tmp_path / "sparse", decided(), "model") as work:
        work.record("done", 1)
        with pytest.raises(
            Failure, match=r"converting: another conversion uses this folder; wait for it"
        ) as raised:
            command.run(loaded, model=str(dense), output=tmp_path / "sparse")
        assert "\n" not in raised.value.message
        assert json.loads((work.folder / "conversion.json").read_text())["done"] == 1
    with open_work_folder(tmp_path / "sparse", decided(), "model") as work:
        assert work.recall("done") == 1
        work.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_with_nothing_finished_never_blocks(tmp_path: Path) -> None:
    folder = work_path(tmp_path / "sparse")
    another = pytest.raises(Failure, match="holds an unfinished conversion of another recipe or model")
    with open_work_folder(tmp_path / "sparse", decided(), "model") as work:
        (work.folder / "dense").mkdir()
        begun = (work.folder / "conversion.json").read_text()
    assert not folder.exists()
    (folder / "dense").mkdir(parents=True)  # as a power cut leaves it
    (folder / "conversion.json").write_text(begun)
    with open_work_folder(tmp_path / "sparse", decided(seed=1), "other") as work:
        assert not (work.folder / "dense").exists()
        work.record("done", 1)
    with another, open_work_folder(tmp_path / "sparse", decided(), "model"):
        pass
    (folder / "conversion.json").unlink()
    (folder / "mine.txt").write_text("not a conversion's")
    with another, open_work_folder(tmp_path / "sparse", decided(), "model"):
        pass
    assert (folder / "mine.txt").exists()


def test_damaged_weights_leave_nothing_behind(dense_run: tuple[LoadedRecipe, Path], tmp_path: Path) -> None:
    loaded, dense = dense_run
    model, tokenizer = load_model(dense / "model")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    with pytest.raises(Failure, match=r"convert\.model: its loss is not finite; check its weights"):
        command.run(loaded, model=str(tmp_path / "dense"), output=tmp_path / "sparse")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
