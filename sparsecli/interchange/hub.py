"""Models on the Hugging Face hub: whether there is one of a name, and its local copy."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from sparsecli.console import Failure, system_reason
from sparsecli.interchange.sentencepiece_tokenizer import ADDED_TOKENS, SENTENCEPIECE_MODEL
from sparsecli.model.card import CARD
from sparsecli.model.files import CONFIG, MODEL_SUFFIXES, RUNS, check_exists, how_to_have, last_line
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
    if _is_path(name):
        check_exists(name)
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
            f"{name}: no such file or folder{how_to_have(name)}; {hub_reason(error, revision)}"
        ) from error
    if not (folder / CONFIG).is_file():
        raise Failure(f"{name}: holds no {CONFIG} on the hub")
    if weights and not any(folder.glob("*.safetensors")):
        raise Failure(f"{name}: holds no safetensors files on the hub; pickles are never loaded")
    return folder


def _is_path(name: str) -> bool:
    """Whether a name of nothing here can only be meant as a path."""
    path = Path(name)
    return (
        not HUB_NAME.fullmatch(name)
        or name.startswith((".", "~"))
        or path.suffix in MODEL_SUFFIXES
        or path.parts[0] == RUNS.name
    )


def hub_reason(error: Exception, revision: str | None = None) -> str:
    """In a few words, why the hub's client has failed."""
    from huggingface_hub import constants, errors

    match error:
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() | ConnectionError():
            offline = constants.HF_HUB_OFFLINE
            reason = "offline mode is on (HF_HUB_OFFLINE)" if offline else "no connection"
            return f"the hub cannot be reached: {reason}"
        case errors.GatedRepoError():
            return "the hub gives it to those who accepted its terms there; log in with `hf auth login`"
        case errors.RevisionNotFoundError():
            return f"the hub has no revision {revision} of it"
        case errors.RepositoryNotFoundError():
            return "the hub has no such model, or it is private (log in with `hf auth login`)"
        case errors.HfHubHTTPError():
            return f"the hub answers {error.response.status_code}"
        case errors.HFValidationError():
            return "nor is it a name on the hub"
    if type(error).__name__.startswith("Connect"):  # of the HTTP library
        return "the hub cannot be reached: no connection"
    return (system_reason(error) or last_line(error)).partition("\n")[0]


def check_repository(name: str) -> None:
    """Raise Failure (exit code 2) unless the hub can have a repository of that name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise Failure(
            f"NAME: expected USER/NAME of letters, digits, '-', '_' and '.', got {name!r}", exit_code=2
        )
