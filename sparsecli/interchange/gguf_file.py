"""Reading GGUF files by transformers' own rules; weights are dequantized one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecli.console import Failure
from sparsecli.interchange.architectures import NO_TOKENS, architecture_of
from sparsecli.interchange.sentencepiece_tokenizer import SentencePieceVocabulary
from sparsecli.model.files import last_line
from sparsecli.spec.base import MOST_LAYERS

SPECIAL = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
SPECIAL_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
ENDS = ("eos", "eot", "eom")
"""Tokens that end a text: of the text, of a turn, of a message to a tool."""
UNREAD_SIZES = {
    "qwen3": {"head_dim": "attention.key_length"},
    "gpt2": {"n_positions": "context_length", "n_inner": "feed_forward_length"},
}
"""Sizes that transformers does not read from a GGUF file, by architecture."""

WRITTEN_AS = {"mistral": "llama"}
"""Architectures that llama.cpp writes with the tensor names of another."""

NOT_READ = {"falcon", "gptj", "olmoe", "phi3", "stablelm"}
"""Architectures that are imported from their original checkpoints alone."""

FREQUENCIES = "rope_freqs.weight"


def read_gguf_config(path: Path) -> dict[str, Any]:
    """The config.json that is equivalent to a GGUF file's metadata.

    Raises:
        Failure: the package `gguf` is missing, the file is damaged, or of an architecture or with rotary positions
            that transformers does not read from GGUF.
    """
    reader = _reader(path)
    try:
        return _config(path, reader)
    except Failure as failure:
        raise Failure(f"{path}: {failure.message}") from failure
    except Exception as error:  # the library raises whatever its parsers do
        raise Failure(f"{path}: does not load: {last_line(error)}") from error


def _config(path: Path, reader: Any) -> dict[str, Any]:
    from transformers import AutoConfig

    architecture = reader.fields.get("general.architecture")
    kind = "unknown" if architecture is None else str(architecture.contents())
    # transformers would ignore these, and the model would compute something else.
    scaling = reader.fields.get(f"{kind}.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none":
        raise Failure(f"{kind}.rope.scaling.type: {scaling.contents()!r}: import the original checkpoint")
    if any(tensor.name == FREQUENCIES for tensor in reader.tensors):
        raise Failure(f"{FREQUENCIES}: rotary frequencies of its own; import the original checkpoint")
    if kind in WRITTEN_AS:
        raise Failure(
            f"general.architecture: {kind!r} is written as {WRITTEN_AS[kind]!r} by llama.cpp, with the order of rows "
            "that it reads; import the original checkpoint"
        )
    if kind in NOT_READ:
        raise Failure(
            f"general.architecture: {kind!r} is not supported in GGUF files; import the original checkpoint"
        )
    blocks = reader.fields.get(f"{kind}.block_count")
    if blocks is not None and blocks.contents() > MOST_LAYERS:
        raise Failure(
            f"{kind}.block_count: {blocks.contents()} is more than {MOST_LAYERS}, the most that is taken"
        )
    architecture_of(kind)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    foreign = ("quantization_config", "_name_or_path", "_model_name_or_path")
    fields = {name: value for name, value in config.to_diff_dict().items() if name not in foreign}
    keys = {**SPECIAL, **{name: f"{kind}.{key}" for name, key in UNREAD_SIZES.get(kind, {}).items()}}
    read: dict[str, Any] = {
        name: int(reader.fields[key].contents()) for name, key in keys.items() if key in reader.fields
    }
    end_keys = (f"tokenizer.ggml.{end}_token_id" for end in ENDS)
    ends = {int(reader.fields[key].contents()) for key in end_keys if key in reader.fields}
    if ends:
        read["eos_token_id"] = sorted(ends) if len(ends) > 1 else ends.pop()
    return {**fields, **read, "architectures": [architecture_of(config.model_type).class_name]}


def read_gguf_vocabulary(path: Path) -> tuple[SentencePieceVocabulary, dict[str, Any]] | None:
    """The SentencePiece vocabulary of a GGUF file, and settings as in a tokenizer_config.json; None if it has none.

    Raises:
        Failure: as `read_gguf_config`.
    """
    fields = _reader(path).fields

    def value(name: str, default: Any = None) -> Any:
        return fields[name].contents() if name in fields else default

    if value("tokenizer.ggml.model") != "llama":
        return None
    texts, scores, kinds = (
        value(f"tokenizer.ggml.{name}", []) for name in ("tokens", "scores", "token_type")
    )
    if not len(texts) == len(scores) == len(kinds):
        raise Failure(f"{path}: tokenizer.ggml: tokens, scores and token_type differ in length")
    pieces = SentencePieceVocabulary(
        texts,
        scores,
        kinds,
        prefix=value("tokenizer.ggml.add_space_prefix", True),
        squeezed=value("tokenizer.ggml.remove_extra_whitespaces", False),
        characters=bytes(value("tokenizer.ggml.precompiled_charsmap", [])),
    )
    numbers = {name: value(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL_NAMES.items()}
    settings = {
        name: texts[number] for name, number in numbers.items() if number is not None and number < len(texts)
    }
    for name in ("add_bos_token", "add_eos_token"):
        if (given := value(f"tokenizer.ggml.{name}")) is not None:
            settings[name] = given
    if template := value("tokenizer.chat_template"):
        settings["chat_template"] = template
    return pieces, settings


class GgufTensorReader:
    """The tensors of a GGUF file as float32, under their names in transformers.

    Args:
        config: from `read_gguf_config`.
    Raises:
        Failure: as `read_gguf_config`.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        reader = _reader(path)
        try:
            known = AutoConfig.for_model(**{**config, **NO_TOKENS})
            rules = TENSOR_PROCESSORS.get(reader.fields["general.architecture"].contents(), TensorProcessor)
            self.rules = rules(config=known.to_dict())
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(known)
            names = get_gguf_hf_weights_map(empty, self.rules, WRITTEN_AS.get(known.model_type))
        except Exception as error:  # the library raises whatever its parsers do
            raise Failure(f"{path}: does not load: {last_line(error)}") from error
        self.path = path
        self.stored = {names.get(tensor.name, tensor.name): tensor for tensor in reader.tensors}
        expected = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        self.shapes = {name: expected.get(name, _shape(tensor)) for name, tensor in self.stored.items()}
        self.types = dict.fromkeys(self.stored, torch.float32)

    def read(self, name: str) -> Tensor:
        """One tensor, dequantized.

        Raises:
            Failure: it is damaged, or of a type that the library does not dequantize.
        """
        from gguf import dequantize

        tensor = self.stored[name]
        processed: dict[str, dict[str, Tensor]] = {"tensors": {}}  # some rules put their result there
        try:
            weights = dequantize(tensor.data, tensor.tensor_type)
            made = self.rules.process(weights=weights, name=tensor.name, parsed_parameters=processed)
        except Exception as error:  # as above
            raise Failure(f"{self.path}: tensor {name} does not load: {last_line(error)}") from error
        if made.name is None:
            return next(iter(processed["tensors"].values())).float()
        return torch.from_numpy(np.array(made.weights, np.float32))


def _shape(tensor: Any) -> tuple[int, ...]:
    """The shape as in PyTorch: GGUF counts axes from the last."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise Failure(f"{path}: GGUF files need the package gguf: pip install 'sparsecli[gguf]'") from None
    try:
        return GGUFReader(path)
    except Exception as error:  # a damaged file fails wherever its bytes lead
        raise Failure(f"{path}: not a whole GGUF file: {last_line(error)}") from error
