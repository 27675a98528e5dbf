"""Sources of models: a folder of ours, a Hugging Face folder, a name on the hub, or a GGUF file; see `open_source`."""

from __future__ import annotations

from codecs import BOM_UTF8
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecli.console import Failure
from sparsecli.interchange.architectures import NO_TOKENS, ForeignArchitecture, architecture_of
from sparsecli.interchange.hub import DESCRIPTIONS, GENERATION, fetch
from sparsecli.interchange.safetensors_files import SafetensorsReader, StackedReader, TensorReader
from sparsecli.interchange.sentencepiece_tokenizer import SENTENCEPIECE_MODEL, convert_tokenizer
from sparsecli.model.card import license_of
from sparsecli.model.files import (
    CONFIG,
    MODEL_TYPES,
    PACKED,
    VISION_TYPE,
    find_model,
    last_line,
    read_description,
    read_json,
    weight_files,
)
from sparsecli.model.tokenizer import TOKENIZER
from sparsecli.spec.base import MOST_LAYERS
from sparsecli.spec.model import ModelSpec

if TYPE_CHECKING:
    from sparsecli.interchange.gguf_file import GgufCheckpoint

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


@dataclass(frozen=True)
class OwnModel:
    """A model folder of ours."""

    reference: str
    folder: Path
    spec: ModelSpec


@dataclass(frozen=True)
class ForeignModel:
    """A checkpoint of another architecture."""

    reference: str
    path: Path
    """Its folder or file."""
    architecture: ForeignArchitecture
    spec: ModelSpec
    config: dict[str, Any]
    """Its config.json."""
    revision: str | None = None
    """The commit on the hub."""
    gguf: GgufCheckpoint | None = None
    """The file, if it is a GGUF file, not a folder."""

    @property
    def license(self) -> str | None:
        """Its license, where its card or its file names one."""
        if self.gguf:
            found = self.gguf.reader.metadata.get("general.license")
            return found if isinstance(found, str) else None
        return license_of(self.path)

    def tensors(self) -> TensorReader:
        """Its weights.

        Raises:
            Failure: a file is missing, cut short or damaged, or a pickle.
        """
        assert self.gguf is None
        return StackedReader(SafetensorsReader(weight_files(self.path)))

    def generation(self) -> dict[str, Any]:
        """Its generation_config.json; empty where there is none."""
        path = self.path / GENERATION
        return read_json(path) if path.is_file() else {}

    def write_tokenizer(self, folder: Path) -> None:
        """Write its tokenizer to `folder`: as it is, without byte-order marks, or converted if it has no
        tokenizer.json.

        Raises:
            Failure: there is none, or it cannot be converted.
        """
        if (self.path / TOKENIZER).is_file():
            for name in DESCRIPTIONS[2:]:
                if (self.path / name).is_file():
                    (folder / name).write_bytes((self.path / name).read_bytes().removeprefix(BOM_UTF8))
            return
        try:
            if self.gguf:
                self.gguf.write_tokenizer(folder)
            elif (self.path / SENTENCEPIECE_MODEL).is_file():
                convert_tokenizer(self.path, folder)
            else:
                from transformers import AutoTokenizer

                tokenizer = AutoTokenizer.from_pretrained(
                    self.path, local_files_only=True, trust_remote_code=False
                )
                tokenizer.save_pretrained(folder)
        except (Failure, MemoryError):
            raise
        except Exception as error:  # the libraries raise whatever their parsers do
            if getattr(error, "errno", None) or "(os error" in str(error):  # `folder` cannot be written
                raise
            raise Failure(f"{self.path}: no tokenizer can be loaded: {last_line(error)}") from error
        if not (folder / TOKENIZER).is_file():
            raise Failure(f"{self.path}: the tokenizer has no `tokenizers` version ({TOKENIZER})")


def open_source(reference: str, revision: str | None = None, weights: bool = True) -> OwnModel | ForeignModel:
    """Open the model that `reference` names: a run or a model folder of ours, a Hugging Face folder or its name on the
    hub, or a GGUF file.

    Args:
        revision: of a name on the hub: a branch, a tag or a commit.
        weights: also fetch the weights of a name on the hub.
    Raises:
        Failure: there is no such model, or ours cannot express its architecture or one of its features.
    """
    path = Path(reference)
    if path.exists():
        if revision is not None:
            raise Failure(f"{reference}: is a local path; --revision is for names on the hub")
        if path.is_file() and path.suffix == ".gguf":
            from sparsecli.interchange.gguf_file import GgufCheckpoint

            file = GgufCheckpoint(path)
            return _open_foreign(reference, path, file.config, gguf=file)
        if path.is_file() and path.name != PACKED:
            hint = "a pickle, which is never loaded" if path.suffix in PICKLES else "neither"
            raise Failure(f"{reference}: expected a model's folder or a .gguf file; it is {hint}")
        folder, commit = find_model(reference), None
    else:
        folder = fetch(reference, revision, weights)
        commit = folder.name
    fields = read_json(folder / CONFIG)
    if fields.get("model_type") in (*MODEL_TYPES, VISION_TYPE):
        return OwnModel(reference, folder, read_description(folder).spec)
    return _open_foreign(reference, folder, fields, revision=commit)


def _open_foreign(
    reference: str,
    path: Path,
    fields: dict[str, Any],
    revision: str | None = None,
    gguf: GgufCheckpoint | None = None,
) -> ForeignModel:
    place = path if path.is_file() else path / CONFIG
    try:
        architecture, spec = read_architecture(fields)
    except Failure as failure:
        raise Failure(f"{place}: {failure.message}") from failure
    return ForeignModel(reference, path, architecture, spec, fields, revision, gguf)


def read_architecture(fields: dict[str, Any]) -> tuple[ForeignArchitecture, ModelSpec]:
    """The foreign architecture, and ours, for the fields of a config.json.

    Raises:
        Failure: ours cannot express it; the message begins with the field.
    """
    from transformers import AutoConfig

    kind = fields.get("model_type")
    architecture = architecture_of(kind)
    _check_dtypes(fields)
    for name in ("num_hidden_layers", "n_layer"):  # transformers begins lists of so many
        if isinstance(layers := fields.get(name), int) and layers > MOST_LAYERS:
            raise Failure(f"{name}: {layers} is more than {MOST_LAYERS}, the most that is taken")
    known = {name: value for name, value in fields.items() if name not in ("model_type", "auto_map")}
    try:
        config = AutoConfig.for_model(kind, **{**known, **NO_TOKENS})
    except Exception as error:  # transformers wraps what its validation raises
        raise Failure(last_line(error)) from error
    return architecture, architecture.spec(config)


def _check_dtypes(fields: dict[str, Any]) -> None:
    """transformers writes every `dtype` as text, also a nested one, and fails on what names no type."""
    for name, value in fields.items():
        if isinstance(value, dict):
            _check_dtypes(value)
        elif name == "dtype" and not isinstance(value, str | int | None):
            raise Failure(f"dtype: expected the name of a type, got {value!r}")
