"""`sparsecli push`: uploads a model folder to the Hugging Face hub, in one commit."""

from __future__ import annotations

from pathlib import Path

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.interchange.hub import DESCRIPTIONS, IMAGE_PROCESSOR, hub_reason
from sparsecli.model.card import CARD
from sparsecli.model.files import (
    CONFIG,
    INDEX,
    PACKED,
    check_weights,
    find_model,
    last_line,
    of_images,
    read_description,
    read_json,
    read_vision_spec,
    weight_files,
)
from sparsecli.model.remote_code import REMOTE_CODE
from sparsecli.model.tokenizer import read_tokenizer


def run(
    *,
    model: str,
    repository: str,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> None:
    """The `push` command. The repository is made if there is none; its other files stay.

    Raises:
        Failure: no model, a damaged or a packed one, or the hub refuses it.
    """
    folder = find_model(model)
    names = files_of(folder)
    size = sum((folder / name).stat().st_size for name in names) / 1e6
    if dry_run:
        rows = [("model", str(folder)), ("repository", repository), ("files", ", ".join(names))]
        console.print_table(["plan", ""], [*rows, ("size", f"{size:,.1f} MB")])
        return
    console.say(f"uploading {len(names)} files ({size:,.1f} MB) to {repository}")
    url = _upload(folder, names, repository, private, revision, message or f"Upload {folder.absolute().name}")
    console.say(f"wrote {url}")


def files_of(folder: Path) -> list[str]:
    """Names of the files that belong to the model in `folder`: no others are uploaded.

    Raises:
        Failure: the model is damaged, or has only packed weights.
    """
    if of_images(folder):
        described: tuple[str, ...] = (CONFIG, IMAGE_PROCESSOR)
        check_weights(folder, read_vision_spec(folder))
        read_json(folder / IMAGE_PROCESSOR)
    else:
        described = DESCRIPTIONS
        _check_text_model(folder)
    if not (folder / CARD).is_file():
        console.warn(f"{folder}: has no model card ({CARD}); the hub will show an empty page")
    weights = [path.name for path in weight_files(folder)]
    names = dict.fromkeys([CARD, *described, REMOTE_CODE, *([INDEX] if len(weights) > 1 else []), *weights])
    return [name for name in names if (folder / name).is_file()]


def _check_text_model(folder: Path) -> None:
    """Raise Failure unless the model of text in `folder` is whole, with weights that are not packed."""
    spec = read_description(folder).spec
    read_tokenizer(folder, spec.vocabulary.size)
    if (folder / PACKED).is_file():
        raise Failure(
            f"{folder}: its weights are packed for the native engine; push the model it was made from"
        )
    check_weights(folder, spec)


def _upload(
    folder: Path, names: list[str], repository: str, private: bool, revision: str | None, message: str
) -> str:
    """Upload the files in one commit. Returns the address of the repository."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(
            url.repo_id,
            [CommitOperationAdd(name, folder / name) for name in names],
            commit_message=message,
            revision=revision,
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise Failure(
                f"{repository}: the hub does not let you write there; log in with `hf auth login`, or set HF_TOKEN"
            ) from error
        if isinstance(error, RepositoryNotFoundError) or status == 404:
            what = f"branch {revision}" if revision else "repository"
            raise Failure(
                f"{repository}: there is no such {what} on the hub, or you may not see it"
            ) from error
        raise Failure(f"{repository}: the hub answers {status}: {last_line(error)}") from error
    except Exception as error:  # of the connection, or of the upload: the client has no common type
        raise Failure(f"{repository}: cannot be uploaded: {hub_reason(error)}") from error
    return str(url)
