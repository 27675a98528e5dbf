"""llama.cpp beside our rows: the same dense weights in its files, on the same text, in the same rounds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf

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
from sparsecli.bench.peers.llama_file import unlike_llama, write_weights
from sparsecli.console import Failure, progress
from sparsecli.convert.evaluation import prompt_losses, window_losses
from sparsecli.convert.measurement import Decoded
from sparsecli.data.packing import Windows
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.spec.model import ModelSpec

BLOCK = 32  # weights of a row that share a scale, in every type that llama.cpp falls back to
SAME = 1e-3  # nats a token between its float16 file and our float32, beyond which they are two models
COMPARED = 2  # windows


@dataclass(frozen=True)
class LlamaContender:
    """A file as llama.cpp decodes it: see `Contender`."""

    name: str
    file: Path
    spec: ModelSpec
    threads: int
    read: int
    """Bytes of weights that a decoded token reads."""
    settings: str

    def bytes_per_token(self, shares: Sequence[float] | None) -> int:
        """See `Contender.bytes_per_token`; every unit is read."""
        return self.read

    def decode(self, windows: Windows) -> Decoded:
        """Losses of every window."""
        sequence = LlamaSequence(self._load(), windows.sequence_length)
        with progress(f"checking {self.name}", len(windows)) as bar:
            return Decoded(prompt_losses(sequence.logits, windows, bar), None)

    @contextmanager
    def loaded(self, positions: int, prompt: int) -> Iterator[tuple[TimedDecoder, TimedDecoder]]:
        """What decodes `positions` tokens, and what reads prompts of `prompt` tokens."""
        model = self._load()
        yield LlamaDecoder(model, positions), LlamaReader(model, prompt)

    def _load(self) -> LlamaModel:
        return LlamaModel(self.file, self.spec, self.threads)


def refusal(spec: ModelSpec) -> str | None:
    """Why such a dense model cannot be measured, as the end of a sentence; None when it can."""
    unlike = unlike_llama(spec)
    return f"no file can be written for it of a model with {unlike}" if unlike else None


def contenders(
    folder: Path, dense: ScalingTransformerForCausalLM, windows: Windows, threads: int
) -> list[LlamaContender]:
    """The dense model as float16 and in llama.cpp's own types, in files that stay in `folder`.

    Raises:
        Failure: no room, or llama.cpp refuses the files or computes something else than our model does.
    """
    spec = dense.config.spec
    source = folder / "float16.gguf"
    write_weights(source, spec, dict(dense.named_parameters()))
    found = [_contender("float16", source, spec, threads)]
    _check_same(found[0], dense, windows)
    rows = (spec.d_model, spec.attention_width, spec.feed_forward.d_ff)
    if odd := [width for width in rows if width % BLOCK]:
        console.warn(
            f"llama.cpp is measured in float16 alone: its blocks of {BLOCK} weights do not divide rows of {odd[0]}"
        )
        return found
    for dtype in FILE_TYPES:
        target = folder / f"{dtype}.gguf"
        quantise(source, target, dtype, threads)
        found.append(_contender(dtype, target, spec, threads))
    return found


def _contender(dtype: str, file: Path, spec: ModelSpec, threads: int) -> LlamaContender:
    read, kinds = 0, Counter[str]()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, tensor in tensors.items():
        size = int(tensor.n_bytes)
        if name == "token_embd.weight" and "output.weight" in tensors:
            size //= spec.vocabulary.size  # one row of it
        read += 0 if name == "rope_freqs.weight" else size
        kinds[tensor.tensor_type.name.lower()] += size
    shares = ", ".join(
        f"{kind} {size / read:.0%}" for kind, size in kinds.most_common() if size / read > 0.005
    )
    name = f"llama.cpp, {dtype}"
    return LlamaContender(name, file, spec, threads, read, f"{shares}; {settings(threads)}")


def _check_same(float16: LlamaContender, dense: ScalingTransformerForCausalLM, windows: Windows) -> None:
    """Raise Failure unless both predict the same: a wrong file would be a straw man."""
    length = windows.sequence_length
    first = Windows(windows.tokens[: COMPARED * windows.stride], length, windows.beginning.tolist())
    change = (float16.decode(first).losses - window_losses(dense, first)).mean()
    if not abs(change) <= SAME:
        raise Failure(
            f"its float16 file is not our model: its perplexity is {math.expm1(change):+.2%} from ours"
        )
