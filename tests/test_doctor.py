"""What `doctor` finds out, and that it says so when it cannot."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version

import pytest

from sparsecli import doctor
from sparsecli.decode.native import binding


@pytest.fixture(autouse=True)
def _known_bandwidth(monkeypatch):
    monkeypatch.setattr(doctor.host, "bandwidth", lambda **_: 12.5)
    monkeypatch.setattr(doctor.host, "ENGINE_BYTES", 2**22)


def test_json_holds_the_figures(capsys):
    doctor.run("json")
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == version("torch")
    assert found["bandwidth_gb_s"] == 12.5
    assert found["usable_cpus"] >= 1
    if binding.available() is None:
        assert list(found["engine_share"]) == ["float32", "bfloat16", "int8", "int4"]
        assert min(found["engine_share"].values()) > 0
    else:
        assert found["engine_share"] is None
    assert found["memory_gb"] >= found["available_gb"] > 0
    assert [(backend["name"], backend["usable"]) for backend in found["backends"]] == [
        ("torch", True),
        ("native", binding.available() is None),
    ]


def test_table_has_every_figure(capsys):
    doctor.run("table")
    shown = capsys.readouterr().out
    for expected in ("sparsecli", version("transformers"), "12.5 GB/s", "avx512_bf16", "decode: native"):
        assert expected in shown


def test_instructions_are_whole_flags(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "model name\t: Some CPU\nflags\t: fpu avx2 avx512fp16\n\nmodel name : other\nflags : fma\n"
    )
    found = doctor.examine(cpuinfo)
    assert found.cpu == "Some CPU"
    assert found.instructions is not None
    assert [flag for flag, have in found.instructions.items() if have] == ["avx2"]


@pytest.mark.parametrize("content", [None, "processor : 0\nFeatures : fp asimd\n"])
def test_a_system_that_does_not_tell(tmp_path, content):
    cpuinfo = tmp_path / "cpuinfo"
    if content:
        cpuinfo.write_text(content)
    found = doctor.examine(cpuinfo)
    assert found.cpu
    assert found.instructions is None
    assert ("avx2", "unknown") in [row[:2] for row in doctor.rows(found)]


def test_a_missing_package_is_named(monkeypatch):
    def lookup(package):
        if package == "datasets":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(doctor, "version", lookup)
    assert ("datasets", "not installed", "pip install datasets") in doctor.rows(doctor.examine())


@pytest.mark.parametrize(
    ("found", "works"),
    [("5.23.0", True), ("5.24.1.dev0", True), ("5.100.0", True), ("6.0.0rc1", True), ("5.22.2", False)],
)
def test_a_version_of_transformers_that_is_too_old_is_named(monkeypatch, found, works):
    monkeypatch.setattr(doctor, "version", lambda _: found)
    expected = "" if works else "older than 5.23: pip install 'transformers>=5.23'"
    assert ("transformers", found, expected) in doctor.rows(doctor.examine())


def native_backend() -> doctor.Backend:
    return next(backend for backend in doctor.examine().backends if backend.name == "native")


def test_the_native_engine_and_why_it_cannot_be_used(monkeypatch):
    monkeypatch.setattr(binding, "available", lambda: "it was not built")
    assert native_backend() == doctor.Backend("native", False, "it was not built")
    monkeypatch.setattr(binding, "available", lambda: None)
    monkeypatch.setattr(binding, "isa", lambda: "avx2")
    monkeypatch.setattr(binding, "instruction_sets", lambda: ["avx2", "portable"])
    found = native_backend()
    assert found.usable
    assert found.reason.startswith("avx2 with ")
    assert found.reason.endswith("SPARSECLI_ISA selects another: portable")


def test_a_wrong_environment_is_a_reason_and_no_error(monkeypatch):
    monkeypatch.setenv("SPARSECLI_KERNELS", "fast")
    assert native_backend().reason.startswith("SPARSECLI_KERNELS=fast: expected one of")
