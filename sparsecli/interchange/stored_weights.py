"""The weight types in which a source itself is stored, in words, for the reports of what is made of it."""

from __future__ import annotations

import math
from collections import Counter

from sparsecli.interchange.gguf_file import GgufSource
from sparsecli.interchange.gguf_reader import BFLOAT16, FLOATS
from sparsecli.interchange.sources import ForeignModel, OwnModel
from sparsecli.model.files import CONFIG, read_description, read_json
from sparsecli.model.gguf_types import TYPES

FLOAT_NAMES = {number: f"float{8 * int(layout[-1])}" for number, layout in FLOATS.items()} | {
    BFLOAT16: "bfloat16"
}
LEAST_SHARE = 0.005
FILE_TYPE = "general.file_type"


def stored_weights(source: OwnModel | ForeignModel) -> str:
    """The types of the source's matrices, with their shares of the weights if there are several.

    `Q4_K_M file: q4_k 58%, q6_k 42%` is a GGUF file, `bfloat16` a Hugging Face folder. What was rounded before favours
    methods that round alike, so a report names it beside its figures.

    Raises:
        Failure: the files do not load.
    """
    if isinstance(source, OwnModel):
        stored = read_description(source.folder).dtype
        origin = read_json(source.folder / CONFIG).get("origin") or {}
        return f"{stored}, imported from {origin['source']}" if "source" in origin else stored
    if source.gguf:
        return f"{_file_type(source.gguf.reader)}: {_shares(_gguf_counts(source.gguf.reader))}"
    tensors = source.tensors()
    counts = Counter[str]()
    for name, shape in tensors.shapes.items():
        if len(shape) > 1:
            counts[str(tensors.types[name]).removeprefix("torch.")] += math.prod(shape)
    return _shares(counts)


def _gguf_counts(reader: GgufSource) -> Counter[str]:
    counts = Counter[str]()
    names = FLOAT_NAMES | {kind.number: kind.name.lower() for kind in TYPES.values()}
    for tensor in reader.tensors.values():
        if len(tensor.shape) > 1:
            counts[names.get(tensor.kind) or _other_type(tensor.kind)] += math.prod(tensor.shape)
    return counts


def _other_type(number: int) -> str:
    from gguf import GGMLQuantizationType  # the reader refuses such types without the package

    return GGMLQuantizationType(number).name.lower()


def _file_type(reader: GgufSource) -> str:
    """The name by which llama.cpp distributes such a mix of types, if the file and the package `gguf` tell it."""
    try:
        from gguf import LlamaFileType

        name = LlamaFileType(reader.metadata.get(FILE_TYPE, -1)).name
    except (ImportError, ValueError):
        return "GGUF file"
    return f"{name.removeprefix('MOSTLY_').removeprefix('ALL_')} file"


def _shares(counts: Counter[str]) -> str:
    total = counts.total()
    if len(counts) == 1:
        return next(iter(counts))
    found = [(kind, count / total) for kind, count in counts.most_common()]
    return ", ".join(f"{kind} {share:.0%}" for kind, share in found if share > LEAST_SHARE)
