"""The decode cache: preallocated, so that a token writes one row instead of copying all earlier ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from sparsecli.spec.model import ModelSpec

CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""What the installed transformers calls a cache, in arguments and outputs: 5.24 gave it a new name."""


class DecodeLayer(CacheLayerMixin):
    """Keys, values and convolution states of one attention layer, and keys and values of the encoder's output.

    Buffers hold `capacity` positions and double when that is exceeded. Convolution states are kept for every
    position, not just the last few, so that `crop` (assisted decoding) can go back any number of tokens.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, capacity: int = 256) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self.rows: dict[str, Tensor] = {}  # name -> (B, before + capacity, width); `before` zeros come first
        self.fixed: dict[str, tuple[Tensor, Tensor]] = {}  # name -> tensors (B, ...) of no position

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shape, type and device of (B, H, T, d_head)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, width = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, self.capacity, width)
        self.values = torch.zeros_like(self.keys)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H, T, d_head); return views of all (B, H, length, d_head)."""
        end = self.length + key_states.shape[-2]
        self._reserve(end)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def append(self, name: str, rows: Tensor, start: int, before: int) -> Tensor:
        """Store `rows` (B, T, width) at position `start`; return them with the `before` rows in front of them."""
        end = start + rows.shape[1]
        self._reserve(end)
        if name not in self.rows:
            self.rows[name] = rows.new_zeros(rows.shape[0], before + self.capacity, rows.shape[2])
        held = self.rows[name]
        held[:, before + start : before + end] = rows
        return held[:, start : before + end]

    def row_before(self, name: str, start: int) -> Tensor | None:
        """The row (B, width) before position `start` of what `append` stored without rows in front; None at 0."""
        return self.rows[name][:, start - 1] if start else None

    def append_and_read(self, name: str, rows: Tensor, start: int) -> Tensor:
        """Store `rows` (B, T, width) at position `start`; return all up to their end (B, start + T, width)."""
        self.append(name, rows, start, before=0)
        return self.rows[name][:, : start + rows.shape[1]]

    def compute_once(self, name: str, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The tensors (B, ...) that `compute` returned in the first call with `name`."""
        if name not in self.fixed:
            self.fixed[name] = compute()
        return self.fixed[name]

    def _reserve(self, length: int) -> None:
        if length <= self.capacity:
            return
        more = max(length, 2 * self.capacity) - self.capacity
        if self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            self.keys, self.values = (
                torch.nn.functional.pad(held, (0, 0, 0, more)) for held in (self.keys, self.values)
            )
        self.rows = {name: torch.nn.functional.pad(held, (0, 0, 0, more)) for name, held in self.rows.items()}
        self.capacity += more

    def get_seq_length(self) -> int:
        """Cached positions."""
        return self.length

    def get_max_length(self) -> int:
        """-1: the buffers grow."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that `query_length` new tokens see, and the offset of the first."""
        return self.length + query_length, 0

    def reset(self) -> None:
        """Forget every position and the encoder's output, keep the buffers."""
        self.length = 0
        self.fixed = {}

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions (transformers passes a negative number)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, got {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)

    def _change_batch(self, change: object) -> None:
        assert callable(change)
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
        self.rows = {name: change(held) for name, held in self.rows.items()}
        self.fixed = {name: (change(first), change(second)) for name, (first, second) in self.fixed.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the batch rows `beam_idx` (beam search)."""
        self._change_batch(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        self._change_batch(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some batch rows."""
        self._change_batch(lambda held: held[indices])


class DecodeCache(Cache):
    """A `DecodeLayer` for each of `layers` attention layers, with room for `capacity` positions."""

    def __init__(self, layers: int, capacity: int = 256) -> None:
        super().__init__(layers=[DecodeLayer(capacity) for _ in range(layers)])
        self.prefix_length = 0
        """Positions of the encoder's output, in front of the target's (Terraformer)."""
        self.long_rotary: bool | None = None
        """Whether the long rotary frequencies turned the keys; None where a model has no such."""

    @classmethod
    def for_model(cls, spec: ModelSpec, capacity: int = 256) -> DecodeCache:
        """The cache of the decoder of `spec`, layer by layer."""
        return cls(spec.layers * spec.attention_layers, capacity)

    @property
    def length(self) -> int:
        """Cached positions: those of the prefix, and those that transformers counts."""
        return self.layers[0].get_seq_length()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached target positions: `generate` continues after so many tokens."""
        return self.length - self.prefix_length

    def reset(self) -> None:
        """See `DecodeLayer.reset`."""
        super().reset()
        self.prefix_length = 0
        self.long_rotary = None
