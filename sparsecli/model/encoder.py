"""The encoder, which reads its input in both directions before the decoder writes."""

from __future__ import annotations

from torch import Tensor, nn

from sparsecli.model.layers.dropout import shared_dropout
from sparsecli.model.layers.reversible import Half, reversible_stack
from sparsecli.model.transformer_layers import (
    EncoderLayer,
    ReversibleLayer,
    build_norm,
    build_positions,
    build_rotary,
    merged,
    run_halves,
)
from sparsecli.spec.model import ModelSpec


class Encoder(nn.Module):
    """Positions, layers, and the norm or merge that the decoder of `spec` needs.

    For cross-attention that is a norm. A reversible encoder has two streams: as a prefix the decoder reads both, or
    one, which is a linear layer of their mean and a norm.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.encoder
        self.max_positions = spec.encoder.max_positions
        self.position_embedding = build_positions(spec, self.max_positions)
        self.rotary = build_rotary(spec)
        self.dropout = spec.dropout
        self.reversible = spec.residual == "reversible"
        self.layers = nn.ModuleList(
            ReversibleLayer(spec, layer_idx, of_encoder=True)
            if self.reversible
            else EncoderLayer(spec, layer_idx)
            for layer_idx in range(spec.encoder.layers)
        )
        read_by = spec.encoder.read_by
        self.streams = read_by.streams if read_by.kind == "prefix" else 1
        self.merge = nn.Linear(spec.d_model, spec.d_model) if self.reversible and self.streams == 1 else None
        self.norm = build_norm(spec) if self.streams == 1 else None

    def forward(
        self, x: Tensor, valid: Tensor | None, position_ids: Tensor, keep_streams: bool = False
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Embedded tokens x (B, S, d) -> one or two streams (B, S, d); rows of padding mean nothing.

        Args:
            valid: bool (B, S), false at padding; None where there is none.
            position_ids: (B or 1, S).
            keep_streams: also return the stream before each layer (of two the mean).
        Raises:
            ValueError: no tokens at all, or more than the encoder has positions for.
        """
        length = x.shape[1]
        if length == 0:
            raise ValueError("the source has no tokens; an empty one is a single end of text")
        if self.position_embedding is not None:
            if length > self.max_positions:
                raise ValueError(
                    f"a source of {length} tokens is longer than the encoder's max_positions {self.max_positions}"
                )
            x = x + self.position_embedding(position_ids.expand(x.shape[:2])).to(x.dtype)
        x = shared_dropout(x, self.dropout, self.training, (-2,))
        angles = self.rotary(position_ids) if self.rotary else None
        mask = None
        if valid is not None:
            # A row without any token looks at its padding: what it sees means nothing, but it is finite.
            mask = (valid | ~valid.any(dim=-1, keepdim=True))[:, None, None, :]  # (B, 1, 1, S)
        kept: list[Tensor] = []
        if not self.reversible:
            for layer in self.layers:
                if keep_streams:
                    kept.append(x)
                x = layer(x, mask, valid, angles)
            assert self.norm is not None
            return (self.norm(x),), kept
        halves: list[list[Half]] = []
        for layer in self.layers:
            assert isinstance(layer, ReversibleLayer)
            halves.append(layer.halves(mask, valid, angles))
        (a, b), kept = run_halves(halves, (x, x), reversible_stack, keep_streams)
        if self.merge is None or self.norm is None:
            return (a.to(x.dtype), b.to(x.dtype)), kept
        return (self.norm(self.merge(merged(a, b, "mean").to(x.dtype))),), kept
