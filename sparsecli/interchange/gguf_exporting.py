"""Models as GGUF files for llama.cpp: metadata from the architecture, tensors with their own codes, the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparsecli.console import Failure, progress
from sparsecli.interchange.byte_pair_tokenizer import byte_pair_metadata
from sparsecli.interchange.gguf_file import (
    ARCHITECTURES,
    ENDS,
    FILE_KINDS,
    FREQUENCIES,
    LONG_FACTORS,
    NARROW,
    SHORT_FACTORS,
    SPECIAL,
    GgufArchitecture,
    GgufCheckpoint,
)
from sparsecli.interchange.gguf_reader import BFLOAT16, FLOAT16, FLOAT32, GgufReader, GgufTensor
from sparsecli.interchange.safetensors_files import TYPES as FLOAT_TYPES
from sparsecli.interchange.safetensors_files import SafetensorsReader, check_finite
from sparsecli.interchange.sources import read_architecture
from sparsecli.interchange.tensor_layouts import TensorLayout
from sparsecli.model.files import Description, weight_files
from sparsecli.model.gguf_types import TYPES, restore
from sparsecli.model.outputs import written_beside
from sparsecli.model.rotary import rotary_frequencies
from sparsecli.model.tensors import Shape, tensor_shapes
from sparsecli.model.tokenizer import GGUF_METADATA, read_tokenizer
from sparsecli.spec.model import ModelSpec, QuantizationSpec

if TYPE_CHECKING:
    from gguf import GGUFWriter

KEPT = ("tokenizer.", "general.")
"""Metadata of an imported file that its export has too."""
WRITTEN_ANEW = (
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
    "general.alignment",
)
WITHOUT_ORIGIN: tuple[str, ...] = ("llama", "qwen2", "qwen3", "gpt2")
"""Architectures that are tried for a model that was trained here, in this order."""
UNTIED = ("stablelm", "olmoe")
"""Architectures that llama.cpp does not load without a matrix for the logits."""
UNCOMPARED = {"dropout", "initialization", "quantization"}
"""Fields that change nothing that is computed, or that tensors express."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: its name, the tensors of ours that it holds, and for each its rows there (None: all)."""

    name: str
    ours: tuple[str, ...]
    shape: Shape
    rows: Sequence[np.ndarray] | None
    layout: TensorLayout | None = None
    values: np.ndarray | None = None
    """Of a tensor that ours have in the architecture, not among the weights."""


def export(folder: Path, model: Description, origin: Mapping[str, Any] | None, output: Path) -> str:
    """Write the model in `folder` to the GGUF file `output`, and return the name of its architecture there.

    Args:
        origin: the config.json of the model that was imported; None for a model that was not.

    Raises:
        Failure: the package gguf is missing, no architecture of GGUF expresses the model, its tokenizer has no place
            in such a file, the weights are damaged, or the file cannot be written.
    """
    try:
        import gguf
    except ImportError:
        raise Failure("GGUF files need the package gguf: pip install 'sparsecli[gguf]'") from None
    kind, stored = _architecture(folder, model.spec, origin)
    weights = Weights(folder, model.spec)
    kinds = {tensor.name: weights.kind(tensor) for tensor in stored}
    with written_beside(output, file=True) as beside:
        writer = gguf.GGUFWriter(beside, kind)
        for key, value in architecture_metadata(model.spec, kind).items():
            _add(writer, key, value)
        if any(number in weights.quantized for number in kinds.values()):
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_tokenizer(writer, folder, model)
        for tensor in stored:
            type_ = gguf.GGMLQuantizationType(kinds[tensor.name])
            block, size = gguf.GGML_QUANT_SIZES[type_]
            nbytes = math.prod(tensor.shape) // block * size
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=type_)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with progress("exporting tensors", len(stored)) as bar:
                for tensor in stored:
                    writer.write_tensor_data(weights.read(tensor, kinds[tensor.name]))
                    bar.advance()
        finally:
            writer.close()
    return kind


# -- the architecture ----------------------------------------------------------------------------------------


def _architecture(
    folder: Path, spec: ModelSpec, origin: Mapping[str, Any] | None
) -> tuple[str, list[StoredTensor]]:
    """The first architecture of GGUF that expresses `spec`, and its tensors: read again, they give the same one."""
    names = WITHOUT_ORIGIN
    if origin is not None:
        model_type = origin.get("model_type")
        names = tuple(kind for kind, rules in ARCHITECTURES.items() if model_type == rules.model_type)
        if not names:
            raise Failure(f"{folder}: was imported from {model_type}, for which no GGUF file can be written")
    reasons = []
    for kind in names:
        try:
            return FILE_KINDS.get(kind, kind), _checked(spec, kind)
        except Failure as failure:
            reasons.append(f"{kind} {failure.message.removeprefix('file: ')}")
    raise Failure(f"{folder}: no architecture of GGUF files expresses this model ({reasons[0]})")


def _checked(spec: ModelSpec, architecture: str) -> list[StoredTensor]:
    """The tensors of a file of this architecture. Raises `Failure` where such a file would be another model."""
    if spec.tied and architecture in UNTIED:
        raise Failure("needs logits with a matrix of their own")
    stored = _stored_tensors(spec, ARCHITECTURES[architecture])
    kind = FILE_KINDS.get(architecture, architecture)
    raw = {tensor.name: tensor.values for tensor in stored}
    tensors = {
        tensor.name: GgufTensor(tensor.name, FLOAT32, tensor.shape, _bytes(raw[tensor.name]))
        for tensor in stored
    }
    metadata = {"general.architecture": kind, **architecture_metadata(spec, kind)}
    described = GgufCheckpoint(Path("file"), SimpleNamespace(metadata=metadata, tensors=tensors))
    _, again = read_architecture(described.config)
    for name in ModelSpec.model_fields.keys() - UNCOMPARED:
        if not _same(getattr(spec, name), getattr(again, name)):
            raise Failure(f"has another {name}")
    return stored


def _bytes(values: np.ndarray | None) -> np.ndarray:
    return np.empty(0, np.uint8) if values is None else values.view(np.uint8)


def _same(one: Any, other: Any) -> bool:
    """Whether two values of a spec are equal; numbers up to the rounding to float32."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if hasattr(one, "model_fields") and type(one) is type(other):
        return all(_same(getattr(one, name), getattr(other, name)) for name in type(one).model_fields)
    return bool(one == other)


def architecture_metadata(spec: ModelSpec, kind: str) -> dict[str, Any]:
    """The metadata of an architecture, by their keys in the file of a `kind`; readers take those that they know."""
    norm = "layer_norm_rms_epsilon" if spec.normalization == "rms" else "layer_norm_epsilon"
    found: dict[str, Any] = {
        "vocab_size": spec.vocabulary.size,
        "context_length": spec.max_positions,
        "embedding_length": spec.d_model,
        "block_count": spec.layers,
        "feed_forward_length": spec.feed_forward.d_ff,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.key_value_heads,
        "attention.key_length": spec.width_of_head,
        "attention.value_length": spec.width_of_head,
        f"attention.{norm}": spec.normalization_epsilon,
    }
    if spec.feed_forward.kind == "mixture":
        units = spec.feed_forward.d_ff // spec.feed_forward.experts
        found |= {
            "feed_forward_length": units,
            "expert_feed_forward_length": units,
            "expert_count": spec.feed_forward.experts,
            "expert_used_count": spec.feed_forward.experts_per_token,
        }
    if kind == "granite":
        found |= {
            "embedding_scale": spec.embedding_scale,
            "residual_scale": spec.residual_scale,
            "attention.scale": spec.attention_scale,
            "logit_scale": 1 / spec.logit_scale,
        }
    if kind == "stablelm":
        found["use_parallel_residual"] = spec.parallel
    caps = {"attn": spec.attention.logit_softcap, "final": spec.logit_softcap}
    found |= {f"{name}_logit_softcapping": limit for name, limit in caps.items() if limit is not None}
    if spec.attention.window:
        found["attention.sliding_window"] = spec.attention.window
    if spec.positions == "rotary":
        found |= {"rope.dimension_count": spec.rotary_width, "rope.freq_base": spec.rotary_base}
        scaling = spec.rotary_scaling
        if scaling is not None and scaling.kind in ("linear", "yarn"):
            found |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
        if scaling is not None and scaling.kind in ("yarn", "longrope"):
            found["rope.scaling.original_context_length"] = scaling.original_positions
        if scaling is not None and scaling.kind == "longrope":
            found["rope.scaling.attn_factor"] = scaling.attention_factor
        if scaling is not None and scaling.kind == "yarn":
            found["rope.scaling.yarn_beta_fast"] = scaling.beta_fast
            found["rope.scaling.yarn_beta_slow"] = scaling.beta_slow
    return {f"{kind}.{key}": value for key, value in found.items()}


def _stored_tensors(spec: ModelSpec, rules: GgufArchitecture) -> list[StoredTensor]:
    """The tensors of the file; every one of ours is in exactly one of them."""
    shapes = tensor_shapes(spec.model_copy(update={"quantization": QuantizationSpec()}))
    if spec.tied:
        del shapes["head.weight"]
    found: list[StoredTensor] = []
    mixed: list[str] = []
    for name, module in rules.modules(spec):
        if len({spec.quantization.gguf.get(ours) for ours in module.ours}) > 1:
            mixed.append(name)
            continue
        if module.layout and module.ours[0] in shapes:
            empty = torch.empty(shapes.pop(module.ours[0]), device="meta")
            shape = tuple(module.layout.to_foreign([empty], spec).shape)
            found.append(StoredTensor(f"{name}.weight", module.ours, shape, None, module.layout))
        for ending in ("weight", "bias"):
            ours = tuple(f"{each}.{ending}" for each in module.ours)
            if all(each in shapes for each in ours):
                rows = module.rows(spec) if module.rows else None
                parts = [shapes.pop(each) for each in ours]
                shape = (sum(part[0] for part in parts), *parts[0][1:])
                found.append(StoredTensor(f"{name}.{ending}", ours, shape, rows))
    if shapes and mixed:
        raise Failure(f"holds queries, keys and values in one tensor {mixed[0]}, which has one type")
    if shapes:
        raise Failure(f"has no place for the tensor {min(shapes)}")
    if spec.rotary_scaling is not None and spec.rotary_scaling.kind == "llama3":
        plain = rotary_frequencies(spec.model_copy(update={"rotary_scaling": None}))
        divisors = (plain / rotary_frequencies(spec)).astype(np.float32)
        found.append(StoredTensor(FREQUENCIES, (), divisors.shape, None, values=divisors))
    if spec.rotary_scaling is not None and spec.rotary_scaling.kind == "longrope":
        for name, factors in (
            (LONG_FACTORS, spec.rotary_scaling.long_factor),
            (SHORT_FACTORS, spec.rotary_scaling.short_factor),
        ):
            found.append(StoredTensor(name, (), (len(factors),), None, values=np.array(factors, np.float32)))
    return found


# -- weights -------------------------------------------------------------------------------------------------


class Weights:
    """The weights of a model folder, as rows of a GGUF file.

    Raises:
        Failure: a file is missing, cut short or damaged.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self.spec = spec
        self.reader = SafetensorsReader(weight_files(folder), FLOAT_TYPES | {"U8": torch.uint8})
        self.shapes = tensor_shapes(spec.model_copy(update={"quantization": QuantizationSpec()}))
        self.codes = {
            f"{module}.weight": (f"{module}.codes", TYPES[name])
            for module, name in spec.quantization.gguf.items()
        }
        self.quantized = {kind.number for _, kind in self.codes.values()}

    def kind(self, tensor: StoredTensor) -> int:
        """The number of its type in GGUF. Vectors are float32, as llama.cpp's operations take them."""
        if tensor.ours and tensor.ours[0] in self.codes:
            return self.codes[tensor.ours[0]][1].number
        narrow = tensor.ours and len(tensor.shape) > 1
        kinds = {self.reader.types[name] for name in tensor.ours}
        if any(name.endswith("router.weight") for name in tensor.ours):
            return FLOAT32
        known = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
        return known.get(kinds.pop(), FLOAT32) if narrow and len(kinds) == 1 else FLOAT32

    def read(self, tensor: StoredTensor, kind: int) -> np.ndarray:
        """Its rows (rows, bytes of a row), in their order in the file.

        Raises:
            Failure: it holds a NaN or an infinity.
        """
        if tensor.values is not None:
            return tensor.values
        if tensor.layout:
            [name] = tensor.ours
            check_finite(name, found := self.reader.read(name))
            return _as(kind, tensor.layout.to_foreign([found], self.spec))
        parts = [self._rows(name, kind) for name in tensor.ours]
        if tensor.rows is None:
            return np.concatenate(parts)
        whole = np.empty((tensor.shape[0], *parts[0].shape[1:]), parts[0].dtype)
        for rows, part in zip(tensor.rows, parts, strict=True):
            whole[rows] = part
        return whole

    def _rows(self, name: str, kind: int) -> np.ndarray:
        if name in self.codes:
            codes, type_ = self.codes[name]
            rows, cols = self.shapes[name]
            stored = self.reader.read(codes).numpy()
            return stored if self._by_rows(name) else restore(type_, stored, rows, cols)
        found = self.reader.read(name)
        check_finite(name, found)
        return _as(kind, found)

    def _by_rows(self, name: str) -> bool:
        """Whether the codes of a matrix lie as in a file already."""
        return bool(self.spec.quantization.head_candidates) and name == f"{self.spec.head_module}.weight"


def _as(kind: int, tensor: torch.Tensor) -> np.ndarray:
    """Its numbers in a float type of GGUF, as bytes if they have 16 bits."""
    whole = tensor.contiguous()
    return whole.view(torch.uint8).numpy() if kind in NARROW else whole.float().numpy()


# -- the tokenizer -------------------------------------------------------------------------------------------


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add a value to the metadata, with the type that llama.cpp expects."""
    from gguf import GGUFValueType

    types = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    if isinstance(value, list):
        element = GGUFValueType.INT32 if type(value[0]) is int else types[type(value[0])]
        writer.add_key_value(key, value, GGUFValueType.ARRAY, element)
    else:
        writer.add_key_value(key, value, types[type(value)])


def _add_tokenizer(writer: GGUFWriter, folder: Path, model: Description) -> None:
    """Add the tokenizer: that of the GGUF file which was imported, else one of byte pairs as it is.

    Raises:
        Failure: there is none, or one that is not of byte pairs.
    """
    if (folder / GGUF_METADATA).is_file():
        _copy_metadata(GgufReader(folder / GGUF_METADATA), writer)
        return
    size = model.spec.vocabulary.size
    tokenizer = read_tokenizer(folder, size)
    try:
        facts = byte_pair_metadata(tokenizer.backend, size)
    except Failure as failure:
        raise Failure(f"{folder}: the tokenizer {failure.message}") from failure
    ids = {
        key: number
        for name, key in SPECIAL.items()
        if (number := tokenizer.backend.token_to_id(tokenizer.named.get(name, ""))) is not None
    }
    ends = sorted(model.end_tokens - {ids.get("eos")})
    if "eos" not in ids and ends:
        ids["eos"] = ends.pop(0)
    ids |= dict(zip(ENDS[1:], ends, strict=False))
    facts |= {f"{key}_token_id": number for key, number in ids.items() if number < size}
    facts |= {"add_bos_token": tokenizer.beginning == [ids.get("bos")]}
    for key, value in facts.items():
        _add(writer, f"tokenizer.ggml.{key}", value)
    if tokenizer.template is not None:
        writer.add_chat_template(tokenizer.template)


def _copy_metadata(reader: GgufReader, writer: GGUFWriter) -> None:
    from gguf import GGUFValueType

    for key, value in reader.metadata.items():
        if key.startswith(KEPT) and key not in WRITTEN_ANEW:
            kind, element = reader.kinds[key]
            writer.add_key_value(
                key, value, GGUFValueType(kind), None if element is None else GGUFValueType(element)
            )
