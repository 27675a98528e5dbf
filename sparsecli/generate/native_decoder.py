"""Decoding in the native engine, from packed weights or from safetensors files that are packed at the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.decode.engine import Engine
from sparsecli.decode.native import binding
from sparsecli.decode.packed.tensors import crosses
from sparsecli.generate.decoder import DecoderOptions
from sparsecli.generate.packed_weights import has_weights, packed_weights, weight_type
from sparsecli.generate.torch_decoder import TorchDecoder, TorchEncoder
from sparsecli.model.files import Description

if TYPE_CHECKING:
    from sparsecli.decode.engine import Sequence as EngineSequence


def open_engine(folder: Path, model: Description, options: DecoderOptions) -> Engine:
    """The engine over the weights in `folder`.

    Raises:
        Failure: the weights do not load, or the packed file belongs to another model.
    """
    packed = packed_weights(folder, model, options.dtype, options.keep)
    if options.cache_dtype is not None:
        packed = replace(packed, precision=replace(packed.precision, cache=options.cache_dtype))
    try:
        return Engine(packed, threads=options.threads)
    except ValueError as error:  # a sound packed file of another model
        raise Failure(f"{folder}: {error}") from error


class NativeDecoder:
    """The engine over packed weights: see `Decoder`.

    PyTorch runs the encoder, once for each prompt. With LSH attention PyTorch also runs the prefill, because a pass
    over several chunks gives other values than the same tokens one by one. The engine then continues from PyTorch's
    cache.

    Raises:
        Failure: the weights do not load, or the packed file belongs to another model.
    """

    name = "native"

    def __init__(self, folder: Path, model: Description, options: DecoderOptions) -> None:
        self.engine = open_engine(folder, model, options)
        packed = self.engine.model
        self.dtype, self.cache_dtype = weight_type(packed), packed.precision.cache
        self.isa = binding.isa()
        self.threads = self.engine.threads
        self.spec = model.spec
        self.prefiller: TorchDecoder | None = None
        self.encoder: TorchEncoder | None = None
        if self._hashes_prompts() and has_weights(folder):
            self.prefiller = TorchDecoder(folder, DecoderOptions(threads=self.threads))
        elif model.spec.encoder:
            self.encoder = TorchEncoder(folder, self.threads)
        self.sequence: EngineSequence | None = None

    def prefill(self, prompt: Sequence[int], capacity: int) -> np.ndarray:
        source = len(prompt) if self.spec.encoder else 0
        self.sequence = self.engine.sequence(capacity, source)
        if self.prefiller:
            from sparsecli.decode.kv_state import kv_states

            logits, cache = self.prefiller.prefill(prompt, capacity=1), self.prefiller.cache
            layers = kv_states(self.spec, cache.layers, cache.length)
            self.engine.import_kv(self.sequence, layers, source)
            return logits
        if self.encoder:
            self.engine.read_source(self.sequence, self.encoder.encode(prompt))
            return self.engine.step(self.sequence, self.encoder.start_token)
        hashing = self.spec.attention.hashing
        if hashing and len(prompt) > hashing.chunk_length:
            console.say("the prompt is read token by token: one pass needs PyTorch and the original weights")
        return self.engine.prefill(self.sequence, prompt)

    def _hashes_prompts(self) -> bool:
        """Whether the decoder's prefill may use LSH. With cross-attention the prefill is one token, and never does."""
        return self.spec.attention.hashing is not None and not crosses(self.spec)

    def step(self, token: int) -> np.ndarray:
        assert self.sequence
        return self.engine.step(self.sequence, token)

    def verify(self, tokens: Sequence[int]) -> np.ndarray:
        """Append `tokens` in one pass, in two where rotary frequencies change among them, and return the logits (n, V)
        after each, bit by bit those of single steps."""
        assert self.sequence
        short = (self.spec.rotary_switch or 0) - self.sequence.length  # tokens that short frequencies turn
        if not 0 < short < len(tokens):
            return self.engine.logits(self.sequence, tokens)
        return np.concatenate(
            [self.engine.logits(self.sequence, part) for part in (tokens[:short], tokens[short:])]
        )

    def truncate(self, length: int) -> None:
        """Keep only the first `length` tokens."""
        assert self.sequence
        self.sequence.truncate(length)

    def close(self) -> None:
        if self.sequence:
            self.sequence.close()
        self.engine.close()
