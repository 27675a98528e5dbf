"""Building the native engine for an installation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from sparsecli.model.versions import OLDEST

SETUP = Path(__file__).parent.parent / "setup.py"


def test_an_earlier_build_does_not_hide_that_there_is_no_compiler(tmp_path: Path) -> None:
    sources = tmp_path / "sparsecli/decode/native"
    sources.mkdir(parents=True)
    (sources / "engine.cpp").write_text("int engine() { return 1; }")
    stale = tmp_path / "lib/sparsecli/decode/native/_native.so"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of another machine")
    command = [sys.executable, str(SETUP), "-q", "build_ext", "--build-lib", "lib"]
    environment = {**os.environ, "CC": "no-compiler", "CXX": "no-compiler"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr  # the engine is optional
    assert not stale.exists()


def test_the_metadata_has_lower_bounds_alone_and_that_of_transformers_is_the_one_in_use() -> None:
    project = tomllib.loads(SETUP.with_name("pyproject.toml").read_text())["project"]
    needed = project["dependencies"]
    assert f"transformers>={OLDEST}" in needed
    for line in needed:
        assert re.fullmatch(r"[\w-]+>=[\d.]+", line), line  # `make test-oldest` installs just these versions
