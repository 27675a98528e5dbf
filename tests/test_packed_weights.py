"""Packed weights that are kept for the next start of `generate`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from test_speculation import save_model

from sparsecli.decode.packed.pack import PackedModel
from sparsecli.generate import packed_weights as module
from sparsecli.generate.packed_weights import packed_weights
from sparsecli.model.files import read_description


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "KEEP_AFTER", -1.0)  # however fast it was
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return save_model(tmp_path / "model")


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by a type whenever weights are packed."""
    found: list[str] = []
    pack_folder = module.pack_folder

    def counted(folder: Path, spec: object, precision: object) -> PackedModel:
        found.append(precision.units)  # type: ignore[attr-defined]
        return pack_folder(folder, spec, precision)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "pack_folder", counted)
    return found


def load(folder: Path, dtype: str | None, keep: bool = True) -> PackedModel:
    return packed_weights(folder, read_description(folder), dtype, keep)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.spk"))


def test_converted_weights_are_packed_once(
    folder: Path, packings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = load(folder, "int8")
    assert (packings, kept(folder)) == (["int8"], ["kept-int8.spk"])
    assert "kept-int8.spk" in capsys.readouterr().err
    again = load(folder, "int8")
    assert packings == ["int8"]
    assert again.precision == first.precision
    for name, tensor in first.tensors.items():
        np.testing.assert_array_equal(again.tensors[name][: tensor.size], tensor)
    load(folder, "bfloat16")
    assert kept(folder) == ["kept-bfloat16.spk", "kept-int8.spk"]


def test_weights_of_the_stored_type_are_not_kept(folder: Path, packings: list[str]) -> None:
    load(folder, None)
    load(folder, "float32")
    load(folder, "int8", keep=False)
    assert (packings, kept(folder)) == (["float32", "float32", "int8"], [])


def test_weights_that_have_changed_are_packed_again(folder: Path, packings: list[str]) -> None:
    load(folder, "int8")
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    load(folder, "int8")
    assert packings == ["int8", "int8"]


def test_a_damaged_file_is_packed_again(
    folder: Path, packings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    load(folder, "int8")
    path = folder / "kept-int8.spk"
    content = bytearray(path.read_bytes())
    content[-70] ^= 1
    path.write_bytes(content)
    load(folder, "int8")
    assert packings == ["int8", "int8"]
    assert "packed again" in capsys.readouterr().err
    load(folder, "int8")
    assert packings == ["int8", "int8"]


def test_a_folder_that_cannot_be_written(
    folder: Path, packings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = module.save

    def refused(model: PackedModel, path: Path, made_of: str) -> None:
        if path.parent == folder:
            raise PermissionError(path)
        save(model, path, made_of)

    monkeypatch.setattr(module, "save", refused)
    load(folder, "int8")
    assert (kept(folder), len(kept(tmp_path / "cache" / "sparsecli"))) == ([], 1)
    load(folder, "int8")
    assert packings == ["int8"]
