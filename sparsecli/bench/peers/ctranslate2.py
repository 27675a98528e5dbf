"""CTranslate2: a Llama-shaped model, written in its format and loaded at once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import ctranslate2
import numpy as np
import torch
from ctranslate2.specs import Activation, TransformerDecoderModelSpec
from torch import Tensor

from sparsecli import console
from sparsecli.bench.peers.llama_shape import STANDARD_DEVIATION, matrices, random_tile, repeated
from sparsecli.spec.model import ModelSpec

COMPUTE_TYPES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8_float32"}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
SCALE = 32 / STANDARD_DEVIATION  # int8 weights are the real ones times this
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]


def refusal(spec: ModelSpec, dtype: str) -> str | None:
    """See `PeerModule.refusal`."""
    if COMPUTE_TYPES[dtype] not in ctranslate2.get_supported_compute_types("cpu"):
        return "CTranslate2 does not compute in this type on this processor"
    return None


# -- the files -----------------------------------------------------------------------------------------------


def write_model(folder: Path, spec: ModelSpec, dtype: str) -> None:
    """A model folder with random weights. Raises `Failure` when it cannot be written."""
    shapes = matrices(spec)
    size = ITEM_BYTES[dtype] * sum(rows * width for rows, width in shapes.values())
    free = shutil.disk_usage(folder).free
    if free < 1.1 * size:
        raise console.Failure(
            f"{folder.parent}: CTranslate2 reads its model from a file of {size / 1e9:.1f} GB, {free / 1e9:.1f} "
            "GB are free; set TMPDIR to a folder with more room"
        )
    model = _fill(spec, shapes, dtype)
    try:
        model.save(str(folder))
    except OSError as error:
        raise console.Failure(f"{folder}: cannot be written: {console.system_reason(error)}") from error


def _fill(spec: ModelSpec, shapes: Mapping[str, tuple[int, int]], dtype: str) -> Any:
    heads = spec.attention.key_value_heads or spec.heads
    model = TransformerDecoderModelSpec.from_config(
        num_layers=spec.layers,
        num_heads=spec.heads,
        num_heads_kv=heads,
        activation=Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
    )
    weights = _joined(shapes)
    values = dict(repeated(_tile(dtype), {name: rows * width for name, (rows, width) in weights.items()}))
    decoder = model.decoder
    decoder.scale_embeddings = False
    places = {"embedding": decoder.embeddings, "head": decoder.projection}
    norms = [decoder.layer_norm]
    for index, layer in enumerate(decoder.layer):
        attention, feed_forward = layer.self_attention, layer.ffn
        norms += [attention.layer_norm, feed_forward.layer_norm]
        places |= {
            f"{index}.attention": attention.linear[0],
            f"{index}.output": attention.linear[1],
            f"{index}.gate": feed_forward.linear_0,
            f"{index}.up": feed_forward.linear_0_noact,
            f"{index}.down": feed_forward.linear_1,
        }
    for name, place in places.items():
        place.weight = _typed(values[name].reshape(weights[name]), dtype)
        if dtype == "int8":
            place.weight_scale = np.full(weights[name][0], SCALE, dtype=np.float32)
    for norm in norms:
        norm.gamma = _typed(np.ones(spec.d_model, dtype=np.float32), dtype)
    tokens = [f"t{token}" for token in range(spec.vocabulary.size)]
    model.register_vocabulary(SPECIAL_TOKENS + tokens[len(SPECIAL_TOKENS) :])
    model.config.layer_norm_epsilon = spec.normalization_epsilon
    model.validate()  # not `optimize`, which would look for equal matrices
    return model


def _joined(shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Queries, keys and values are one matrix here."""
    joined: dict[str, tuple[int, int]] = {}
    for name, (rows, width) in shapes.items():
        block, _, part = name.rpartition(".")
        if part in ("query", "key", "value"):
            name = f"{block}.attention"
            rows += joined.get(name, (0, 0))[0]
        joined[name] = rows, width
    return joined


def _tile(dtype: str) -> np.ndarray:
    tile = random_tile().ravel()
    if dtype == "int8":
        return np.clip(np.rint(tile * SCALE), -127, 127).astype(np.int8)
    return tile


def _typed(values: np.ndarray, dtype: str) -> Any:
    """CTranslate2 takes bfloat16 as PyTorch tensors."""
    if dtype != "bfloat16":
        return values
    return torch.from_numpy(values).to(torch.bfloat16)


# -- decoding ------------------------------------------------------------------------------------------------


def load(
    spec: ModelSpec, weights: Mapping[str, Tensor], dtype: str, capacity: int, threads: int
) -> CTranslate2Decoder:
    """See `PeerModule.load`. The files are deleted before this returns or raises."""
    with tempfile.TemporaryDirectory(prefix="sparsecli-") as name:
        write_model(Path(name), spec, dtype)
        kind = COMPUTE_TYPES[dtype]
        generator = ctranslate2.Generator(
            name, device="cpu", compute_type=kind, inter_threads=1, intra_threads=threads
        )
    settings = f"ctranslate2 {ctranslate2.__version__}, threads {threads}, compute type {kind}"
    return CTranslate2Decoder(generator, settings, spec.vocabulary.size, capacity)


class CTranslate2Decoder:
    """See `PeerDecoder`.

    CTranslate2 generates whole texts. So it runs in a thread, whose callback waits after every token until the next
    one is requested. It keeps the prompt's state and continues with its own greedy tokens. Only the first step after
    a rewind uses the given token.
    """

    def __init__(self, generator: Any, settings: str, vocabulary: int, capacity: int) -> None:
        self.generator, self.settings = generator, settings
        self.names = SPECIAL_TOKENS + [f"t{token}" for token in range(len(SPECIAL_TOKENS), vocabulary)]
        self.capacity = capacity
        self.prompt: list[str] = []
        self.generation: Generation | None = None

    def prefill(self, tokens: Sequence[int]) -> None:
        """See `PeerDecoder.prefill`; a first token makes CTranslate2 compute the prompt's state and keep it."""
        self.rewind()
        self.prompt = [self.names[token] for token in tokens]
        self.step(0)
        self.rewind()

    def rewind(self) -> None:
        """See `PeerDecoder.rewind`."""
        if self.generation:
            self.generation.stop()
        self.generation = None

    def step(self, token: int) -> tuple[int, None]:
        """See `PeerDecoder.step`."""
        if self.generation is None:
            self.generation = Generation(self.generator, self.prompt, self.names[token], self.capacity)
        return self.generation.next(), None


class Generation:
    """A text that is generated token by token on request."""

    def __init__(self, generator: Any, prompt: list[str], start: str, capacity: int) -> None:
        self.asked: SimpleQueue[bool] = SimpleQueue()
        self.found: SimpleQueue[int | Exception] = SimpleQueue()
        arguments = {
            "static_prompt": prompt,
            "include_prompt_in_result": False,
            "max_length": capacity,
            "min_length": capacity,  # no end of text before it
            "callback": self._on_token,
        }
        self.thread = Thread(target=self._run, args=(generator, start, arguments), daemon=True)
        self.thread.start()

    def next(self) -> int:
        """The next token."""
        self.asked.put(True)
        found = self.found.get()
        if isinstance(found, Exception):
            raise console.Failure(f"CTranslate2 cannot decode: {found}")
        return found

    def stop(self) -> None:
        """End the text."""
        self.asked.put(False)
        self.thread.join()

    def _run(self, generator: Any, start: str, arguments: dict[str, Any]) -> None:
        if not self.asked.get():
            return
        try:
            generator.generate_batch([[start]], **arguments)
        except Exception as error:
            self.found.put(error)

    def _on_token(self, result: Any) -> bool:
        """Hand the token over and wait; true ends the text."""
        self.found.put(result.token_id)
        return not self.asked.get()
