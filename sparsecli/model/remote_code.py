"""The Python file in a model folder with which transformers finds our classes when nobody has imported sparsecli."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

REMOTE_CODE = "sparsecli_model.py"
"""The file's name. transformers runs it with `trust_remote_code=True`; it imports the installed package."""

_SOURCE = '''"""Lets transformers load this model with trust_remote_code=True. It needs: pip install sparsecli"""

from sparsecli.model import {names}

__all__ = [{quoted}]
'''


def auto_map(classes: Mapping[str, str]) -> dict[str, str]:
    """The field `auto_map` of config.json, for `classes`: names of ours by those of transformers' Auto classes."""
    return {auto: f"{Path(REMOTE_CODE).stem}.{name}" for auto, name in classes.items()}


def write_remote_code(folder: Path, classes: Mapping[str, str]) -> None:
    """Write the file that holds `classes` into a model folder."""
    names = sorted({*classes.values()})
    quoted = ", ".join(f'"{name}"' for name in names)
    (folder / REMOTE_CODE).write_text(_SOURCE.format(names=", ".join(names), quoted=quoted), encoding="utf-8")
