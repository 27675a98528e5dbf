"""llama.cpp through llama-cpp-python: a Llama-shaped model, written as GGUF and loaded at once."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import gguf
import llama_cpp
import numpy as np
from torch import Tensor

from sparsecli import console
from sparsecli.bench.peers.llama_shape import matrices, random_tile, repeated
from sparsecli.model.architecture import ModelSpec

TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
NAMES = {
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
CONTEXT_STEP = 256  # llama.cpp rounds its cache up to this
TRIAL_TOKENS = 8
ATTENTIONS = {"flash attention": 1, "plain attention": 0}


def refusal(spec: ModelSpec, dtype: str) -> str | None:
    """See `PeerModule.refusal`."""
    block, _ = gguf.GGML_QUANT_SIZES[TYPES[dtype]]
    if spec.d_model % block:
        return f"its blocks of {block} weights do not divide d_model {spec.d_model}"
    return None


# -- the file ------------------------------------------------------------------------------------------------


def write_model(path: Path, spec: ModelSpec, dtype: str) -> None:
    """A GGUF file of random weights without a tokenizer. Raises `Failure` when it cannot be written."""
    kind = TYPES[dtype]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    shapes = matrices(spec)
    blocks = {name: rows * width // block for name, (rows, width) in shapes.items()}
    size = sum(blocks.values()) * block_bytes
    free = shutil.disk_usage(path.parent).free
    if free < 1.1 * size:
        raise console.Failure(
            f"{path.parent}: llama.cpp reads its model from a file of {size / 1e9:.1f} GB, {free / 1e9:.1f} GB "
            "are free; set TMPDIR to a folder with more room"
        )
    tile = gguf.quants.quantize(random_tile(), kind).view(np.uint8).reshape(-1, block_bytes)
    whole = np.dtype(
        (np.void, block_bytes)
    )  # so that weights start at a block, wherever they start in the tile
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, spec)
    for name, (rows, width) in shapes.items():
        shape = rows, width // block * block_bytes
        writer.add_tensor_info(
            _tensor(name), shape, np.dtype(np.uint8), blocks[name] * block_bytes, raw_dtype=kind
        )
    norms = ["output_norm"] + [f"blk.{n}.{part}_norm" for n in range(spec.layers) for part in ("attn", "ffn")]
    ones = np.ones(spec.d_model, dtype=np.float32)
    for norm in norms:
        writer.add_tensor_info(f"{norm}.weight", ones.shape, ones.dtype, ones.nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, values in repeated(tile.view(whole).ravel(), blocks):
            writer.write_tensor_data(values.view(np.uint8))
        for _ in norms:
            writer.write_tensor_data(ones)
    except OSError as error:
        raise console.Failure(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        writer.close()


def _describe(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    writer.add_vocab_size(spec.vocabulary.size)
    writer.add_tokenizer_model("none")
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.d_model)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.feed_forward.d_ff)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.attention.key_value_heads or spec.heads)
    writer.add_rope_dimension_count(spec.d_model // spec.heads)
    writer.add_layer_norm_rms_eps(spec.normalization_epsilon)


def _tensor(name: str) -> str:
    """llama.cpp's name of a matrix."""
    if "." not in name:
        return {"embedding": "token_embd.weight", "head": "output.weight"}[name]
    block, part = name.split(".")
    return f"blk.{block}.{NAMES[part]}.weight"


# -- decoding ------------------------------------------------------------------------------------------------


def load(
    spec: ModelSpec, weights: Mapping[str, Tensor], dtype: str, capacity: int, threads: int
) -> LlamaDecoder:
    """See `PeerModule.load`. The file is gone when this returns or raises."""
    with tempfile.TemporaryDirectory(prefix="sparsecli-") as folder:
        path = Path(folder) / "model.gguf"
        write_model(path, spec, dtype)
        return LlamaDecoder(path, spec, capacity, threads)


SAID: deque[str] = deque(maxlen=200)
"""llama.cpp's latest messages, which it would print."""


@llama_cpp.llama_log_callback
def _listen(level: int, text: bytes, _: object) -> None:
    SAID.append(text.decode(errors="replace"))


class LlamaDecoder:
    """See `PeerDecoder`. The prefill tries both kinds of attention and keeps the faster."""

    def __init__(self, path: Path, spec: ModelSpec, capacity: int, threads: int) -> None:
        llama_cpp.llama_log_set(_listen, ctypes.c_void_p(0))
        options = llama_cpp.llama_model_default_params()
        # Not memory-mapped: the file is deleted, and its pages would be read from the disk again.
        options.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise console.Failure(f"llama.cpp cannot load its model: {_last_error()}")
        weakref.finalize(
            self, llama_cpp.llama_model_free, self.model
        )  # after the session's, which comes later
        self.vocabulary = spec.vocabulary.size
        self.capacity = -(-(capacity + TRIAL_TOKENS) // CONTEXT_STEP) * CONTEXT_STEP
        self.threads = threads
        self.context = 0
        self.session: Any = None
        self.free_session: Callable[[], object] = lambda: None
        self.settings = ""

    def prefill(self, tokens: Sequence[int]) -> None:
        """See `PeerDecoder.prefill`."""
        self.free_session()
        self.context = len(tokens)
        sessions = {name: self._session(kind) for name, kind in ATTENTIONS.items()}
        seconds = {name: self._try(session, tokens) for name, session in sessions.items()}
        best = min(seconds, key=lambda name: seconds[name])
        for name, session in sessions.items():
            if name != best:
                llama_cpp.llama_free(session)
        self.session = sessions[best]
        self.free_session = weakref.finalize(self, llama_cpp.llama_free, self.session)
        self.settings = (
            f"llama-cpp-python {version('llama-cpp-python')}, threads {self.threads}, {best}, float16 cache "
            f"for {self.capacity} tokens, not memory-mapped, repacked weights where it can"
        )
        self.rewind()

    def rewind(self) -> None:
        """See `PeerDecoder.rewind`."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.session), 0, self.context, -1)

    def step(self, token: int) -> tuple[int, None]:
        """See `PeerDecoder.step`."""
        return self._decode(self.session, [token]), None

    def _session(self, attention: int) -> Any:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = self.capacity
        options.n_threads = options.n_threads_batch = self.threads
        options.flash_attn_type = attention
        options.no_perf = True
        session = llama_cpp.llama_init_from_model(self.model, options)
        if not session:
            raise console.Failure(f"llama.cpp cannot start a sequence: {_last_error()}")
        return session

    def _try(self, session: Any, tokens: Sequence[int]) -> float:
        """Prefill, then seconds of a token."""
        token = self._decode(session, tokens)
        seconds = []
        for _ in range(TRIAL_TOKENS):
            start = time.perf_counter()
            token = self._decode(session, [token])
            seconds.append(time.perf_counter() - start)
        return median(seconds)

    def _decode(self, session: Any, tokens: Sequence[int]) -> int:
        """Add `tokens`; the greedy next one."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(session, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if status:
            raise console.Failure(f"llama.cpp cannot decode (status {status}): {_last_error()}")
        logits = llama_cpp.llama_get_logits_ith(session, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


def _last_error() -> str:
    lines = [line.strip() for line in "".join(SAID).splitlines() if "error" in line or "fail" in line]
    return lines[-1] if lines else "it gives no reason"
