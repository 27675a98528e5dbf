"""llama.cpp beside our models: the same dense weights in its files, on the same text, in the same rounds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsecli import console
from sparsecli.bench.decoders import TimedDecoder
from sparsecli.bench.peers.llama_cpp import (
    FILE_TYPES,
    LlamaDecoder,
    LlamaModel,
    LlamaReader,
    LlamaSequence,
    quantise,
    settings,
)
from sparsecli.bench.peers.llama_file import (
    WeightsRead,
    matrix_name,
    unlike_llama,
    weights_read,
    write_weights,
)
from sparsecli.console import Failure, progress
from sparsecli.convert.evaluate import HeldOutResult
from sparsecli.data.packing import Windows
from sparsecli.evaluate.losses import prompt_losses, window_losses
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.spec.model import ModelSpec

GROUP_SIZE = 32  # weights of a row that share a scale, in every type that llama.cpp falls back to
TOLERANCE = 1e-3  # nats/token between its float16 file and our float32, above which they are different models
COMPARED_WINDOWS = 2
WITHOUT_IMPORTANCE = ("q8_0",)
"""Types that are rounded to nearest in any case."""


@dataclass(frozen=True)
class LlamaContender:
    """A GGUF file in llama.cpp: see `Contender`."""

    name: str
    file: Path
    spec: ModelSpec
    threads: int
    weights: WeightsRead
    settings: str

    def bytes_per_token(self, kept_fractions: Sequence[float] | None) -> int:
        """See `Contender.bytes_per_token`; every unit is read."""
        return self.weights.bytes

    def bits_per_weight(self, kept_fractions: Sequence[float] | None) -> float:
        """See `Contender.bits_per_weight`."""
        return self.weights.bits_per_weight

    def evaluate(self, windows: Windows) -> HeldOutResult:
        """See `Contender.evaluate`."""
        sequence = LlamaSequence(self._load(), windows.sequence_length)
        with progress(f"evaluating {self.name}", len(windows)) as bar:
            return HeldOutResult(prompt_losses(sequence.logits, windows, bar), None)

    @contextmanager
    def loaded(self, positions: int, prompt: int) -> Iterator[tuple[TimedDecoder, TimedDecoder]]:
        """See `Contender.loaded`."""
        model = self._load()
        yield LlamaDecoder(model, positions), LlamaReader(model, prompt)

    def _load(self) -> LlamaModel:
        return LlamaModel(self.file, self.spec, self.threads)


def unsupported_reason(spec: ModelSpec) -> str | None:
    """Why llama.cpp cannot run such a dense model, as the end of a sentence; None if it can."""
    unlike = unlike_llama(spec)
    return f"its files cannot hold a model with {unlike}" if unlike else None


def llama_contenders(
    folder: Path,
    dense: ScalingTransformerForCausalLM,
    windows: Windows,
    threads: int,
    importance: Mapping[str, np.ndarray] | None = None,
) -> list[LlamaContender]:
    """The dense model in float16 and in llama.cpp's quantized types, as files in `folder`.

    Args:
        importance: mean square of each input of the blocks' linear layers, by our names: see `input_importance`.
            llama.cpp rounds with it, as with an importance matrix of its own; q8_0 has no use for it.

    Raises:
        Failure: the disk is full, or llama.cpp rejects the files or computes a different loss from our model's.
    """
    spec = dense.config.spec
    source = folder / "float16.gguf"
    write_weights(source, spec, dict(dense.named_parameters()))
    found = [_contender("float16", source, spec, threads, settings(threads))]
    _check_same_model(found[0], dense, windows)
    rows = (spec.d_model, spec.attention_width, spec.feed_forward.d_ff)
    if odd := [width for width in rows if width % GROUP_SIZE]:
        console.warn(
            f"llama.cpp is measured only in float16: its blocks of {GROUP_SIZE} weights do not divide rows of {odd[0]}"
        )
        return found
    matrices = {matrix_name(name, spec): squares for name, squares in (importance or {}).items()}
    for dtype in FILE_TYPES:
        target = folder / f"{dtype}.gguf"
        weighted = matrices if dtype not in WITHOUT_IMPORTANCE else None
        quantise(source, target, dtype, threads, weighted)
        said = f"{settings(threads)}{', importance matrix' if weighted else ''}"
        found.append(_contender(dtype, target, spec, threads, said))
    return found


def _contender(dtype: str, file: Path, spec: ModelSpec, threads: int, said: str) -> LlamaContender:
    weights = weights_read(file)
    return LlamaContender(f"llama.cpp, {dtype}", file, spec, threads, weights, f"{weights.shares}; {said}")


def _check_same_model(
    float16: LlamaContender, dense: ScalingTransformerForCausalLM, windows: Windows
) -> None:
    """Raise Failure unless both have the same loss: with a wrong file the comparison would be unfair."""
    length = windows.sequence_length
    first = Windows(windows.tokens[: COMPARED_WINDOWS * windows.stride], length, windows.beginning.tolist())
    difference = (float16.evaluate(first).losses - window_losses(dense, first)).mean()
    if not abs(difference) <= TOLERANCE:
        raise Failure(
            f"its float16 file does not match our model: its perplexity differs by {math.expm1(difference):+.2%}"
        )
