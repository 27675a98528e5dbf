"""The two ways to decode: the native engine, and PyTorch, which is imported only where it is the one that decodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.decode.native import binding
from sparsecli.decode.packed.tensors import crosses
from sparsecli.model.files import CONFIG, INDEX, PACKED, WEIGHTS, Description

if TYPE_CHECKING:
    from sparsecli.decode.engine import Sequence as EngineSequence
    from sparsecli.decode.packed.pack import PackedModel

DEFAULT_DTYPE = "float32"


@dataclass(frozen=True)
class Choices:
    """What may be said about how to decode; None leaves it to the model and the machine."""

    backend: Literal["auto", "native", "torch"] = "auto"
    dtype: str | None = None
    cache_dtype: str | None = None
    threads: int | None = None


class Backend(Protocol):
    """A loaded model and the one text that it decodes. Logits are (V,) float32, after the last token."""

    name: str
    isa: str
    threads: int
    dtype: str
    cache_dtype: str

    def start(self, prompt: Sequence[int], capacity: int) -> np.ndarray:
        """Logits after the prompt of a text with room for `capacity` tokens. Raises Failure without memory for it.

        An encoder reads the prompt; the logits are then those after the start token of a text with so much room.
        """

    def step(self, token: int) -> np.ndarray:
        """Logits after one more token."""

    def close(self) -> None:
        """Free the memory and the threads."""


def open_backend(folder: Path, model: Description, choices: Choices) -> Backend:
    """The model in `folder`, loaded by the backend that `choices` and the machine leave.

    Says on stderr why it is not the native one, where that was not asked for.

    Raises:
        Failure: the backend cannot be used or cannot do what was chosen, or the weights do not load.
    """
    missing = binding.available()
    if choices.backend == "native" and missing:
        raise Failure(f"--backend native: {missing}")
    if choices.backend == "torch" or missing:
        if missing and not has_weights(folder):
            raise Failure(f"{folder}: is packed for the native engine, which cannot be used here: {missing}")
        if choices.backend == "auto":
            console.say(f"decoding with PyTorch: {missing}")
        return TorchBackend(folder, choices)
    return NativeBackend(folder, model, choices)


class NativeBackend:
    """The engine over packed weights: those in the folder, else its safetensors files, packed now.

    An encoder runs in PyTorch, once for a text. Where attention hashes, so does the first pass, which over more than a
    chunk is not what the same tokens give one after the other; the engine goes on from what PyTorch remembers.
    """

    name = "native"

    def __init__(self, folder: Path, model: Description, choices: Choices) -> None:
        from sparsecli.decode.engine import Engine

        packed = packed_weights(folder, model, choices.dtype)
        if choices.cache_dtype is not None:
            packed = replace(packed, precision=replace(packed.precision, cache=choices.cache_dtype))
        self.dtype, self.cache_dtype = packed.precision.units, packed.precision.cache
        self.isa = binding.isa()
        try:
            self.engine = Engine(packed, threads=choices.threads)
        except ValueError as error:  # a packed file that is whole, but not of this model
            raise Failure(f"{folder}: {error}") from error
        self.threads = self.engine.threads
        self.spec = model.spec
        self.reader: TorchBackend | None = None
        self.encoder: TorchEncoder | None = None
        if self._hashes_prompts() and has_weights(folder):
            self.reader = TorchBackend(folder, Choices(threads=self.threads))
        elif model.spec.encoder:
            self.encoder = TorchEncoder(folder, self.threads)
        self.sequence: EngineSequence | None = None

    def start(self, prompt: Sequence[int], capacity: int) -> np.ndarray:
        source = len(prompt) if self.spec.encoder else 0
        self.sequence = self.engine.sequence(capacity, source)
        if self.reader:
            from sparsecli.decode.kv_state import kv_states

            logits, cache = self.reader.start(prompt, capacity=1), self.reader.cache
            layers = kv_states(self.spec, cache.layers, cache.length)
            self.engine.import_kv(self.sequence, layers, source)
            return logits
        if self.encoder:
            self.engine.read_source(self.sequence, self.encoder.read(prompt))
            return self.engine.step(self.sequence, self.encoder.start_token)
        hashing = self.spec.attention.hashing
        if hashing and len(prompt) > hashing.chunk_length:
            console.say(
                "reading the prompt token by token: PyTorch reads it in one pass, but has no weights here"
            )
        return self.engine.prefill(self.sequence, prompt)

    def _hashes_prompts(self) -> bool:
        """Whether the first pass of the decoder may hash; behind cross-attention it is one token."""
        return self.spec.attention.hashing is not None and not crosses(self.spec)

    def step(self, token: int) -> np.ndarray:
        assert self.sequence
        return self.engine.step(self.sequence, token)

    def close(self) -> None:
        if self.sequence:
            self.sequence.close()
        self.engine.close()


class TorchEncoder:
    """The encoder of a model, as transformers loads it; the decoder is given back."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from transformers.utils import logging

        from sparsecli.model.loading import load_network

        torch.set_num_threads(threads)
        logging.set_verbosity_error()
        network: Any = load_network(folder)
        self.start_token: int = network.config.decoder_start_token_id
        self.model = network.model
        self.model.layers = torch.nn.ModuleList()

    def read(self, source: Sequence[int]) -> np.ndarray:
        """What it makes of the tokens of a source: streams (1 or 2, L, d)."""
        import torch

        with torch.inference_mode():
            rows = self.model.encode(torch.tensor([list(source)])).last_hidden_state[0]  # (L, streams * d)
            return torch.stack(rows.split(self.model.config.d_model, dim=-1)).numpy()


def has_weights(folder: Path) -> bool:
    """Whether there are safetensors files, not only packed ones."""
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def packed_weights(folder: Path, model: Description, dtype: str | None) -> PackedModel:
    """The weights in `folder` for the native engine: as they were packed there, unless `dtype` asks for another type.

    Raises:
        Failure: they do not load, or are packed as another type and nothing else is there.
    """
    from sparsecli.decode.packed.file import open_packed
    from sparsecli.decode.packed.folder import pack_folder
    from sparsecli.decode.packed.precision import Precision

    if (folder / PACKED).is_file():
        packed = open_packed(folder / PACKED)
        if packed.spec != model.spec:
            raise Failure(f"{folder}: {PACKED} and {CONFIG} do not belong together; pack the model again")
        held = packed.precision.units
        if dtype in (None, held):
            return packed
        if not has_weights(folder):
            raise Failure(
                f"{folder / PACKED}: was packed as {held}; leave out --dtype {dtype}, or pack the model again with it"
            )
    return pack_folder(folder, model.spec, Precision.of(dtype or DEFAULT_DTYPE))


class TorchBackend:
    """The model as transformers loads it, with the preallocated cache."""

    name = "torch"

    def __init__(self, folder: Path, choices: Choices) -> None:
        for option, chosen in (("--dtype", choices.dtype), ("--cache-dtype", choices.cache_dtype)):
            if chosen in ("int8", "int4") or (option == "--cache-dtype" and chosen is not None):
                raise Failure(f"{option} {chosen}: only the native backend has it")
        import torch
        from transformers.utils import logging

        from sparsecli.model.loading import load_network

        if choices.threads is not None:
            torch.set_num_threads(choices.threads)
        logging.set_verbosity_error()
        self.dtype = self.cache_dtype = choices.dtype or DEFAULT_DTYPE
        self.isa = torch.backends.cpu.get_cpu_capability()
        self.threads = torch.get_num_threads()
        self.network = load_network(folder, getattr(torch, self.dtype))
        self.encoded: Any = None
        """What the encoder made of the source, of a model that has one."""

    def start(self, prompt: Sequence[int], capacity: int) -> np.ndarray:
        import torch

        from sparsecli.model.cache import DecodeCache

        model, spec = self.network.model, self.network.config.spec
        if spec.encoder:
            with torch.inference_mode():
                self.encoded = model.encode(torch.tensor([list(prompt)]))
            capacity += model.prefix_length(len(prompt))
            prompt = [self.network.config.decoder_start_token_id]
        self.cache = DecodeCache.for_model(spec, capacity)
        return self._logits(prompt)

    def step(self, token: int) -> np.ndarray:
        return self._logits([token])

    def _logits(self, tokens: Sequence[int]) -> np.ndarray:
        import torch

        new = torch.tensor([list(tokens)])
        encoded = self.encoded
        inputs = {"decoder_input_ids": new, "encoder_outputs": encoded} if encoded else {"input_ids": new}
        with torch.inference_mode():
            output = self.network(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            return output.logits[0, -1].float().numpy()

    def close(self) -> None:
        """Nothing is held outside of Python."""
