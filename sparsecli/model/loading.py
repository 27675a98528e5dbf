"""Loading a model into torch, with one clear line for whatever is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from transformers.utils.logging import disable_progress_bar

from sparsecli.console import Failure
from sparsecli.model.auto import NETWORKS, Network
from sparsecli.model.configuration import CONFIGS, ScalingTransformerConfig
from sparsecli.model.files import (
    CONFIG,
    check_weights,
    last_line,
    model_type,
    read_description,
    read_json,
    read_vision_spec,
    weight_files,
)
from sparsecli.model.huge_pages import move_to_huge_pages
from sparsecli.model.tokenizer import TOKENIZER, check_fit, check_tokenizer
from sparsecli.model.vision import ScalingTransformerForImageClassification
from sparsecli.spec.model import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Network, PreTrainedTokenizerFast]:
    """The model in evaluation mode and its tokenizer.

    Raises:
        Failure: a file is missing, cut short or damaged, tensors do not fit the configuration, or the vocabulary
            does not fit the model.
    """
    network = load_network(folder, dtype)
    tokenizer = load_tokenizer(folder)
    check_fit(folder, tokenizer.backend_tokenizer, network.config.vocab_size)
    return network, tokenizer


def load_network(folder: Path, dtype: torch.dtype = torch.float32, spec: ModelSpec | None = None) -> Network:
    """The model in evaluation mode, without its tokenizer. Raises Failure as `load_model` does.

    Args:
        spec: another architecture that has the same weights, such as one that hashes where the model attends in full.
    """
    config = read_config(folder)
    check_weights(folder, config.spec)
    if spec is not None:
        config.update(spec.model_dump())
    disable_progress_bar()  # what progress there is to show, the console shows
    with _reported(folder):
        network = NETWORKS[config.model_type].from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True
        )
    move_to_huge_pages(network)
    return network.eval()


def load_classifier(
    folder: Path, dtype: torch.dtype = torch.float32
) -> ScalingTransformerForImageClassification:
    """A model of images in evaluation mode.

    Raises:
        Failure: a file is missing, cut short or damaged, or tensors do not fit the configuration.
    """
    check_weights(folder, read_vision_spec(folder))
    disable_progress_bar()
    with _reported(folder):
        network = ScalingTransformerForImageClassification.from_pretrained(
            folder, dtype=dtype, local_files_only=True
        )
    return network.eval()


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """Raise Failure for what transformers raises of fields that are its own, not ours."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise Failure(f"{folder / CONFIG}: does not load: {last_line(error)}") from error


def stored_dtype(folder: Path) -> torch.dtype:
    """bfloat16 where all weights are stored in it, but for integers; else float32, which holds all of them exactly."""
    types = set()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            types |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return torch.bfloat16 if types & {"BF16", "F16", "F32"} == {"BF16"} else torch.float32


def read_config(folder: Path) -> ScalingTransformerConfig:
    """The configuration in `folder`.

    Raises:
        Failure: not readable, of another model type, not a model that can be built, or one thing by our names of
            fields and another by those of transformers.
    """
    spec = read_description(folder).spec
    path = folder / CONFIG
    try:
        config = CONFIGS[model_type(spec)].from_dict(read_json(path))
    except Exception as error:  # transformers wraps what its validation raises
        raise Failure(f"{path}: {last_line(error)}") from error
    if config.spec != spec:
        names = [name for name in ModelSpec.model_fields if getattr(config.spec, name) != getattr(spec, name)]
        raise Failure(f"{path}: {names[0]}: another field, by transformers' name for it, says otherwise")
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in `folder`.

    Raises:
        Failure: there is none, or it does not load.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    check_tokenizer(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file
        raise Failure(f"{folder / TOKENIZER}: does not load: {last_line(error)}") from error
    for fact in ("is_local", "local_files_only"):  # of this loading: a saved tokenizer would keep them
        tokenizer.init_kwargs.pop(fact, None)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise Failure(f"{folder}: the tokenizer has no `tokenizers` version ({TOKENIZER})")
    return tokenizer
