"""The protocol of a decoder: a loaded model and the one sequence that it decodes. `generate` and `bench` share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np

DEFAULT_DTYPE = "float32"


@dataclass(frozen=True)
class DecoderOptions:
    """How to decode. None leaves the choice to the model and the machine.

    With `keep`, weights that took long to pack are kept for the next start.
    """

    backend: Literal["auto", "native", "torch"] = "auto"
    dtype: str | None = None
    cache_dtype: str | None = None
    threads: int | None = None
    keep: bool = True


class Decoder(Protocol):
    """A loaded model with one sequence. Logits are (V,) float32 and follow the last token."""

    name: str
    isa: str
    threads: int
    dtype: str
    cache_dtype: str

    def prefill(self, prompt: Sequence[int], capacity: int) -> np.ndarray:
        """Start a sequence of up to `capacity` tokens with the prompt and return the logits after it.

        A model with an encoder encodes the prompt. The logits then follow the start token of the decoder, and the
        capacity counts the tokens of the decoder.

        Raises:
            Failure: the memory for the cache cannot be allocated.
        """

    def step(self, token: int) -> np.ndarray:
        """Append one token and return the logits after it."""

    def close(self) -> None:
        """Free memory and threads."""
