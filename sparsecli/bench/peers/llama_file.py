"""GGUF files of Llama-like dense models, for llama.cpp: with random weights, or with a model's own."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from sparsecli import console
from sparsecli.bench.peers.llama_shape import matrices, random_tile, repeated
from sparsecli.interchange.gguf_reader import GgufReader
from sparsecli.model.rotary import rotary_frequencies
from sparsecli.spec.model import ModelSpec, QuantizationSpec

TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
LEAST_SHARE = 0.005
MAKE_ROOM = "free some space, and start again"
NAMES = {
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "attention_norm": "attn_norm",
    "feed_forward_norm": "ffn_norm",
    "embedding": "token_embd",
    "norm": "output_norm",
}
"""llama.cpp's names, by the last part of our names."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a file, by llama.cpp's name; `shape` is in weights, (out, in)."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType

    @property
    def blocks(self) -> int:
        """Number of its blocks of weights that share a scale."""
        return math.prod(self.shape) // gguf.GGML_QUANT_SIZES[self.kind][0]

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.blocks * gguf.GGML_QUANT_SIZES[self.kind][1]


# -- random weights ------------------------------------------------------------------------------------------


def write_random(path: Path, spec: ModelSpec, dtype: str) -> None:
    """Write a file of random weights in `dtype`. Raises `Failure` if it cannot be written."""
    kind = TYPES[dtype]
    stored = [Stored(_matrix(name), shape, kind) for name, shape in matrices(spec).items()]
    names = ["output_norm"] + [f"blk.{n}.{part}_norm" for n in range(spec.layers) for part in ("attn", "ffn")]
    norms = [Stored(f"{name}.weight", (spec.d_model,), TYPES["float32"]) for name in names]

    check_room(path.parent, _size(stored + norms), "set TMPDIR to a folder with more room")

    def values() -> Iterable[np.ndarray]:
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        tile = gguf.quants.quantize(random_tile(), kind).view(np.uint8).reshape(-1, block_bytes)
        # Whole blocks, so that every tensor starts at a block of the tile.
        whole = tile.view(np.dtype((np.void, block_bytes))).ravel()
        for _, blocks in repeated(whole, {each.name: each.blocks for each in stored}):
            yield blocks.view(np.uint8)
        for _ in norms:
            yield np.ones(spec.d_model, dtype=np.float32)

    _write(path, spec, "llama", stored + norms, values())


def _matrix(name: str) -> str:
    if "." not in name:
        return {"embedding": "token_embd.weight", "head": "output.weight"}[name]
    block, part = name.split(".")
    return f"blk.{block}.{NAMES[part]}.weight"


# -- a model's own weights -----------------------------------------------------------------------------------


def unlike_llama(spec: ModelSpec) -> str | None:
    """The part of the model that llama.cpp has no architecture for; None if it can run the model."""
    feed_forward, attention, vocabulary = spec.feed_forward, spec.attention, spec.vocabulary
    if feed_forward.kind != "dense" or spec.quantization != QuantizationSpec():
        return "layers that are not dense"
    checks = {
        "units that are not gated SiLU": feed_forward.activation != "silu" or not feed_forward.gated,
        "biases in the feed-forward layers": feed_forward.bias,
        "attention that is not dense": (attention.projection, attention.output) != ("dense", "dense"),
        "queries of low rank": attention.query_key_rank is not None,
        "a bias after attention": attention.bias and attention.output_bias is not False,
        "norms of queries and biases together": attention.bias and attention.query_key_norm,
        "logits of another kind": vocabulary.kind != "dense" or vocabulary.bias,
        "layer norm": spec.normalization != "rms",
        "other than rotary positions": spec.positions != "rotary" or spec.rotary_fraction != 1,
        "scaled rotary positions": spec.rotary_scaling is not None and _architecture(spec) != "llama",
        "yarn or longrope positions": spec.rotary_scaling is not None
        and spec.rotary_scaling.kind in ("yarn", "longrope"),
        "parallel blocks": spec.parallel,
        "a scaled embedding": spec.embedding_scale != 1,
    }
    return next((what for what, there in checks.items() if there), spec.beyond_llama)


def write_weights(path: Path, spec: ModelSpec, weights: Mapping[str, Tensor]) -> None:
    """Write a file of `weights`, by our names, without a tied head: matrices as float16, vectors as float32.

    Raises `Failure` if it cannot be written.
    """
    stored = [
        Stored(_name(name), tuple(tensor.shape), TYPES["float16" if tensor.ndim == 2 else "float32"])
        for name, tensor in weights.items()
    ]
    factors = []
    if spec.rotary_scaling is not None:
        plain = rotary_frequencies(spec.model_copy(update={"rotary_scaling": None}))
        factors = [plain / rotary_frequencies(spec)]
        stored.append(Stored("rope_freqs.weight", factors[0].shape, TYPES["float32"]))
    check_room(path.parent, _size(stored), MAKE_ROOM)

    def values() -> Iterable[np.ndarray]:
        for name, tensor in weights.items():
            dtype = torch.float16 if tensor.ndim == 2 else torch.float32
            yield _in_their_order(name, tensor.detach().to(dtype).numpy(), spec)
        yield from factors

    _write(path, spec, _architecture(spec), stored, values())


def matrix_name(module: str, spec: ModelSpec) -> str:
    """llama.cpp's name of the matrix of a linear layer of ours, such as `model.layers.3.attention.projection.query`."""
    return _name("model.embedding.weight" if module == "head" and spec.tied else f"{module}.weight")


def _architecture(spec: ModelSpec) -> str:
    """llama.cpp's name of the architecture. Mistral is a `llama` there."""
    if spec.attention.query_key_norm:
        return "qwen3"
    return "qwen2" if spec.attention.bias else "llama"


def _name(ours: str) -> str:
    """llama.cpp's name of a tensor of ours."""
    if ours == "head.weight":
        return "output.weight"
    *path, part, suffix = ours.split(".")
    layer = f"blk.{path[2]}." if "layers" in path else ""
    return f"{layer}{NAMES[part]}.{suffix}"


def _in_their_order(name: str, values: np.ndarray, spec: ModelSpec) -> np.ndarray:
    """Reorder for RoPE: its `llama` rotates neighbouring elements of a head, ours element i with i + width / 2."""
    turned = name.split(".")[-2] in ("query", "key")
    if not turned or _architecture(spec) != "llama":
        return np.ascontiguousarray(values)
    halves = values.reshape(-1, 2, spec.width_of_head // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


# -- reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightsRead:
    """The weights of a GGUF file that a decoded token reads.

    Attributes:
        bytes: of all of them, the token's row of the embedding included.
        bits_per_weight: bytes times 8 over the number of weights, without that row.
        bytes_by_type: of every weight type, by its name in lower case, the largest first.
    """

    bytes: int
    bits_per_weight: float
    bytes_by_type: Mapping[str, int]

    @property
    def shares(self) -> str:
        """The types and their shares of the bytes, in words: `q4_k 58%, q6_k 42%`; without those below 0.5 %."""
        total = sum(self.bytes_by_type.values())
        shares = {kind: size / total for kind, size in self.bytes_by_type.items()}
        return ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items() if share > LEAST_SHARE)


def weights_read(path: Path) -> WeightsRead:
    """What a decoded token reads of the dense model in `path`.

    Logits are computed with the embedding if the file has no other matrix for them; else a token reads one row of it.
    Raises `Failure` if the file is damaged.
    """
    tensors = GgufReader(path).tensors
    row, weights, sizes = 0, 0, Counter[str]()
    for name, tensor in tensors.items():
        if name == "token_embd.weight" and "output.weight" in tensors:
            row = tensor.raw[0].nbytes
        elif name != "rope_freqs.weight":
            weights += math.prod(tensor.shape)
            sizes[gguf.GGMLQuantizationType(tensor.kind).name.lower()] += tensor.raw.nbytes
    return WeightsRead(sizes.total() + row, 8 * sizes.total() / weights, dict(sizes.most_common()))


# -- the file ------------------------------------------------------------------------------------------------


def _write(
    path: Path, spec: ModelSpec, architecture: str, stored: Sequence[Stored], values: Iterable[np.ndarray]
) -> None:
    """Write the tensors `stored` with their `values`, in order, without a tokenizer."""
    writer = gguf.GGUFWriter(path, architecture)
    _describe(writer, spec)
    for each in stored:
        writer.add_tensor_info(each.name, each.shape, np.dtype(np.float32), each.bytes, raw_dtype=each.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in values:
            writer.write_tensor_data(array)
    except OSError as error:
        raise console.Failure(f"{path}: cannot be written: {console.system_reason(error)}") from error
    finally:
        writer.close()


def check_room(folder: Path, size: int, hint: str) -> None:
    """Raise `Failure` unless a file of `size` bytes fits in `folder`; `hint` ends the message."""
    free = shutil.disk_usage(folder).free
    if free < 1.1 * size:
        raise console.Failure(
            f"{folder}: llama.cpp reads its model from a file of {size / 1e9:.1f} GB, {free / 1e9:.1f} GB "
            f"are free; {hint}"
        )


def _size(stored: Sequence[Stored]) -> int:
    return sum(each.bytes for each in stored)


def _describe(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    writer.add_vocab_size(spec.vocabulary.size)
    writer.add_tokenizer_model("none")
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.d_model)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.feed_forward.d_ff)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.attention.key_value_heads or spec.heads)
    writer.add_key_length(spec.width_of_head)
    writer.add_value_length(spec.width_of_head)
    writer.add_rope_dimension_count(spec.rotary_width)
    writer.add_rope_freq_base(spec.rotary_base)
    writer.add_layer_norm_rms_eps(spec.normalization_epsilon)
