"""Models on the Hugging Face hub: whether there is one of a name, and its local copy."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from sparsecli.console import Failure
from sparsecli.interchange.sentencepiece_tokenizer import ADDED_TOKENS, SENTENCEPIECE_MODEL
from sparsecli.model.card import CARD
from sparsecli.model.files import CONFIG
from sparsecli.model.tokenizer import FILES

GENERATION = "generation_config.json"
DESCRIPTIONS = (
    CONFIG,
    GENERATION,
    *FILES,
    ADDED_TOKENS,
    "vocab.json",
    "merges.txt",
    SENTENCEPIECE_MODEL,
)
"""Files beside the weights in a Hugging Face folder; all but the first may be missing."""
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_reference(reference: str | None, revision: str | None = None, weights: bool = True) -> None:
    """Raise Failure if `reference` names no model. Commands call it before imports that take seconds.

    Arguments as of `open_source`. What is on the hub is then here.
    """
    if reference is not None and not Path(reference).exists():
        fetch(reference, revision, weights)


@cache
def fetch(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """The local copy of a model on the hub, which is asked once.

    Raises:
        Failure: it is no name there, or the model has no configuration or no safetensors files.
    """
    if not HUB_NAME.fullmatch(name):
        raise Failure(f"{name}: no such file or folder, nor a name on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    # Some models carry their weights twice, under other names; and pickles are never fetched.
    patterns = [
        *DESCRIPTIONS,
        CARD,
        *(["model*.safetensors", "model.safetensors.index.json"] if weights else []),
    ]
    disable_progress_bars()
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # what the hub's client raises is one of these
        reason = str(error).strip().partition("\n")[0]
        raise Failure(
            f"{name}: no such file or folder here, and the hub does not provide it: {reason}"
        ) from error
    if not (folder / CONFIG).is_file():
        raise Failure(f"{name}: holds no {CONFIG} on the hub")
    if weights and not any(folder.glob("*.safetensors")):
        raise Failure(f"{name}: holds no safetensors files on the hub; pickles are never loaded")
    return folder
