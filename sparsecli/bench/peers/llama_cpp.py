"""llama.cpp through llama-cpp-python: quantizes and loads GGUF files, decodes, and reads prompts."""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import median

import gguf
import llama_cpp
import numpy as np
from torch import Tensor

from sparsecli import console
from sparsecli.bench.peers.llama_file import MAKE_ROOM, TYPES, check_room, write_random
from sparsecli.spec.model import ModelSpec

FILE_TYPES = {
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q6_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "q5_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q4_k_s": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "iq4_xs": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_XS,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
"""Kinds of files as they are distributed, those with the most bits first."""
CONTEXT_STEP = 256  # llama.cpp rounds its cache up to this
TRIAL_TOKENS = 8
ATTENTIONS = {"flash attention": 1, "plain attention": 0}


def refusal(spec: ModelSpec, dtype: str) -> str | None:
    """See `PeerModule.refusal`."""
    block, _ = gguf.GGML_QUANT_SIZES[TYPES[dtype]]
    if spec.d_model % block:
        return f"its blocks of {block} weights do not divide d_model {spec.d_model}"
    return None


def load(
    spec: ModelSpec, weights: Mapping[str, Tensor], dtype: str, capacity: int, threads: int
) -> LlamaDecoder:
    """See `PeerModule.load`. The file is deleted before this returns or raises."""
    with tempfile.TemporaryDirectory(prefix="sparsecli-") as folder:
        path = Path(folder) / "model.gguf"
        write_random(path, spec, dtype)
        return LlamaDecoder(LlamaModel(path, spec, threads), capacity)


def load_file(file: Path, spec: ModelSpec, capacity: int, threads: int) -> LlamaDecoder:
    """See `FilePeerModule.load_file`."""
    return LlamaDecoder(LlamaModel(file, spec, threads), capacity)


# -- files and sequences -------------------------------------------------------------------------------------


SAID: deque[str] = deque(maxlen=200)
"""llama.cpp's latest log messages, which are not printed."""


@llama_cpp.llama_log_callback
def _listen(level: int, text: bytes, _: object) -> None:
    SAID.append(text.decode(errors="replace"))


def quantise(
    source: Path,
    target: Path,
    dtype: str,
    threads: int,
    importance: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Quantize the float file `source` with llama.cpp, to `dtype`, one of FILE_TYPES.

    llama.cpp chooses the type of each matrix: a k-quant mixes several. If a type's blocks do not divide the rows of a
    matrix, it takes one with smaller blocks.

    Args:
        importance: the importance matrix: for each matrix, by llama.cpp's name, the mean square of each of its inputs
            (cols,). Errors of a weight are weighted with that of its input. The mix of types may depend on it.

    Raises:
        Failure: the disk is full, or llama.cpp refuses.
    """
    check_room(target.parent, source.stat().st_size, MAKE_ROOM)
    llama_cpp.llama_log_set(_listen, ctypes.c_void_p(0))
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread, options.ftype = threads, FILE_TYPES[dtype]
    if importance:
        squares = {name: np.ascontiguousarray(each, np.float32) for name, each in importance.items()}
        matrices = [
            llama_cpp.llama_model_imatrix_data(
                name.encode(), each.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), each.size
            )
            for name, each in squares.items()
        ]
        matrices.append(llama_cpp.llama_model_imatrix_data())  # without a name: the end
        options.imatrix = (llama_cpp.llama_model_imatrix_data * len(matrices))(*matrices)
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options):
        raise console.Failure(f"llama.cpp cannot make a {dtype} file: {_last_error()}")


class LlamaModel:
    """The model of a GGUF file. The file may be deleted after loading."""

    def __init__(self, path: Path, spec: ModelSpec, threads: int) -> None:
        _warn_if_threads_sleep()
        llama_cpp.llama_log_set(_listen, ctypes.c_void_p(0))
        options = llama_cpp.llama_model_default_params()
        # Not memory-mapped: the file is deleted, and its pages would be read from the disk again.
        options.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        self.handle = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.handle:
            raise console.Failure(f"llama.cpp cannot load its model: {_last_error()}")
        weakref.finalize(
            self, llama_cpp.llama_model_free, self.handle
        )  # after its sequences, which refer to it
        self.vocabulary = spec.vocabulary.size
        self.threads = threads


@cache
def _warn_if_threads_sleep() -> None:
    """Warn, once, if the environment makes llama.cpp's threads (OpenMP) sleep between operations: it then decodes up to
    three times more slowly than it can."""
    passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    if passive or os.environ.get("GOMP_SPINCOUNT", "").isdigit():
        console.warn(
            "OMP_WAIT_POLICY or GOMP_SPINCOUNT makes llama.cpp's threads sleep and its rows slow; unset them to compare"
        )


def settings(threads: int) -> str:
    """llama.cpp's version and settings."""
    return (
        f"llama-cpp-python {version('llama-cpp-python')}, threads {threads}, not memory-mapped, repacked weights "
        "where it can"
    )


class LlamaSequence:
    """A sequence with a float16 cache for `capacity` tokens; `attention` is one of ATTENTIONS."""

    def __init__(self, model: LlamaModel, capacity: int, attention: str = "plain attention") -> None:
        capacity = -(-capacity // CONTEXT_STEP) * CONTEXT_STEP
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = capacity
        options.n_threads = options.n_threads_batch = model.threads
        options.flash_attn_type = ATTENTIONS[attention]
        options.no_perf = True
        self.model, self.capacity, self.attention = model, capacity, attention
        self.handle = llama_cpp.llama_init_from_model(model.handle, options)
        if not self.handle:
            raise console.Failure(f"llama.cpp cannot start a sequence: {_last_error()}")
        weakref.finalize(self, llama_cpp.llama_free, self.handle)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.handle), 0, length, -1)

    def add(self, tokens: Sequence[int]) -> int:
        """Append `tokens` and return the greedy next one."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        self._decode(llama_cpp.llama_batch_get_one(array, len(tokens)))
        return int(self._logits(-1, 1).argmax())

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits (T, vocabulary) after each of the `tokens`, which begin a new sequence."""
        self.truncate(0)
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index], batch.pos[index] = token, index
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                batch.logits[index] = True
            self._decode(batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        return self._logits(0, len(tokens)).copy()

    def _decode(self, batch: llama_cpp.llama_batch) -> None:
        status = llama_cpp.llama_decode(self.handle, batch)
        if status:
            raise console.Failure(f"llama.cpp cannot decode (status {status}): {_last_error()}")

    def _logits(self, index: int, rows: int) -> np.ndarray:
        """A view of the logits from row `index` on, in llama.cpp's memory."""
        logits = llama_cpp.llama_get_logits_ith(self.handle, index)
        return np.ctypeslib.as_array(logits, (rows, self.model.vocabulary))


def _last_error() -> str:
    lines = [line.strip() for line in "".join(SAID).splitlines() if "error" in line or "fail" in line]
    return lines[-1] if lines else "it gives no reason"


# -- decoders ----------------------------------------------------------------------------------------


class LlamaDecoder:
    """See `PeerDecoder`. The prefill tries both kinds of attention and keeps the faster."""

    def __init__(self, model: LlamaModel, capacity: int) -> None:
        self.model = model
        self.capacity = capacity + TRIAL_TOKENS
        self.context = 0
        self.sequence: LlamaSequence | None = None
        self.settings = ""

    def prefill(self, tokens: Sequence[int]) -> None:
        """See `PeerDecoder.prefill`."""
        self.sequence = None
        self.context = len(tokens)
        tried = [LlamaSequence(self.model, self.capacity, attention) for attention in ATTENTIONS]
        seconds = [self._try(sequence, tokens) for sequence in tried]
        self.sequence = tried[int(np.argmin(seconds))]
        attention, room = self.sequence.attention, self.sequence.capacity
        self.settings = f"{settings(self.model.threads)}, {attention}, float16 cache for {room} tokens"
        self.rewind()

    def rewind(self) -> None:
        """See `PeerDecoder.rewind`."""
        self._prefilled.truncate(self.context)

    def step(self, token: int) -> tuple[int, None]:
        """See `PeerDecoder.step`."""
        return self._prefilled.add([token]), None

    def reader(self, length: int) -> LlamaReader:
        """See `PromptPeerDecoder.reader`."""
        return LlamaReader(self.model, length)

    @property
    def _prefilled(self) -> LlamaSequence:
        assert self.sequence, "decoding starts with a prefill"
        return self.sequence

    def _try(self, sequence: LlamaSequence, tokens: Sequence[int]) -> float:
        """Seconds of a token after a prefill."""
        token = sequence.add(tokens)
        seconds = []
        for _ in range(TRIAL_TOKENS):
            start = time.perf_counter()
            token = sequence.add([token])
            seconds.append(time.perf_counter() - start)
        return median(seconds)


class LlamaReader:
    """A `TimedDecoder` whose prefill only reads the prompt, with the attention that was faster in a trial."""

    def __init__(self, model: LlamaModel, length: int) -> None:
        self.vocabulary = model.vocabulary
        tried = [LlamaSequence(model, length, attention) for attention in ATTENTIONS]
        prompt = [index % self.vocabulary for index in range(length)]
        seconds = []
        for self.sequence in tried:
            self.prefill(prompt)  # the first run allocates memory
            start = time.perf_counter()
            self.prefill(prompt)
            seconds.append(time.perf_counter() - start)
        self.sequence = tried[int(np.argmin(seconds))]
        self.settings = f"{settings(model.threads)}, {self.sequence.attention}"
        self.rewind()

    def prefill(self, tokens: Sequence[int]) -> None:
        """See `TimedDecoder.prefill`."""
        self.rewind()
        self.sequence.add(tokens)

    def rewind(self) -> None:
        """Remove the prompt from the cache."""
        self.sequence.truncate(0)

    def step(self, token: int) -> tuple[int, None]:
        """See `TimedDecoder.step`."""
        return self.sequence.add([token]), None
