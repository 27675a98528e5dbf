"""Decoding in PyTorch: the model as transformers loads it. torch is imported when a decoder is made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsecli.console import Failure
from sparsecli.generate.decoder import DEFAULT_DTYPE, DecoderOptions


class TorchDecoder:
    """The model in PyTorch with a preallocated cache: see `Decoder`.

    Raises:
        Failure: the options ask for a type that only the native backend has, or the weights do not load.
    """

    name = "torch"

    def __init__(self, folder: Path, options: DecoderOptions) -> None:
        if options.dtype in ("int8", "int4"):
            raise Failure(f"--dtype {options.dtype}: only the native backend has this type")
        if options.cache_dtype is not None:
            raise Failure(f"--cache-dtype {options.cache_dtype}: only the native backend has this option")
        import torch
        from transformers.utils import logging

        from sparsecli.model.loading import load_network

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        logging.set_verbosity_error()
        self.dtype = self.cache_dtype = options.dtype or DEFAULT_DTYPE
        self.isa = torch.backends.cpu.get_cpu_capability()
        self.threads = torch.get_num_threads()
        self.network = load_network(folder, getattr(torch, self.dtype))
        self.encoder_outputs: Any = None

    def prefill(self, prompt: Sequence[int], capacity: int) -> np.ndarray:
        import torch

        from sparsecli.model.cache import DecodeCache

        model, spec = self.network.model, self.network.config.spec
        if spec.encoder:
            with torch.inference_mode():
                self.encoder_outputs = model.encode(torch.tensor([list(prompt)]))
            capacity += model.prefix_length(len(prompt))
            prompt = [self.network.config.decoder_start_token_id]
        self.cache = DecodeCache.for_model(spec, capacity)
        self.tokens = list(prompt)
        return self._logits(prompt)

    def step(self, token: int) -> np.ndarray:
        self.tokens.append(token)
        if len(self.tokens) - 1 == self.network.config.spec.rotary_switch:  # other frequencies from here on
            self.cache.reset()
            return self._logits(self.tokens)
        return self._logits([token])

    def _logits(self, tokens: Sequence[int]) -> np.ndarray:
        import torch

        ids = torch.tensor([list(tokens)])
        encoded = self.encoder_outputs
        inputs = {"decoder_input_ids": ids, "encoder_outputs": encoded} if encoded else {"input_ids": ids}
        with torch.inference_mode():
            output = self.network(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            return output.logits[0, -1].float().numpy()

    def close(self) -> None:
        """Nothing is held outside of Python."""


class TorchEncoder:
    """The encoder of a model, as transformers loads it. The blocks of the decoder are freed."""

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

    def encode(self, input_ids: Sequence[int]) -> np.ndarray:
        """The encoder's hidden states (streams, L, d) of L tokens; there are 1 or 2 streams."""
        import torch

        with torch.inference_mode():
            rows = self.model.encode(torch.tensor([list(input_ids)])).last_hidden_state[0]  # (L, streams * d)
            return torch.stack(rows.split(self.model.config.d_model, dim=-1)).numpy()
