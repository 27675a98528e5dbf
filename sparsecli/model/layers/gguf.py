"""Linear layers and embeddings whose weights keep the codes of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecli.model.gguf_types import HEAD_LANES, LANES, SKETCH, TYPES, row_values, values


class GgufWeight(nn.Module):
    """A matrix (rows, cols) in one of GGUF's types, not trained: `codes` (panels, bytes) uint8, see gguf_types.py.

    Args:
        kind: the name of the type, such as `Q4_K`.
        by_rows: `codes` are (rows, bytes of a row), as in a GGUF file, because rows are read one by one.
    """

    codes: Tensor

    def __init__(self, rows: int, cols: int, kind: str, by_rows: bool = False) -> None:
        super().__init__()
        self.rows, self.cols, self.kind, self.by_rows = rows, cols, TYPES[kind], by_rows
        shape = (rows, self.kind.row_bytes(cols)) if by_rows else self.kind.panel_shape(rows, cols)
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.uint8))

    @property
    def weight(self) -> Tensor:
        """float32 (rows, cols), dequantised when it is asked for."""
        codes = self.codes.cpu().numpy()
        shape = self.rows, self.cols
        found = row_values(self.kind, codes) if self.by_rows else values(self.kind, codes, *shape)
        return torch.from_numpy(found).to(self.codes.device)


class GgufLinear(GgufWeight):
    """x (..., cols) -> (..., rows)."""

    def __init__(self, rows: int, cols: int, kind: str, bias: bool, by_rows: bool = False) -> None:
        super().__init__(rows, cols, kind, by_rows)
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., cols) -> (..., rows)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class GgufEmbedding(GgufWeight):
    """Token ids (...) -> (..., cols) float32."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., cols)."""
        if self.by_rows:
            rows = row_values(self.kind, self.codes[ids.flatten()].cpu().numpy())
            return torch.from_numpy(rows).to(ids.device).view(*ids.shape, self.cols)
        panels, place = torch.unique(ids.flatten() // LANES, return_inverse=True)
        found = values(self.kind, self.codes[panels].cpu().numpy(), len(panels) * LANES, self.cols)
        rows = place * LANES + ids.flatten() % LANES
        return torch.from_numpy(found).to(ids.device)[rows].view(*ids.shape, self.cols)


class TiedHead(nn.Module):
    """x (..., cols) -> logits (..., rows) with the embedding's weights, which are no second tensor."""

    def __init__(self, embedding: GgufEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # a tuple, so that it is no submodule

    @property
    def embedding(self) -> GgufEmbedding:
        """The embedding, whose weights these are."""
        return self._embedding[0]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., cols) -> (..., rows)."""
        return F.linear(x, self.embedding.weight.to(x.dtype))


def rescored(sketched: Tensor, exact: Tensor, candidates: int) -> Tensor:
    """The logits (..., V) of a sketch, but for its likeliest tokens the exact ones.

    Args:
        candidates: tokens that are exact, a multiple of HEAD_LANES: as many of every lane, which is every
            HEAD_LANES-th panel of LANES tokens, so that threads can share them out.
    """
    vocabulary = sketched.shape[-1]
    width = HEAD_LANES * LANES
    filled = F.pad(sketched, (0, -vocabulary % width), value=-torch.inf)
    lanes = (
        filled.unflatten(-1, (-1, HEAD_LANES, LANES)).movedim(-2, -3).flatten(-2)
    )  # (..., HEAD_LANES, V / 16)
    best = lanes.topk(min(candidates // HEAD_LANES, lanes.shape[-1]), dim=-1).indices
    chosen = torch.zeros_like(lanes, dtype=torch.bool).scatter_(-1, best, True)
    chosen = chosen.unflatten(-1, (-1, LANES)).movedim(-3, -2).flatten(-3)[..., :vocabulary]
    return torch.where(chosen, exact, sketched)


def _sketched(sketch: Tensor, weight: GgufWeight, bias: Tensor | None, x: Tensor) -> Tensor:
    """x (..., cols) -> logits (..., rows) of the sketch of `weight`."""
    found = values(SKETCH, sketch.cpu().numpy(), weight.rows, weight.cols)
    return F.linear(x, torch.from_numpy(found).to(x.device, x.dtype), bias)


class SketchedLinear(GgufLinear):
    """Logits of `sketch` (panels, bytes) uint8, the weights in 2 bits; those of the likeliest tokens are exact.

    Args:
        candidates: see `rescored`.
    """

    sketch: Tensor

    def __init__(self, rows: int, cols: int, kind: str, bias: bool, candidates: int) -> None:
        super().__init__(rows, cols, kind, bias, by_rows=True)
        self.candidates = candidates
        self.register_buffer("sketch", torch.zeros(SKETCH.panel_shape(rows, cols), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., cols) -> (..., rows)."""
        return rescored(_sketched(self.sketch, self, self.bias, x), super().forward(x), self.candidates)


class SketchedTiedHead(TiedHead):
    """The same with the embedding's weights, which have to lie by rows."""

    sketch: Tensor

    def __init__(self, embedding: GgufEmbedding, candidates: int) -> None:
        super().__init__(embedding)
        self.candidates = candidates
        shape = SKETCH.panel_shape(embedding.rows, embedding.cols)
        self.register_buffer("sketch", torch.zeros(shape, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., cols) -> (..., rows)."""
        return rescored(_sketched(self.sketch, self.embedding, None, x), super().forward(x), self.candidates)


def use_gguf_modules(
    model: nn.Module,
    kinds: Mapping[str, str],
    prefix: str = "",
    head: str = "",
    candidates: int | None = None,
) -> None:
    """Put modules of GGUF's types in the place of linear layers and embeddings.

    Args:
        kinds: the types by the modules' names; those that do not begin with `prefix` are none of `model`.
        head: the module with the weights of the logits, which has a sketch if there are `candidates`.
    """
    for name, kind in kinds.items():
        if not name.startswith(prefix):
            continue
        place = name.removeprefix(prefix)
        old = model.get_submodule(place)
        of_sketch = candidates if name == head else None
        if isinstance(old, nn.Embedding):
            new: nn.Module = GgufEmbedding(old.num_embeddings, old.embedding_dim, kind, bool(of_sketch))
        else:
            assert isinstance(old, nn.Linear)
            plain = old.out_features, old.in_features, kind, old.bias is not None
            new = SketchedLinear(*plain, of_sketch) if of_sketch else GgufLinear(*plain)
        model.set_submodule(place, new)
