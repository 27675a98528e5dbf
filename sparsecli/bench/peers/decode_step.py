"""One decode step of our own model with its caches as arguments, for programs that compile it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsecli.bench.random_weights import empty_model
from sparsecli.model.layers.layer_cache import LayerCache
from sparsecli.spec.model import ModelSpec


class DecodeStep(nn.Module):
    """token (1, 1), position (1,) and the caches -> the greedy next token (1, 1) and the updated caches.

    A block's caches are keys and values (1, H, positions, d_head) and, for each of its convolutions over positions,
    the rows that the next one needs (1, before, width).
    """

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.spec = spec
        self.causal_lm = empty_model(spec)
        self.causal_lm.load_state_dict(dict(weights), strict=False, assign=True)
        self.causal_lm.tie_weights()
        self.eval()
        self.requires_grad_(False)
        self.dtype = next(self.parameters()).dtype

    def new_caches(self, positions: int) -> list[Tensor]:
        """Zeros for every block: keys and values of this number of positions, and the convolutions' rows."""
        spec, attention = self.spec, self.spec.attention
        heads = attention.key_value_heads or spec.heads
        cached = 1, heads, positions, spec.d_model // spec.heads
        kept = [(1, attention.kernel - 1, width) for width in self._convolutions().values()]
        shapes = [cached, cached, *kept]
        return [torch.zeros(shape, dtype=self.dtype) for _ in range(spec.layers) for shape in shapes]

    def _convolutions(self) -> dict[str, int]:
        """Width of the state of each convolution in a block, by attention's name for it."""
        spec, attention = self.spec, self.spec.attention
        kept = {}
        if attention.projection.endswith("_conv"):
            kept["projection"] = spec.d_model * (1 if attention.value_concat == "none" else 2)
        if attention.output_projection == "multiplicative_conv":
            kept["output"] = spec.d_model
        return kept

    def _by_block(self, caches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """Keys, values and the convolutions' rows of every block."""
        names = list(self._convolutions())
        size = 2 + len(names)
        for start in range(0, len(caches), size):
            keys, values, *rows = caches[start : start + size]
            yield keys, values, dict(zip(names, rows, strict=True))

    def _next(
        self, token: Tensor, position: Tensor, mask: Tensor | None, memories: Sequence[LayerCache]
    ) -> Tensor:
        model = self.causal_lm.model
        x = model.embedding(token) * model.embedding_scale
        if model.position_embedding is not None:
            x = x + model.position_embedding(position).to(x.dtype)
        angles = model.rotary(position.unsqueeze(0)) if model.rotary else None
        for block, memory in zip(model.layers, memories, strict=True):
            x = block(x, mask, None, angles, layer_cache=memory)
        return self.causal_lm.head(model.norm(x)).argmax(-1)


class FixedStep(DecodeStep):
    """A `DecodeStep` whose keys and values have room for a whole sequence; all caches are written in place."""

    def forward(self, token: Tensor, position: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        memories = [FixedMemory(position, *block) for block in self._by_block(caches)]
        mask = (torch.arange(caches[0].shape[2]) <= position).view(1, 1, 1, -1)
        return self._next(token, position, mask, memories), *caches


class GrowingStep(DecodeStep):
    """A `DecodeStep` that returns keys and values one position longer, as stateful graphs of language models do."""

    def forward(self, token: Tensor, position: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        memories = [GrowingMemory(*block) for block in self._by_block(caches)]
        following = self._next(token, position, None, memories)
        return following, *(
            cache for memory in memories for cache in (memory.keys, memory.values, *memory.rows.values())
        )


class _ConvolutionState:
    """The convolution states of `layer_cache.LayerCache`: only the last rows."""

    rows: dict[str, Tensor]

    def get_seq_length(self) -> int:
        """0, because a compiled step cannot depend on a Python number."""
        return 0

    def append(self, name: str, rows: Tensor, start: int, before: int) -> Tensor:
        """Prepend the kept rows to `rows` (1, 1, width), and keep the last `before` rows."""
        window = torch.cat((self.rows[name], rows), 1)
        self.keep(name, window[:, 1:])
        return window

    def keep(self, name: str, rows: Tensor) -> None:
        """Keep the rows (1, before, width)."""
        self.rows[name] = rows


class FixedMemory(_ConvolutionState):
    """The cache of one layer, in tensors that are written in place at `position` (1,)."""

    def __init__(self, position: Tensor, keys: Tensor, values: Tensor, rows: dict[str, Tensor]) -> None:
        self.position = position
        self.keys, self.values, self.rows = keys, values, rows

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (1, H, 1, d_head). Returns all positions; a mask must hide the later ones."""
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values

    def keep(self, name: str, rows: Tensor) -> None:
        """See `_ConvolutionState.keep`."""
        self.rows[name].copy_(rows)


class GrowingMemory(_ConvolutionState):
    """The cache of one layer, in new tensors at each call."""

    def __init__(self, keys: Tensor, values: Tensor, rows: dict[str, Tensor]) -> None:
        self.keys, self.values, self.rows = keys, values, rows

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (1, H, 1, d_head). Returns all of them."""
        self.keys = torch.cat((self.keys, keys), 2)
        self.values = torch.cat((self.values, values), 2)
        return self.keys, self.values
