"""The model folder of whatever a user names. A model of ours opens without the code that imports others."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from sparsecli import console
from sparsecli.interchange.hub import check_reference
from sparsecli.model.files import CONFIG, MODEL_TYPES, PACKED, VISION_TYPE, find_model, read_json


@contextmanager
def model_folder(
    reference: str | None,
    output: Path | None = None,
    keep: bool = True,
    types: Collection[str] = MODEL_TYPES,
) -> Iterator[Path]:
    """The model folder that a reference names; what is not a model of ours is imported first.

    Args:
        reference: a run, a model folder, a Hugging Face folder, a name on the hub, or a GGUF file; None: the model of
            the run at `output`, else of the newest finished run, which a line names.
        keep: keep an import that took long for the next time.
        types: those of which the newest run may be.
    Raises:
        Failure: there is no such model, or it cannot be imported.
    """
    if reference is None:
        folder = find_model(None, output, types)
        if output is None:
            console.say(f"model: {folder}, the newest finished run")
        yield folder
        return
    if _is_ours(Path(reference)):
        yield find_model(reference)
        return
    check_reference(reference)
    from sparsecli.interchange.kept_imports import imported
    from sparsecli.interchange.sources import OwnModel, open_source

    source = open_source(reference)
    if isinstance(source, OwnModel):
        yield source.folder
        return
    with TemporaryDirectory(prefix="sparsecli-") as temporary:
        yield imported(source, Path(temporary), keep)


def _is_ours(path: Path) -> bool:
    """Whether a path is a run, a model folder of ours, or the packed file in one."""
    folder = path.parent if path.name == PACKED else path
    found = next((each for each in (folder / "model", folder) if (each / CONFIG).is_file()), None)
    return found is not None and read_json(found / CONFIG).get("model_type") in (*MODEL_TYPES, VISION_TYPE)
