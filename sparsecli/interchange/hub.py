"""Models on the Hugging Face hub: whether there is one of a name, and its local copy."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from sparsecli.console import Failure
from sparsecli.interchange.sentencepiece_tokenizer import ADDED_TOKENS, SENTENCEPIECE_MODEL
from sparsecli.model.card import CARD
from sparsecli.model.files import CONFIG, RUNS, did_you_mean
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
SUFFIXES = (".gguf", ".spk", ".safetensors", ".bin", ".pt")
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
    if is_path(name):
        raise Failure(f"{name}: no such file or folder{_made_by(name) or did_you_mean(name)}")
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
        raise Failure(
            f"{name}: no such file or folder{did_you_mean(name)}, and not on the hub: {_reason(error)}"
        ) from error
    if not (folder / CONFIG).is_file():
        raise Failure(f"{name}: holds no {CONFIG} on the hub")
    if weights and not any(folder.glob("*.safetensors")):
        raise Failure(f"{name}: holds no safetensors files on the hub; pickles are never loaded")
    return folder


def is_path(reference: str) -> bool:
    """Whether `reference` is meant as a path of this machine, not as a name on the hub."""
    path = Path(reference)
    if path.suffix in SUFFIXES or reference.startswith(("/", ".", "~")) or path.parent == RUNS:
        return True
    return path.parent != Path() and path.parent.is_dir()


def _made_by(reference: str) -> str:
    """The command that makes the run at `reference`, if a shipped recipe does."""
    from sparsecli.recipe.loader import maker, shipped

    path = Path(reference)
    return f"; {maker(path.name)} makes it" if path.parent == RUNS and path.name in shipped() else ""


def _reason(error: Exception) -> str:
    """Why the hub gives no model, in a few words."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "it asks for a license to be accepted there, and a login"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such model, or it is private"
    if isinstance(error, LocalEntryNotFoundError):
        offline = "HF_HUB_OFFLINE is set, and there is no copy of it"
        return (
            offline
            if "outgoing traffic" in str(error)
            else "it cannot be reached, and there is no copy of it"
        )
    return str(error).strip().partition("\n")[0]
