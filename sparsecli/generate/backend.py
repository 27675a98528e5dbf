"""The choice of a backend: the native engine where it works, else PyTorch."""

from __future__ import annotations

from pathlib import Path

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.decode.native import binding
from sparsecli.generate.decoder import Decoder, DecoderOptions
from sparsecli.generate.native_decoder import NativeDecoder, has_weights
from sparsecli.generate.torch_decoder import TorchDecoder
from sparsecli.model.files import Description


def open_decoder(folder: Path, model: Description, options: DecoderOptions) -> Decoder:
    """Load the model in `folder`. Where `auto` falls back to PyTorch, a line on stderr gives the reason.

    Raises:
        Failure: the backend is not available, lacks what the options ask for, or the weights do not load.
    """
    missing = binding.available()
    if options.backend == "native" and missing:
        raise Failure(f"--backend native: {missing}")
    if options.backend == "torch" or missing:
        if missing and not has_weights(folder):
            raise Failure(f"{folder}: is packed for the native engine, which is not available: {missing}")
        if options.backend == "auto":
            console.say(f"decoding with PyTorch: {missing}")
        return TorchDecoder(folder, options)
    return NativeDecoder(folder, model, options)
