"""The native decode engine: a packed model, its sequences, and one C call for each step."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Sequence as Many

import numpy as np

from sparsecli.console import Failure
from sparsecli.decode import native
from sparsecli.decode.layout import crosses, joins, modules_of, query_modules_of
from sparsecli.decode.native import ERROR_BYTES, Shape
from sparsecli.decode.packing import PackedModel, plan
from sparsecli.decode.tensorfile import WIDTHS
from sparsecli.model.architecture import ModelSpec

MAX_THREADS = 256
INVALID = -2  # of sparsecli_forward: a token that does not exist
TYPE_CODES = {"float32": 0, "bfloat16": 1, "int8": 2}
FEW_BITS_CODES = {4: 3, 3: 4}  # native/kernels.h, by bits of a weight
ACTIVATIONS = ("relu", "gelu", "silu", "gelu_tanh")
FEED_FORWARDS = ("dense", "sparse", "mixture", "selector", "precision")
PROJECTIONS = ("dense", "multiplicative", "dense_conv", "multiplicative_conv")
OUTPUTS = ("none", "dense", "multiplicative", "multiplicative_conv")
POSITIONS = (
    "learned",
    "sinusoidal",
    "rotary",
)  # digits and coordinates are packed as a table, like learned ones
CONCATENATIONS = ("none", "modules", "whole")


class Engine:
    """Decodes with a packed model. Threads may share it, one call at a time; a forked child may not.

    Args:
        threads: threads of one step, the caller's included; by default one for each processor it may use.
        pin: tie each thread, the caller's too, to a processor of its own.
        profile: time the parts of every step, see `profile`.
        poison: fill working memory with NaN first, so that reading what was not written shows (tests).
    Raises:
        Failure: the native library cannot be used, memory or the system's threads do not suffice, or the model is
            beyond the engine's limits.
        ValueError: threads out of range, or tensors that do not fit the architecture.
    """

    def __init__(
        self,
        model: PackedModel,
        threads: int | None = None,
        *,
        pin: bool = False,
        profile: bool = False,
        poison: bool = False,
    ) -> None:
        if reason := native.available():
            raise Failure(f"the native engine cannot be used: {reason}")
        self.threads = min(processors(), MAX_THREADS) if threads is None else threads
        if not 1 <= self.threads <= MAX_THREADS:
            raise ValueError(f"threads: {threads} is not between 1 and {MAX_THREADS}")
        self.model = model  # its memory is the engine's
        self.vocabulary = model.spec.vocabulary.size
        self._library = native.library()
        self._error = ctypes.create_string_buffer(ERROR_BYTES)
        self._turn = threading.Lock()  # the library lets go of Python's lock, and has one working memory
        shape = _shape(model, poison)
        chosen = (ctypes.c_int64 * model.spec.layers)(*_units_per_block(model.spec))
        shape.units_per_block = ctypes.addressof(chosen)
        handle = self._library.sparsecli_create(ctypes.byref(shape), self.threads, pin, self._error)
        if not handle:
            raise Failure(f"the native engine cannot run this model: {self._message()}")
        self._handle = ctypes.c_void_p(handle)
        self._destroy = weakref.finalize(self, self._library.sparsecli_destroy, self._handle)
        self._bind()
        if profile:
            self._library.sparsecli_profile(self.handle, None)

    @property
    def handle(self) -> ctypes.c_void_p:
        """The library's engine. Raises ValueError once it is closed."""
        if not self._destroy.alive:
            raise ValueError("the engine is closed")
        return self._handle

    def close(self) -> None:
        """Give memory and threads back; so does the end of the object."""
        with self._turn:
            self._destroy()

    def _bind(self) -> None:
        tensors = self.model.tensors
        for slot, kind in plan(self.model.spec, self.model.precision):
            if slot.optional and slot.key not in tensors:
                continue
            if slot.key not in tensors:
                raise ValueError(f"{slot.key} is missing from the packed model")
            tensor = tensors[slot.key]
            if tensor.itemsize != WIDTHS[kind]:
                raise ValueError(f"{slot.key}: is {tensor.dtype}, expected {kind}")
            scale = tensors.get(f"{slot.key}.scale") if kind == "int8" else None
            scales = 0 if scale is None else min(scale.size, slot.scales)
            if scale is not None and scale.dtype != np.float32:
                raise ValueError(f"{slot.key}.scale: is {scale.dtype}, expected float32")
            address = None if scale is None else scale.ctypes.data
            bound = self._library.sparsecli_bind(
                self.handle,
                slot.layer,
                slot.name.encode(),
                tensor.ctypes.data,
                tensor.nbytes,
                FEW_BITS_CODES[slot.bits] if slot.bits else TYPE_CODES[kind],
                address,
                scales,
                self._error,
            )
            if bound < 0:
                raise ValueError(self._message())
        if self._library.sparsecli_ready(self.handle, self._error) < 0:
            raise ValueError(self._message())

    def _message(self) -> str:
        return self._error.value.decode(errors="replace")

    def sequence(self, capacity: int, source: int = 0) -> Sequence:
        """An empty sequence with room for `capacity` tokens, and for the `source` tokens that an encoder read.

        Raises:
            Failure: memory does not suffice, or hashed attention would have to choose among so many positions.
            ValueError: no room at all, or none for a source of a model with an encoder.
        """
        if not 1 <= capacity <= 1 << 30:
            raise ValueError(f"capacity: {capacity} is not between 1 and {1 << 30}")
        least = int(self.model.spec.encoder is not None)
        if not least <= source <= least << 30:
            raise ValueError(f"source: {source} is not between {least} and {least << 30}")
        positions = capacity + source * joins(self.model.spec)
        if (limit := exact_positions(self.model.spec)) and positions > limit:
            raise Failure(
                f"{positions} positions are more than the {limit} that every token of this model sees; its hashed "
                "attention is for PyTorch then (--backend torch)"
            )
        needed = self._library.sparsecli_sequence_bytes(self.handle, capacity, source)
        if needed > _available_memory():
            raise Failure(
                f"{positions} positions need {needed / 1e9:.1f} GB of cache, more than the memory that is left; "
                "use a shorter context or a narrower cache type"
            )
        handle = self._library.sparsecli_sequence_create(self.handle, capacity, source, self._error)
        if not handle:
            raise Failure(f"{positions} positions need {needed / 1e9:.1f} GB of cache: {self._message()}")
        return Sequence(self, ctypes.c_void_p(handle), capacity)

    def read_source(self, sequence: Sequence, source: np.ndarray) -> None:
        """Begin `sequence` anew with an encoder's output (L, d), or its two streams (2, L, d).

        Raises:
            Failure: the source is empty, longer than the sequence's room for it, or the model has no encoder.
            ValueError: another shape, or a number that is not finite.
        """
        streams = np.ascontiguousarray(source if source.ndim == 3 else source[None], np.float32)
        expected = source_streams(self.model.spec)
        if streams.ndim != 3 or streams.shape[::2] != (expected, self.model.spec.d_model):
            raise ValueError(
                f"source is {source.shape}; expected {expected} x length x {self.model.spec.d_model}"
            )
        if not np.isfinite(streams).all():
            raise ValueError("source: holds a NaN or an infinity")
        if sequence.engine is not self:
            raise ValueError("the sequence belongs to another engine")
        with self._turn:
            done = self._library.sparsecli_read_source(
                self.handle,
                sequence.handle,
                streams[0].ctypes.data,
                streams[-1].ctypes.data,
                streams.shape[1],
                self._error,
            )
            message = self._message()
        if done < 0:
            raise Failure(message)

    def prefill(self, sequence: Sequence, tokens: Many[int]) -> np.ndarray:
        """Logits (V,) after the last of `tokens`, which are added to the sequence.

        Raises:
            Failure: the sequence has no room for them; nothing was added.
            ValueError: no tokens, or one that is not in the vocabulary; nothing was added.
        """
        return self._forward([sequence] * len(tokens), tokens, all_logits=False)[0]

    def logits(self, sequence: Sequence, tokens: Many[int]) -> np.ndarray:
        """Logits (n, V) after each of `tokens`, which are added to the sequence. Raises as `prefill`."""
        return self._forward([sequence] * len(tokens), tokens, all_logits=True)

    def step(self, sequence: Sequence, token: int) -> np.ndarray:
        """Logits (V,) after `token`, which is added to the sequence. Raises as `prefill`."""
        return self._forward([sequence], [token], all_logits=False)[0]

    def step_batch(self, sequences: Many[Sequence], tokens: Many[int]) -> np.ndarray:
        """Logits (B, V) after one token for each of B different sequences. Raises as `prefill`."""
        if len(set(map(id, sequences))) != len(sequences) or len(sequences) != len(tokens):
            raise ValueError("step_batch takes different sequences and one token for each")
        return self._forward(sequences, tokens, all_logits=True)

    def _forward(self, sequences: Many[Sequence], tokens: Many[int], all_logits: bool) -> np.ndarray:
        added = np.ascontiguousarray(tokens)
        count = added.size
        if not count:
            raise ValueError("no tokens")
        if added.ndim != 1 or added.dtype.kind not in "iu":
            raise ValueError(
                f"tokens are {added.ndim}-dimensional {added.dtype}; expected a list of token ids"
            )
        added = added.astype(np.int64)
        if any(sequence.engine is not self for sequence in sequences):
            raise ValueError("the sequence belongs to another engine")
        logits = np.empty((count if all_logits else 1, self.vocabulary), np.float32)
        with self._turn:
            handles = (ctypes.c_void_p * count)(*(sequence.handle.value for sequence in sequences))
            done = self._library.sparsecli_forward(
                self.handle, handles, added.ctypes.data, count, all_logits, logits.ctypes.data, self._error
            )
            message = self._message()
        if done == INVALID:
            raise ValueError(message)
        if done < 0:
            raise Failure(message)
        return logits

    def counts(self) -> list[tuple[int, int]]:
        """Of every layer since the last call: units that were computed in full, and tokens (with a joined source's).

        Of a dense layer that is every unit, of `precision` those that were read with more bits.
        """
        units, tokens = (ctypes.c_int64 * self.model.spec.layers)(), ctypes.c_int64()
        with self._turn:
            self._library.sparsecli_counts(self.handle, units, ctypes.byref(tokens))
        return [(count, tokens.value) for count in units]

    @property
    def block_stack_ns(self) -> int:
        """Nanoseconds that the blocks of the last call took (of its last 512 tokens, if it had more)."""
        with self._turn:
            return self._library.sparsecli_block_stack_ns(self.handle)

    def profile(self) -> dict[str, float]:
        """Seconds by part of the steps since the last call, measured on the caller's thread."""
        names: list[str] = []
        while (name := self._library.sparsecli_profile_part(len(names))) is not None:
            names.append(name.decode())
        seconds = (ctypes.c_double * len(names))()
        with self._turn:
            self._library.sparsecli_profile(self.handle, seconds)
        return dict(zip(names, seconds, strict=True))


class Sequence:
    """Keys, values and convolution inputs of a source and the tokens so far, with room for `capacity` tokens."""

    def __init__(self, engine: Engine, handle: ctypes.c_void_p, capacity: int) -> None:
        self.engine, self._handle, self.capacity = engine, handle, capacity
        self._destroy = weakref.finalize(self, engine._library.sparsecli_sequence_destroy, handle)

    def close(self) -> None:
        """Give the memory back; so does the end of the object."""
        with self.engine._turn:
            self._destroy()

    @property
    def handle(self) -> ctypes.c_void_p:
        """The library's sequence. Raises ValueError once it is closed."""
        if not self._destroy.alive:
            raise ValueError("the sequence is closed")
        return self._handle

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.engine._library.sparsecli_sequence_length(self.handle)

    def truncate(self, length: int) -> None:
        """Forget every token but the first `length`."""
        with self.engine._turn:
            if not 0 <= length <= self.length:
                raise ValueError(f"length: {length} is not between 0 and {self.length}")
            self.engine._library.sparsecli_sequence_truncate(self.handle, length)


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def exact_positions(spec: ModelSpec) -> int | None:
    """Positions up to which a token of a model with hashed attention sees all others; None: it always does."""
    hashing = spec.attention.hashing
    if hashing is None:
        return None
    return hashing.rounds * hashing.chunk_length * (1 + hashing.chunks_before)


def source_streams(spec: ModelSpec) -> int:
    """Streams of an encoder's output that `read_source` takes."""
    read_by = spec.encoder.read_by if spec.encoder else None
    return 2 if read_by and read_by.kind == "joined" and read_by.streams == 2 else 1


def _available_memory() -> int:
    import psutil

    return psutil.virtual_memory().available


def _shape(model: PackedModel, poison: bool) -> Shape:
    spec, precision = model.spec, model.precision
    attention, vocabulary = spec.attention, spec.vocabulary
    shape = Shape(
        d_model=spec.d_model,
        layers=spec.layers,
        heads=spec.heads,
        head_width=spec.width_of_head,
        key_value_heads=attention.key_value_heads or spec.heads,
        max_positions=spec.max_positions,
        vocabulary=vocabulary.size,
        projection=PROJECTIONS.index(attention.projection),
        output=OUTPUTS.index(attention.output),
        modules=modules_of(spec),
        kernel=attention.kernel,
        value_concat=CONCATENATIONS.index(attention.value_concat),
        query_key_norm=attention.query_key_norm,
        query_rank=spec.query_rank or 0,
        key_rank=spec.key_rank or 0,
        rms=spec.normalization == "rms",
        positions=POSITIONS.index(spec.positions) if spec.positions in POSITIONS else 0,
        rotary_width=spec.rotary_width if spec.positions == "rotary" else 0,
        parallel=spec.parallel,
        streams=2 if spec.residual == "reversible" else 1,
        concatenate=spec.merge == "concatenate",
        attention_layers=spec.attention_layers,
        shared_query_key=(1 if attention.share_query_key else 2) if attention.shares_query_key else 0,
        source=1 if crosses(spec) else 2 if joins(spec) else 0,
        query_modules=query_modules_of(spec) or 0,
        recurrent_layers=spec.sru.layers if spec.sru else 0,
        recurrent_width=spec.sru.width if spec.sru else 0,
        head_modules=vocabulary.modules if vocabulary.kind == "multiplicative" else 0,
        cache_type=TYPE_CODES[precision.cache],
        history_type=TYPE_CODES[precision.convolution],
        units_on_disk=model.from_disk,
        poison=poison,
        epsilon=spec.normalization_epsilon,
        embedding_scale=spec.embedding_scale,
    )
    _describe_feed_forward(shape, spec)
    return shape


def _describe_feed_forward(shape: Shape, spec: ModelSpec) -> None:
    feed_forward = spec.feed_forward
    shape.feed_forward = FEED_FORWARDS.index(feed_forward.kind)
    shape.d_ff = feed_forward.d_ff
    shape.activation = ACTIVATIONS.index(feed_forward.activation)
    if feed_forward.kind == "mixture":  # native/engine.h: the units of an expert, and experts
        shape.block_size, shape.rank = feed_forward.d_ff // feed_forward.experts, feed_forward.experts
        shape.probability_gate = feed_forward.gate == "probability"
        return
    shape.gated = feed_forward.gated
    if feed_forward.kind == "dense":
        return
    shape.block_size = feed_forward.block_size
    if feed_forward.kind == "sparse":
        shape.rank, shape.probability_gate = feed_forward.rank, feed_forward.gate == "probability"
    elif feed_forward.kind == "selector":
        shape.rank, shape.positive = feed_forward.bypass, feed_forward.choice == "positive"


def _units_per_block(spec: ModelSpec) -> list[int]:
    """k of every layer; experts a token of a mixture."""
    feed_forward = spec.feed_forward
    if feed_forward.kind == "dense":
        return [0] * spec.layers
    if feed_forward.kind == "mixture":
        return [feed_forward.experts_per_token] * spec.layers
    return [spec.units_per_block(layer) for layer in range(spec.layers)]
