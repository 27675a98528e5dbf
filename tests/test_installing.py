"""Building the native engine for an installation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
