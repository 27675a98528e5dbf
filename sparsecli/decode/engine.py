"""The native decode engine: a packed model, its sequences, and one C call for each step."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Sequence as Many

import numpy as np

from sparsecli.console import Failure
from sparsecli.decode.kv_state import KVState
from sparsecli.decode.native import binding
from sparsecli.decode.native.binding import ERROR_BYTES
from sparsecli.decode.native.shape import bound_tensor, by_layer, shape_of
from sparsecli.decode.packed.layouts import LANES, padded
from sparsecli.decode.packed.pack import PackedModel
from sparsecli.decode.packed.precision import plan
from sparsecli.decode.packed.tensors import convolves, joins
from sparsecli.spec.model import ModelSpec

MAX_THREADS = 256
INVALID = -2  # of sparsecli_forward: a token that does not exist


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
        if reason := binding.available():
            raise Failure(f"the native engine cannot be used: {reason}")
        self.threads = min(processors(), MAX_THREADS) if threads is None else threads
        if not 1 <= self.threads <= MAX_THREADS:
            raise ValueError(f"threads: {threads} is not between 1 and {MAX_THREADS}")
        self.model = model  # its memory is the engine's
        self.vocabulary = model.spec.vocabulary.size
        self._library = binding.library()
        self._error = ctypes.create_string_buffer(ERROR_BYTES)
        self._mutex = threading.Lock()  # the library lets go of Python's lock, and has one working memory
        self._rotations: dict[tuple[int, tuple[int, ...]], np.ndarray] = {}  # by layer_idx and factors
        self._levels: set[int] = set()
        shape = shape_of(model, poison)
        lists = {name: (ctypes.c_int64 * len(given))(*given) for name, given in by_layer(model.spec).items()}
        for name, memory in lists.items():
            setattr(shape, name, ctypes.addressof(memory))
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
        with self._mutex:
            self._destroy()

    def _bind(self) -> None:
        tensors = self.model.tensors
        planned = plan(self.model.spec, self.model.precision)
        found = [
            bound_tensor(slot, kind, tensors)
            for slot, kind in planned
            if not slot.optional or slot.key in tensors
        ]
        bound = (binding.BoundTensor * len(found))(*found)
        if self._library.sparsecli_bind(self.handle, bound, len(found), self._error) < 0:
            raise ValueError(self._message())

    def _bind_rotations(self, positions: int) -> None:
        """Hand over what keys are hashed on in texts of at most `positions`, each layer's once."""
        from sparsecli.decode.lsh_rotations import factors_at, levels, rotations_of  # draws in PyTorch

        spec = self.model.spec
        with self._mutex:
            for level in levels(spec, positions):
                if level in self._levels:
                    continue
                factors = tuple(factors_at(spec, level))
                for layer_idx in range(spec.layers * spec.attention_layers):
                    if (layer_idx, factors) not in self._rotations:
                        rotations = rotations_of(spec, layer_idx, level).reshape(
                            spec.heads, spec.width_of_head, -1
                        )
                        fill = padded(rotations.shape[2], LANES) - rotations.shape[2]
                        self._rotations[layer_idx, factors] = np.pad(rotations, ((0, 0), (0, 0), (0, fill)))
                    bound = self._rotations[layer_idx, factors]
                    done = self._library.sparsecli_bind_rotations(
                        *(
                            self.handle,
                            layer_idx,
                            level,
                            (ctypes.c_int64 * len(factors))(*factors),
                            len(factors),
                        ),
                        *(bound.ctypes.data, bound.size, self._error),
                    )
                    if done < 0:
                        raise Failure(f"the native engine cannot run this model: {self._message()}")
                self._levels.add(level)

    def _message(self) -> str:
        return self._error.value.decode(errors="replace")

    def sequence(self, capacity: int, source: int = 0) -> Sequence:
        """An empty sequence with room for `capacity` tokens, and for the `source` tokens that an encoder read.

        Raises:
            Failure: memory does not suffice.
            ValueError: no room at all, or none for a source of a model with an encoder.
        """
        if not 1 <= capacity <= 1 << 30:
            raise ValueError(f"capacity: {capacity} is not between 1 and {1 << 30}")
        least = int(self.model.spec.encoder is not None)
        if not least <= source <= least << 30:
            raise ValueError(f"source: {source} is not between {least} and {least << 30}")
        positions = capacity + source * joins(self.model.spec)
        needed = self._library.sparsecli_sequence_bytes(self.handle, capacity, source)
        if needed > _available_memory():
            raise Failure(
                f"{positions} positions need {needed / 1e9:.1f} GB of cache, more than the memory that is left; "
                "use a shorter context or a narrower cache type"
            )
        if self.model.spec.attention.hashing:
            self._bind_rotations(positions)
        handle = self._library.sparsecli_sequence_create(self.handle, capacity, source, self._error)
        if not handle:
            raise Failure(f"{positions} positions need {needed / 1e9:.1f} GB of cache: {self._message()}")
        return Sequence(self, ctypes.c_void_p(handle), capacity, needed)

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
        with self._mutex:
            done = self._library.sparsecli_read_encoder(
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

    def import_kv(self, sequence: Sequence, layers: Many[KVState], source: int = 0) -> None:
        """Begin `sequence` anew with what PyTorch remembers of its beginning, one for each attention layer.

        Args:
            source: positions of them that were a prefix.
        Raises:
            Failure: more positions than the sequence has room for, or a model with cross-attention.
            ValueError: other layers or shapes than the model's, or a number that is not finite.
        """
        if sequence.engine is not self:
            raise ValueError("the sequence belongs to another engine")
        spec = self.model.spec
        if len(layers) != spec.layers * spec.attention_layers:
            raise ValueError(
                f"{len(layers)} attention layers, expected {spec.layers * spec.attention_layers}"
            )
        held = layers[0].positions
        arrays = [_checked(spec, layer, held, layer_idx) for layer_idx, layer in enumerate(layers)]
        with self._mutex:
            handle, error = sequence.handle, self._error
            done = min(
                self._library.sparsecli_import_kv(
                    self.handle,
                    handle,
                    layer_idx,
                    *(x if x is None else x.ctypes.data for x in parts),
                    held,
                    error,
                )
                for layer_idx, parts in enumerate(arrays)
            )
            if done >= 0:
                done = self._library.sparsecli_import_done(self.handle, handle, held, source, error)
            message = self._message()
        if done < 0:
            raise Failure(message)

    def prefill(self, sequence: Sequence, tokens: Many[int]) -> np.ndarray:
        """Logits (V,) after the last of `tokens`, which are added to the sequence.

        They are what single steps give; hashed attention in PyTorch gives a little different ones in one pass over
        more than a chunk (see `import_kv`).

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

    def advance(self, sequences: Many[Sequence], pieces: Many[Many[int]]) -> np.ndarray:
        """Logits (B, V) after the last token of each piece, which is added to its sequence, all in one pass.

        A piece is one token of a text that grows, or some tokens of a prompt. The sequences differ from one another.
        Raises as `prefill`.
        """
        if len(set(map(id, sequences))) != len(sequences) or len(sequences) != len(pieces) or not all(pieces):
            raise ValueError("advance takes different sequences and a piece of at least one token for each")
        spread = [sequence for sequence, piece in zip(sequences, pieces, strict=True) for _ in piece]
        return self._forward(
            spread, [token for piece in pieces for token in piece], all_logits=False, runs=len(pieces)
        )

    def _forward(
        self, sequences: Many[Sequence], tokens: Many[int], all_logits: bool, runs: int = 1
    ) -> np.ndarray:
        """Logits after every token, or after the last one of each of `runs` sequences."""
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
        logits = np.empty((count if all_logits else runs, self.vocabulary), np.float32)
        with self._mutex:
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
        """Of every layer since the last call: units that were computed in full, and tokens (with a prefix's).

        Of a dense layer that is every unit, of `precision` those that were read with more bits.
        """
        units, tokens = (ctypes.c_int64 * self.model.spec.layers)(), ctypes.c_int64()
        with self._mutex:
            self._library.sparsecli_active_units(self.handle, units, ctypes.byref(tokens))
        return [(count, tokens.value) for count in units]

    @property
    def block_stack_ns(self) -> int:
        """Nanoseconds that the blocks of the last call took (of its last 512 tokens, if it had more)."""
        with self._mutex:
            return self._library.sparsecli_block_stack_ns(self.handle)

    def profile(self) -> dict[str, float]:
        """Seconds by part of the steps since the last call, measured on the caller's thread."""
        names: list[str] = []
        while (name := self._library.sparsecli_profile_part(len(names))) is not None:
            names.append(name.decode())
        seconds = (ctypes.c_double * len(names))()
        with self._mutex:
            self._library.sparsecli_profile(self.handle, seconds)
        return dict(zip(names, seconds, strict=True))


class Sequence:
    """Keys, values and convolution inputs of a source and the tokens so far, with room for `capacity` tokens: `nbytes`
    of memory."""

    def __init__(self, engine: Engine, handle: ctypes.c_void_p, capacity: int, nbytes: int) -> None:
        self.engine, self._handle, self.capacity, self.nbytes = engine, handle, capacity, nbytes
        self._destroy = weakref.finalize(self, engine._library.sparsecli_sequence_destroy, handle)

    def close(self) -> None:
        """Give the memory back; so does the end of the object."""
        with self.engine._mutex:
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
        """Forget every token but the first `length`.

        Raises:
            Failure: layers with a sliding window do not hold what comes before any more (they keep a few hundred
                positions more than their window); the sequence is as it was.
            ValueError: the sequence holds fewer tokens.
        """
        with self.engine._mutex:
            if not 0 <= length <= self.length:
                raise ValueError(f"length: {length} is not between 0 and {self.length}")
            done = self.engine._library.sparsecli_sequence_truncate(
                self.engine.handle, self.handle, length, self.engine._error
            )
            message = self.engine._message()
        if done < 0:
            raise Failure(message)

    def copy_from(self, other: Sequence, length: int) -> None:
        """Begin anew with the first `length` tokens of another sequence of the same engine and capacity.

        Raises:
            Failure: layers with a sliding window do not hold them any more, or the model has an encoder or LSH
                attention; the sequence is as it was.
            ValueError: another engine or capacity, or more tokens than the other holds.
        """
        if other is self or other.engine is not self.engine or other.capacity != self.capacity:
            raise ValueError("tokens are copied between two sequences of one engine and one capacity")
        with self.engine._mutex:
            if not 0 <= length <= other.length:
                raise ValueError(f"length: {length} is not between 0 and {other.length}")
            done = self.engine._library.sparsecli_sequence_copy(
                self.engine.handle, other.handle, length, self.handle, self.engine._error
            )
            message = self.engine._message()
        if done < 0:
            raise Failure(message)


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def source_streams(spec: ModelSpec) -> int:
    """Streams of an encoder's output that `read_source` takes."""
    read_by = spec.encoder.read_by if spec.encoder else None
    return 2 if read_by and read_by.kind == "prefix" and read_by.streams == 2 else 1


def _available_memory() -> int:
    import psutil

    return psutil.virtual_memory().available


def _checked(spec: ModelSpec, layer: KVState, held: int, layer_idx: int) -> list[np.ndarray | None]:
    """The arrays of `layer` in the order of `sparsecli_import_kv`."""
    heads = spec.attention.key_value_heads or spec.heads
    sru = spec.sru if layer_idx % spec.attention_layers == 0 else None
    inputs = (1 if spec.attention.value_concat == "none" else 2) * spec.d_model
    expected = {
        "keys": (held, heads, spec.width_of_head),
        "values": (held, heads, spec.width_of_head),
        "inputs": (held, inputs) if convolves(spec) else None,
        "output_inputs": (held, spec.d_model) if spec.attention.output == "multiplicative_conv" else None,
        "states": (sru.layers, held, sru.width) if sru else None,
    }
    arrays: list[np.ndarray | None] = []
    for name, shape in expected.items():
        given = getattr(layer, name)
        if (None if given is None else given.shape) != shape:
            raise ValueError(f"{name} of layer {layer_idx}: not of shape {shape}")
        if given is not None and not np.isfinite(given).all():
            raise ValueError(f"{name} of layer {layer_idx}: holds a NaN or an infinity")
        arrays.append(None if given is None else np.ascontiguousarray(given, np.float32))
    return arrays
