"""A model's folder: finding it, reading its config.json, checking its weight files, without torch or transformers.

One clear line says what is wrong with whatever is wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from sparsecli.console import Failure, warn_once
from sparsecli.model.tensors import Shape, tensor_shapes, vision_tensor_shapes
from sparsecli.spec.model import ModelSpec
from sparsecli.spec.vision import AnySpec, VisionSpec

RUNS = Path("runs")
MODEL_TYPE = "scaling_transformer"
ENCODER_DECODER_TYPE = "scaling_transformer_encoder_decoder"
TERRAFORMER_TYPE = "terraformer"
MODEL_TYPES = (MODEL_TYPE, ENCODER_DECODER_TYPE, TERRAFORMER_TYPE)
VISION_TYPE = "scaling_transformer_vision"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LONGEST_NAME = 255
MOST_DIGITS = 300
"""Of a whole number in JSON; the largest float has 309."""
MOST_NESTED = 100
"""Levels of a JSON document; ours and other programs' have below 20. Libraries that copy deep ones fail."""
KEEP_AFTER = 2.0
"""Seconds of work from which on its result is kept for the next start."""
MODEL_SUFFIXES = (".gguf", ".spk", ".safetensors")
RECIPE = "recipe.yaml"
"""What a run was made with, beside its model folder."""
PACKED = "model.spk"
"""Weights in the layout of the native engine, in place of the safetensors files."""


@dataclass(frozen=True)
class Description:
    """What config.json says about a model."""

    spec: ModelSpec
    end_tokens: frozenset[int]
    """Tokens that end a text."""
    dtype: str = "float32"
    """The type in which its matrices are stored: float32, bfloat16 or float16."""
    imported: bool = False
    """Whether it comes from another architecture, whose tokenizer may put tokens before every text."""


def model_type(spec: ModelSpec) -> str:
    """Which of `MODEL_TYPES` a spec is: without an encoder, or by how the decoder reads it."""
    if spec.encoder is None:
        return MODEL_TYPE
    return TERRAFORMER_TYPE if spec.encoder.read_by.kind == "prefix" else ENCODER_DECODER_TYPE


def find_model(
    reference: str | None, output: Path | None = None, types: Collection[str] | None = None
) -> Path:
    """The model folder that `reference` (a run, a model folder, or the packed weights in one) names.

    Without a reference: the model of the run at `output`, else of the newest finished run under `runs/` whose model
    is of one of `types` (None: of any).

    Raises:
        Failure: there is none; the message says what to do.
    """
    if reference is not None:
        folder = Path(reference)
        if folder.suffix == ".gguf" and folder.is_file():
            raise Failure(f"{reference}: is a GGUF file; sparsecli import makes a model folder of it")
        check_exists(reference)
        if folder.name == PACKED:
            folder = folder.parent
        for candidate in (folder / "model", folder):
            if (candidate / CONFIG).is_file():
                return candidate
        raise Failure(
            f"{reference}: holds no model (no config.json); a run has one when its training is finished"
        )
    if output is not None:
        if (output / "model" / CONFIG).is_file():
            return output / "model"
        raise Failure(f"{output}: holds no finished model; train one first, or name another with --model")
    finished = [path.parent for path in RUNS.glob(f"*/model/{CONFIG}")]
    if not finished:
        raise Failure(
            "no finished run under runs/; train one (sparsecli train quickstart) or pass --model DIR"
        )
    newest_first = sorted(finished, key=lambda folder: (folder / CONFIG).stat().st_mtime, reverse=True)
    for folder in newest_first:
        if types is None or read_json(folder / CONFIG).get("model_type") in types:
            return folder
    raise Failure(
        f"no finished run under runs/ has a model of the kind that this command takes ({', '.join(types or ())}); "
        "pass --model DIR"
    )


def check_exists(reference: str) -> None:
    """Raise Failure if there is nothing at a path. Commands call it before imports that take seconds."""
    if not Path(reference).exists():
        raise Failure(f"{reference}: no such file or folder{how_to_have(reference)}")


def how_to_have(reference: str) -> str:
    """The end of a message about a model that is not there: what makes it, or what is called nearly so."""
    path = Path(reference)
    run = path.parent if path.name == "model" else path
    recipe = Path(str(resources.files("sparsecli.recipes"))) / f"{run.name}.yaml"
    if run.parent.name == RUNS.name and recipe.is_file():
        converts = re.search("^convert:", recipe.read_text(encoding="utf-8"), re.MULTILINE)
        return f"; sparsecli {'sparsify-convert' if converts else 'train'} {run.name} makes it"
    try:
        beside = {
            _stem(each): each
            for each in path.parent.iterdir()
            if each.is_dir() or each.suffix in MODEL_SUFFIXES
        }
    except OSError:
        return ""
    near = get_close_matches(_stem(path), beside, n=1)
    return f"; did you mean {beside[near[0]]}?" if near else ""


def _stem(path: Path) -> str:
    return path.stem if path.suffix in MODEL_SUFFIXES else path.name


def recipe_of(folder: Path) -> Path | None:
    """The recipe of the run whose model folder this is; None where it is none of a run's."""
    stored = folder.parent / RECIPE
    return stored if folder.name == "model" and stored.is_file() else None


def read_description(folder: Path) -> Description:
    """What the config.json of `folder` says.

    Raises:
        Failure: not readable, of another model type, or not a model that can be built.
    """
    path = folder / CONFIG
    fields = read_json(path)
    kind = fields.get("model_type")
    if kind == VISION_TYPE:
        raise Failure(
            f"{folder}: is a model of images, and this is for models of text; sparsecli evaluate and bench take it"
        )
    if kind not in MODEL_TYPES:
        raise Failure(
            f"{path}: model type {kind!r} is not one of ours ({', '.join(MODEL_TYPES)}); "
            f"sparsecli import {folder} makes it one"
        )
    try:
        spec = ModelSpec.from_config(fields)
    except ValueError as error:
        raise Failure(f"{path}: {last_line(error)}") from error
    if kind != model_type(spec):
        raise Failure(f"{path}: model type {kind} does not fit its encoder; that of a {model_type(spec)}")
    ends = fields.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if any(type(token) is not int for token in ends):
        raise Failure(f"{path}: eos_token_id: expected a token's number or a list of them")
    dtype = str(fields.get("dtype"))
    dtype = dtype if dtype in ("bfloat16", "float16") else "float32"
    return Description(spec, frozenset(ends), dtype, imported=bool(fields.get("origin")))


def of_images(folder: Path) -> bool:
    """Whether the model in `folder` is one of images. Raises Failure where config.json cannot be read."""
    return read_json(folder / CONFIG).get("model_type") == VISION_TYPE


def read_vision_spec(folder: Path) -> VisionSpec:
    """The architecture of a model of images. Raises Failure where config.json does not describe one."""
    try:
        return VisionSpec.from_config(read_json(folder / CONFIG))
    except ValueError as error:
        raise Failure(f"{folder / CONFIG}: {last_line(error)}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: one, or the shards that its index names; the one where both are there, as
    transformers takes it, with a warning.

    Raises:
        Failure: the index is damaged or names a file outside of the folder, or a file is missing.
    """
    files = [folder / WEIGHTS]
    if files[0].is_file():
        if (folder / INDEX).is_file():
            warn_once(f"{folder}: {WEIGHTS} is read, as transformers does; {INDEX} beside it is not")
        return files
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise Failure(f"{folder / INDEX}: has no weight_map")
        names = sorted({str(name) for name in shards.values()})
        for name in names:
            if name != Path(name).name or len(name) > LONGEST_NAME:
                raise Failure(f"{folder / INDEX}: shard {name[:60]!a} lies outside the model's folder")
        files = [folder / name for name in names]
    for path in files:
        if path.is_file():
            continue
        hint = ""
        if pickled := sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt")):
            hint = f" ({pickled[0].name} is a pickle, which is never loaded)"
        elif (folder / PACKED).is_file():
            hint = f" ({PACKED} is packed for the native engine, and for it alone; name the model it was made from)"
        raise Failure(f"{path}: no such file{hint}")
    return files


def check_weights(folder: Path, spec: AnySpec) -> None:
    """Compare the headers of the weight files with `spec`, before anything is loaded.

    Raises:
        Failure: a file is missing, cut short or damaged, or its tensors are not those of `spec`.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Shape] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise Failure(f"{path}: cut short or damaged ({last_line(error)}); copy it again") from error
    if not (folder / WEIGHTS).is_file() and not isinstance(read_json(folder / INDEX).get("metadata"), dict):
        raise Failure(f"{folder / INDEX}: has no metadata, which transformers reads")
    expected = vision_tensor_shapes(spec) if isinstance(spec, VisionSpec) else tensor_shapes(spec)
    if isinstance(spec, ModelSpec) and spec.tied and "head.weight" in expected:
        found.setdefault("head.weight", expected["head.weight"])
    for problem, names in (
        ("misses", expected.keys() - found.keys()),
        ("has unknown", found.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise Failure(
                f"{folder}: {problem} tensor {min(names)}{more}; weights and config.json do not belong together"
            )
    for name, shape in expected.items():
        if found[name] != shape:
            raise Failure(f"{folder}: tensor {name} is {found[name]}, config.json asks for {shape}")


def fingerprint(files: Iterable[Path]) -> str:
    """What changes when one of the files does: names, sizes and times of writing."""
    facts = [(path.name, found.st_size, found.st_mtime_ns) for path in files for found in [path.stat()]]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def cache_place(path: Path, name: str) -> Path:
    """Where something that was made of `path` is kept under `name` in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsecli"
    return cache / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}-{name}"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a byte-order mark before it is none of it.

    Raises:
        Failure: there is no such file, or it holds something else.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise Failure(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise Failure(f"{path}: does not load: byte {error.start} is not UTF-8 text") from error
    except (ValueError, OSError) as error:
        raise Failure(f"{path}: does not load: {error}") from error
    if not isinstance(value, dict):
        raise Failure(f"{path}: expected a JSON object")
    return value


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON document that others may have written.

    Raises:
        ValueError: it is none, is nested deeper than `MOST_NESTED`, or has a whole number that no float can hold.
    """
    try:
        value = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("is nested too deep") from None
    level = [value]
    for _ in range(MOST_NESTED):
        level = [
            child for each in level if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
        ]  # fmt: skip
    if level:
        raise ValueError("is nested too deep")
    return value


def _whole_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def last_line(error: Exception) -> str:
    """What an error of a library says in the end: the line that names the reason."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8 text"
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
