"""Attention of a decoder to the encoder's output (paper section 3; the decoder of Table 1's models)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sparsecli.model.layers.layer_cache import CrossAttentionCache, with_conv_state
from sparsecli.model.layers.multiplicative import MultiplicativeConvolution


class CrossProjection(nn.Module):
    """Queries from the decoder, keys and values from the encoder's output."""

    def __init__(self, query: nn.Module, key: nn.Module, value: nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.value = query, key, value


class CrossAttention(nn.Module):
    """softmax(q k^T / sqrt(d_head)) v, with keys and values of the encoder's output, computed once and cached.

    A row of the batch whose encoder input is all padding attends to nothing: it reads zeros.

    Args:
        width: of all heads together.
        bias: on dense projections.
        dropout: of the attention weights, when training.
        query_modules: make queries by a multiplicative layer and a convolution over so many modules and `kernel`
            target positions, without an output projection; None for dense ones.
        count_area: see `ModuleConvolution`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int,
        width: int,
        bias: bool = True,
        dropout: float = 0.0,
        query_modules: int | None = None,
        kernel: int = 3,
        count_area: bool = True,
    ) -> None:
        super().__init__()
        query: nn.Module = nn.Linear(d_model, width, bias)
        if query_modules is not None:
            query = MultiplicativeConvolution(d_model, query_modules, kernel, count_area)
        self.projection = CrossProjection(
            query, nn.Linear(d_model, width, bias), nn.Linear(d_model, width, bias)
        )
        self.output = nn.Linear(width, d_model, bias) if query_modules is None else None
        self.heads = heads
        self.dropout = dropout

    def forward(
        self,
        x: Tensor,
        encoder_hidden_states: Tensor,
        encoder_valid: Tensor | None = None,
        valid: Tensor | None = None,
        layer_cache: CrossAttentionCache | None = None,
    ) -> Tensor:
        """x (B, T, d) -> (B, T, d).

        Args:
            encoder_hidden_states: (B, S, d), S at least 1.
            encoder_valid: bool (B, S), false at padding; None where there is none.
            valid: bool (B, T), false where the target is padding, which a convolution must read as zeros.
            layer_cache: keys and values of the encoder's output, and past target positions, the new ones counted.
        """
        q = self._split(self._queries(x, valid, layer_cache))
        if layer_cache is None:
            k, v = self._keys_and_values(encoder_hidden_states)
        else:
            k, v = layer_cache.compute_once(
                "cross_attention", lambda: self._keys_and_values(encoder_hidden_states)
            )
        mask = encoder_valid
        if mask is not None:
            # A softmax over nothing is not a number: rows that are all padding look everywhere, and are zeroed after.
            read = mask.any(dim=-1)[:, None, None, None]
            mask = mask[:, None, None, :] | ~read
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        if mask is not None:
            y = y * read.to(y.dtype)
        y = y.transpose(1, 2).flatten(-2)  # (B, T, heads * d_head)
        return y if self.output is None else self.output(y)

    def _queries(self, x: Tensor, valid: Tensor | None, layer_cache: CrossAttentionCache | None) -> Tensor:
        query = self.projection.query
        if not isinstance(query, MultiplicativeConvolution):
            return query(x)
        rows = query.conv_input(x)
        if valid is not None:
            rows = rows * valid.unsqueeze(-1).to(rows.dtype)
        start = 0 if layer_cache is None else layer_cache.get_seq_length() - x.shape[1]
        return query(with_conv_state(rows, query.kernel - 1, layer_cache, "cross_query", start))

    def _keys_and_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._split(self.projection.key(rows)), self._split(self.projection.value(rows))

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, heads * d_head) -> (B, heads, T, d_head)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
