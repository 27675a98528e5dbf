"""Linear layers and embeddings whose weights keep the codes of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecli.model.gguf_types import LANES, TYPES, values


class GgufWeight(nn.Module):
    """A matrix (rows, cols) in one of GGUF's types, not trained: `codes` (panels, bytes) uint8, see gguf_types.py.

    Args:
        kind: the name of the type, such as `Q4_K`.
    """

    codes: Tensor

    def __init__(self, rows: int, cols: int, kind: str) -> None:
        super().__init__()
        self.rows, self.cols, self.kind = rows, cols, TYPES[kind]
        self.register_buffer("codes", torch.zeros(self.kind.panel_shape(rows, cols), dtype=torch.uint8))

    @property
    def weight(self) -> Tensor:
        """float32 (rows, cols), dequantised when it is asked for."""
        return torch.from_numpy(values(self.kind, self.codes.cpu().numpy(), self.rows, self.cols)).to(
            self.codes.device
        )


class GgufLinear(GgufWeight):
    """x (..., cols) -> (..., rows)."""

    def __init__(self, rows: int, cols: int, kind: str, bias: bool) -> None:
        super().__init__(rows, cols, kind)
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., cols) -> (..., rows)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class GgufEmbedding(GgufWeight):
    """Token ids (...) -> (..., cols) float32."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., cols)."""
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


def use_gguf_modules(model: nn.Module, kinds: Mapping[str, str], prefix: str = "") -> None:
    """Put modules of GGUF's types in the place of linear layers and embeddings.

    Args:
        kinds: the types by the modules' names; those that do not begin with `prefix` are none of `model`.
    """
    for name, kind in kinds.items():
        if not name.startswith(prefix):
            continue
        place = name.removeprefix(prefix)
        old = model.get_submodule(place)
        if isinstance(old, nn.Embedding):
            new: nn.Module = GgufEmbedding(old.num_embeddings, old.embedding_dim, kind)
        else:
            assert isinstance(old, nn.Linear)
            new = GgufLinear(old.out_features, old.in_features, kind, old.bias is not None)
        model.set_submodule(place, new)
