"""Finding a model on disk and loading it, with one clear line for whatever is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.logging import disable_progress_bar

from sparsecli.console import Failure
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.memory import move_to_huge_pages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RUNS = Path("runs")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def find_model(reference: str | None, output: Path | None = None) -> Path:
    """The model folder that `reference` (a run or a model folder) names.

    Without a reference: the model of the run at `output`, else of the newest finished run under `runs/`.

    Raises:
        Failure: there is none; the message says what to do.
    """
    if reference is not None:
        folder = Path(reference)
        if not folder.exists():
            raise Failure(f"{reference}: no such folder; expected a run directory or a model folder")
        for candidate in (folder / "model", folder):
            if (candidate / "config.json").is_file():
                return candidate
        raise Failure(
            f"{reference}: holds no model (no config.json); a run has one when its training is finished"
        )
    if output is not None:
        if (output / "model" / "config.json").is_file():
            return output / "model"
        raise Failure(f"{output}: holds no finished model; train one first, or name another with --model")
    finished = [path.parent for path in RUNS.glob("*/model/config.json")]
    if not finished:
        raise Failure(
            "no finished run under runs/; train one (sparsecli train quickstart) or pass --model DIR"
        )
    return max(finished, key=lambda folder: (folder / "config.json").stat().st_mtime)


def load_model(
    folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[ScalingTransformerForCausalLM, PreTrainedTokenizerBase]:
    """The model in evaluation mode and its tokenizer.

    Raises:
        Failure: a file is missing, cut short or damaged, tensors do not fit the configuration, or the vocabulary
            does not fit the model.
    """
    config = read_config(folder)
    _check_weights(folder, config)
    disable_progress_bar()  # what progress there is to show, the console shows
    model = ScalingTransformerForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise Failure(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}; "
            "they do not belong together"
        )
    move_to_huge_pages(model)
    return model.eval(), tokenizer


def read_config(folder: Path) -> ScalingTransformerConfig:
    """The configuration in `folder`.

    Raises:
        Failure: not readable, of another model type, or not a model that can be built.
    """
    path = folder / "config.json"
    fields = _read_json(path)
    kind = fields.get("model_type")
    if kind != ScalingTransformerConfig.model_type:
        raise Failure(
            f"{path}: model type {kind!r} is not one of ours ({ScalingTransformerConfig.model_type})"
        )
    try:
        return ScalingTransformerConfig.from_dict(fields)
    except Exception as error:  # transformers wraps what its validation raises
        raise Failure(f"{path}: {_last_line(error)}") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved in `folder`.

    Raises:
        Failure: there is none, or it does not load.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise Failure(f"{folder}: no tokenizer.json; the tokenizer belongs beside the model")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file
        raise Failure(f"{folder}/tokenizer.json: does not load: {_last_line(error)}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Failure(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise Failure(f"{path}: does not load: {error}") from error
    if not isinstance(value, dict):
        raise Failure(f"{path}: expected a JSON object")
    return value


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: one, or the shards that its index names."""
    if (folder / INDEX).is_file():
        shards = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise Failure(f"{folder / INDEX}: has no weight_map")
        names = sorted({str(name) for name in shards.values()})
        for name in names:
            if name != Path(name).name:
                raise Failure(f"{folder / INDEX}: shard {name!r} lies outside the model's folder")
        return [folder / name for name in names]
    return [folder / WEIGHTS]


def _check_weights(folder: Path, config: ScalingTransformerConfig) -> None:
    """Compare the files' headers with the model on the meta device, before anything is loaded."""
    found: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        if not path.is_file():
            pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
            hint = f" ({pickled[0].name} is a pickle, which is never loaded)" if pickled else ""
            raise Failure(f"{path}: no such file{hint}")
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise Failure(f"{path}: cut short or damaged ({_last_line(error)}); copy it again") from error
    with torch.device("meta"):
        model = ScalingTransformerForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
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
