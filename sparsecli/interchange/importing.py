"""`sparsecli import`: writes a foreign checkpoint as a model folder of ours, tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.interchange.architectures import NO_TOKENS, ForeignTensor
from sparsecli.interchange.safetensors_files import TensorReader, check_finite, write_shards
from sparsecli.interchange.sources import GENERATION, ForeignModel, OwnModel, open_source
from sparsecli.interchange.stored_weights import stored_weights
from sparsecli.model.card import Card, public
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.files import check_weights
from sparsecli.model.outputs import check_new, written_beside
from sparsecli.model.sizes import count_parameters
from sparsecli.model.tensors import Shape, tensor_shapes
from sparsecli.model.tokenizer import Tokenizer, read_tokenizer
from sparsecli.spec.model import ModelSpec, QuantizationSpec

if TYPE_CHECKING:
    from sparsecli.interchange.gguf_file import GgufPart

ImportType = Literal["auto", "float32", "bfloat16"]
"""The type of imported weights; `auto` is what the checkpoint has."""

POSITIONS = "model.position_embedding"
"""A table that is added to the stream, for which there are no codes."""
MIN_TOKENIZER_SHARE = 0.75
"""Least share of a model's vocabulary that its tokenizer must cover."""

FLOAT32_MATRICES = ("position_embedding", "router")
"""Small ones, which GGUF files have in float32 whatever the others are."""

UNUSED_TOKENS = ("bos_token_id", "pad_token_id")
"""Special tokens that no computation depends on."""


def run(
    *,
    source: str,
    output: Path,
    revision: str | None = None,
    dtype: ImportType = "auto",
    dry_run: bool = False,
) -> None:
    """The `import` command.

    Raises:
        Failure: no such model, one that ours cannot express, damaged or incomplete weights, a tokenizer that does not
            match, or an output that is there already or cannot be written.
    """
    opened = open_source(source, revision, weights=not dry_run)
    if isinstance(opened, OwnModel):
        raise Failure(f"{source}: is a model of ours already; every command takes it as it is")
    check_new(output)
    if dry_run:
        _print_import_plan(opened, output)
        return
    write_model(opened, output, dtype)
    parameters = count_parameters(opened.spec).total
    console.say(
        f"wrote {output} ({parameters:,} parameters); sparsecli generate --model {output} --prompt ..."
    )


def model_folder(opened: OwnModel | ForeignModel, into: Path, keeps_types: bool = False) -> Path:
    """A model folder of ours for what was opened: its own, or `into`, where it is imported unless it is there.

    Args:
        keeps_types: weights that a GGUF file has quantized keep their codes; else they are dequantized.

    Raises:
        Failure: as `write_model`; or `into` holds something else.
    """
    if isinstance(opened, OwnModel):
        return opened.folder
    if not into.exists():
        write_model(opened, into, "float32" if opened.gguf and not keeps_types else "auto")
    elif ScalingTransformerConfig.from_pretrained(into).origin != _origin_facts(opened):
        raise Failure(f"{into}: already exists, and is not an import of {opened.reference}")
    return into


def write_model(source: ForeignModel, output: Path, dtype: ImportType = "auto") -> None:
    """Write a model folder, which is complete or absent.

    With `auto` weights keep their type, and those that a GGUF file has quantized their codes. Tensors whose values
    change (Gemma's norms) become float32, and so do float16 vectors.

    Raises:
        Failure: tensors are missing, too many, of a wrong shape or not finite, the tokenizer does not match, or the
            folder cannot be written.
    """
    try:
        spec, tensors = _gguf_tensors(source, dtype) if source.gguf else _tensors(source, dtype)
        with written_beside(output) as folder:
            source.write_tokenizer(folder)
            tokenizer = _tokenizer(source, folder)
            _write_description(source, spec, folder, tokenizer, _type_of_matrices(tensors))
            _check_tokens(source, folder, tokenizer)
            write_shards(
                folder,
                tensors,
                size=lambda tensor: tensor.nbytes,
                make=lambda tensor: tensor.make(),
                description="importing tensors",
            )
            check_weights(folder, spec)
            _card(source).write(folder, output.name)
    except Failure as failure:
        if failure.message.startswith((str(source.path), str(output))):
            raise
        raise Failure(f"{source.path}: {failure.message}") from failure


def _card(source: ForeignModel) -> Card:
    facts = [
        ("source", public(source.reference) + (f", revision {source.revision}" if source.revision else "")),
        ("architecture", source.architecture.class_name),
        ("parameters", f"{count_parameters(source.spec).total:,}"),
        ("weights of the source", stored_weights(source)),
    ]
    name = source.reference if source.revision else None  # a path on this machine says nothing to others
    summary = "A checkpoint in sparsecli's form: it computes what the source computes."
    return Card(summary, facts, license=source.license, base_model=name)


@dataclass(frozen=True)
class ImportedTensor:
    """A tensor that is to be written, or several that one of the checkpoint's holds.

    Attributes:
        names: of the tensors that `make` gives.
        dtype: None of codes.
        matrix: whether it is one, and no vector.
    """

    names: tuple[str, ...]
    nbytes: int
    dtype: torch.dtype | None
    matrix: bool
    make: Callable[[], Mapping[str, Tensor]]


def _type_of_matrices(tensors: list[ImportedTensor]) -> torch.dtype:
    """The type of all matrices that a token reads, else that of the first tensor if it is bfloat16, else float32."""
    types = {
        tensor.dtype
        for tensor in tensors
        if tensor.dtype and tensor.matrix and not any(part in tensor.names[0] for part in FLOAT32_MATRICES)
    }
    if len(types) == 1:
        return types.pop()
    return torch.bfloat16 if tensors[0].dtype == torch.bfloat16 else torch.float32


def _gguf_tensors(source: ForeignModel, dtype: ImportType) -> tuple[ModelSpec, list[ImportedTensor]]:
    """The tensors of a GGUF file, and the architecture with the types of those that keep their codes."""
    assert source.gguf
    parts = source.gguf.parts(source.spec)
    expected = tensor_shapes(source.spec)
    if source.spec.tied:
        del expected["head.weight"]
    _check_names(expected, {part.name: part.name for part in parts})
    found: list[ImportedTensor] = []
    kept: dict[str, str] = {}
    for part in parts:
        if part.shape != expected[part.name]:
            raise Failure(
                f"tensor {part.tensor.name} is {part.shape}, its metadata asks for {expected[part.name]}"
            )
        module, _, ending = part.name.rpartition(".")
        matrix = ending == "weight" and len(part.shape) == 2 and module != POSITIONS
        if dtype == "auto" and part.kind and matrix:
            kept[module] = part.kind.name
            nbytes = math.prod(part.kind.panel_shape(*part.shape))
            names = (f"{module}.codes",)
            found.append(ImportedTensor(names, nbytes, None, True, partial(_codes, part, module)))
            continue
        type_ = _narrow_matrix(part.dtype, part.shape)
        if dtype == "bfloat16" and len(part.shape) == 2:
            type_ = torch.bfloat16
        if dtype == "float32":
            type_ = torch.float32
        nbytes, several = math.prod(part.shape) * type_.itemsize, len(part.shape) > 1
        found.append(ImportedTensor((part.name,), nbytes, type_, several, partial(_floats, part, type_)))
    return source.spec.model_copy(
        update={"quantization": QuantizationSpec.model_validate({"gguf": kept})}
    ), found


def _codes(part: GgufPart, module: str) -> Mapping[str, Tensor]:
    return {f"{module}.codes": part.codes()}


def _floats(part: GgufPart, dtype: torch.dtype) -> Mapping[str, Tensor]:
    return {part.name: part.floats().to(dtype)}


class GgufWeights(Mapping[str, np.ndarray]):
    """The weights of a GGUF file, by our names, as `decode.packed.pack` takes them: quantized ones as codes, bfloat16
    as uint16. Each is made when it is asked for.

    Attributes:
        spec: the architecture, with the types of the modules that keep their codes.

    Raises:
        Failure: tensors are missing, too many, or of a wrong shape; not finite, when one is asked for.
    """

    def __init__(self, source: ForeignModel) -> None:
        self.spec, tensors = _gguf_tensors(source, "auto")
        self._tensors = {name: tensor for tensor in tensors for name in tensor.names}

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name].make()[name]
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(np.uint16)
        return tensor.numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _tensors(source: ForeignModel, dtype: ImportType) -> tuple[ModelSpec, list[ImportedTensor]]:
    """The tensors of a Hugging Face folder."""
    tensors = source.tensors()
    parts = source.architecture.foreign_tensors(source.spec)
    names = _check_tensors(source, parts, tensors)
    found: list[ImportedTensor] = []
    for part in parts:
        kept = _stored_type(part, tensors.types[names[part.name]], dtype)
        make = partial(_to_ours, source, part, names[part.name], tensors, kept)
        nbytes, matrix = part.elements * kept.itemsize, len(part.shape) > 1
        found.append(ImportedTensor(part.ours, nbytes, kept, matrix, make))
    return source.spec, found


def _check_tensors(
    source: ForeignModel, expected_tensors: list[ForeignTensor], tensors: TensorReader
) -> dict[str, str]:
    """Names in the checkpoint by the names of the architecture's tensors."""
    names = source.architecture.canonical_names(list(tensors.shapes))
    expected = {tensor.name: tensor.shape for tensor in expected_tensors}
    if source.spec.tied and "lm_head.weight" in names:  # a copy of the embedding, which some files hold too
        embedding, head = (
            tensors.read(names[expected_tensors[0].name]),
            tensors.read(names.pop("lm_head.weight")),
        )
        if not torch.equal(embedding, head):
            raise Failure("tie_word_embeddings: true, but lm_head.weight is not the embedding")
    _check_names(expected, names)
    for name, shape in expected.items():
        if tensors.shapes[names[name]] != shape:
            raise Failure(f"tensor {name} is {tensors.shapes[names[name]]}, config.json asks for {shape}")
    return names


def _check_names(expected: Mapping[str, Shape], names: Mapping[str, str]) -> None:
    for problem, wrong in (
        ("misses", expected.keys() - names.keys()),
        ("has unknown", names.keys() - expected.keys()),
    ):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise Failure(
                f"{problem} tensor {min(wrong)}{more}; weights and config.json do not belong together"
            )


def _stored_type(part: ForeignTensor, stored: torch.dtype, dtype: ImportType) -> torch.dtype:
    """The type in which a tensor is written."""
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bfloat16" and len(part.shape) == 2 else torch.float32
    return torch.float32 if part.layout.changes_values else _narrow_matrix(stored, part.shape)


def _narrow_matrix(stored: torch.dtype, shape: Shape) -> torch.dtype:
    """The type in which a tensor that is stored in some type is kept: vectors that are float16 would be too coarse."""
    return torch.float32 if stored == torch.float16 and len(shape) == 1 else stored


def _to_ours(
    source: ForeignModel, part: ForeignTensor, name: str, tensors: TensorReader, kept: torch.dtype
) -> Mapping[str, Tensor]:
    foreign = tensors.read(name)
    check_finite(part.name, foreign)
    if tuple(foreign.shape) != part.shape:
        raise Failure(
            f"tensor {part.name} is {tuple(foreign.shape)}, its configuration asks for {part.shape}"
        )
    return {
        ours: tensor.to(kept)
        for ours, tensor in zip(part.ours, part.layout.to_ours(foreign, source.spec), strict=True)
    }


def _origin_facts(source: ForeignModel) -> dict[str, Any]:
    """The facts that `export` needs to restore the original."""
    return {
        "source": source.reference,
        "revision": source.revision,
        "architecture": source.architecture.class_name,
        "config": source.config,
    }


def _write_description(
    source: ForeignModel, spec: ModelSpec, folder: Path, tokenizer: Tokenizer, stored: torch.dtype
) -> None:
    size, generation = spec.vocabulary.size, source.generation()
    stated = [generation, source.config]  # transformers generates by the first
    special = {
        name: next((fields[name] for fields in stated if fields.get(name) is not None), None)
        for name in NO_TOKENS
    }
    for name, given in special.items():
        for token in given if isinstance(given, list) and name == "eos_token_id" else [given]:
            if token is not None and type(token) is not int:
                raise Failure(f"{source.path}: {name}: expected the number of a token, got {token!r}")
    for (
        name
    ) in UNUSED_TOKENS:  # old conversions of Llama pad with -1, others with a token that was never trained
        if isinstance(token := special[name], int) and not 0 <= token < size:
            console.warn(
                f"{source.path}: {name}: {token} is not one of the model's {size} tokens; it is omitted"
            )
            special[name] = None
            generation = {key: value for key, value in generation.items() if key != name}
    # A chat model's tokenizer may end turns with a token that its configuration does not name.
    ends = special["eos_token_id"]
    ends = {*(ends if isinstance(ends, list) else [] if ends is None else [ends]), *tokenizer.end}
    special["eos_token_id"] = sorted(ends) if len(ends) > 1 else next(iter(ends), None)
    config = ScalingTransformerConfig.from_spec(
        spec,
        **special,
        architectures=["ScalingTransformerForCausalLM"],
        dtype=str(stored).removeprefix("torch."),
        origin=_origin_facts(source),
    )
    config.save_pretrained(folder)
    if generation:
        generation["eos_token_id"] = special["eos_token_id"]
        (folder / GENERATION).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def check_source_tokenizer(source: OwnModel | ForeignModel) -> None:
    """Raise Failure if the tokenizer is missing, damaged, or not that of the model."""
    if isinstance(source, OwnModel):
        read_tokenizer(source.folder, source.spec.vocabulary.size)
        return
    with TemporaryDirectory() as folder:
        source.write_tokenizer(Path(folder))
        _tokenizer(source, Path(folder))


def _tokenizer(source: ForeignModel, folder: Path) -> Tokenizer:
    """The tokenizer of the model, which was written to `folder`. Raises Failure as `check_source_tokenizer` does.

    Vocabularies are often padded to a round number, so the model may have a few more tokens.
    """
    size = source.spec.vocabulary.size
    try:
        tokenizer = read_tokenizer(folder, size)
    except Failure as failure:
        raise Failure(failure.message.replace(str(folder), str(source.path))) from failure
    if len(tokenizer) < MIN_TOKENIZER_SHARE * size:
        raise Failure(
            f"{source.path}: the tokenizer has {len(tokenizer)} tokens, the model {size}; they do not belong together"
        )
    return tokenizer


def _check_tokens(source: ForeignModel, folder: Path, tokenizer: Tokenizer) -> None:
    """Raise Failure if a special token is not one of the tokenizer's."""
    size = source.spec.vocabulary.size
    config = ScalingTransformerConfig.from_pretrained(folder)
    for name in NO_TOKENS:
        given = getattr(config, name)
        for token in given if isinstance(given, list) else [given]:
            if token is not None and not 0 <= token < min(len(tokenizer), size):
                raise Failure(f"{name}: {token} is not one of the {len(tokenizer)} tokens of the tokenizer")


def _print_import_plan(source: ForeignModel, output: Path) -> None:
    spec = source.spec
    console.print_table(
        ["plan", ""],
        [
            (
                "source",
                source.reference if source.revision is None else f"{source.reference} at {source.revision}",
            ),
            ("architecture", source.architecture.class_name),
            ("parameters", f"{count_parameters(source.spec).total:,}"),
            ("layers", f"{spec.layers} of width {spec.d_model}, {spec.heads} heads of {spec.width_of_head}"),
            ("context", f"{spec.max_positions:,} tokens"),
            ("files", f"config.json, weights and tokenizer in {output}"),
        ],
    )
