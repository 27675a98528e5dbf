"""The feed-forward layer of the Spark Transformer (You et al., 2025, arXiv 2506.06644).

Shapes: d residual width, n units, k of them that a token uses (about), r inputs of the predictor.

    s = K1 x[:r]                            scores, K1 (n, r)
    threshold = mean(s) + std(s) Q(1 - k/n)  where Q is the quantile function of the standard normal distribution
    h = act(max(s - threshold, 0)) * K2 x[r:]   K2 (n, d - r)
    y = V h                                 V (d, n)

Q(1 - k/n) of normally distributed scores lies below the k largest. No score is compared with another, so that the
choice takes linear time, and it is differentiable: the mean and the standard deviation have gradients, too. A unit
below the threshold is exactly zero, as act(0) = 0: neither its row of K2 nor that of V is needed.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecli.model.layers.dropout import shared_dropout
from sparsecli.model.layers.feed_forward import ACTIVATIONS
from sparsecli.model.layers.tracing import tracing

TINY = 1e-20
"""The least variance of scores: where all are equal, the gradient of their deviation is zero, not NaN."""


def statistical_top_k(scores: Tensor, count: int) -> Tensor:
    """Scores (..., n) minus their threshold, which about `count` of n normally distributed ones exceed; zero below."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    units = scores.shape[-1]
    centered = wide - wide.mean(dim=-1, keepdim=True)  # several times faster than torch.std_mean
    variance = centered.square().sum(dim=-1, keepdim=True) / (units - 1)
    deviation = variance.clamp(min=TINY).sqrt()
    return F.relu(centered - NormalDist().inv_cdf(1 - count / units) * deviation).to(scores.dtype)


class SparkFeedForward(nn.Module):
    """Spark FFN: the first inputs score the units, the others meet the units that score best.

    Training and prompts compute every unit. A single token reads the rows of the units that it keeps alone.

    Args:
        active_units: k, which the threshold aims at.
        predictor_width: r.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        active_units: int,
        predictor_width: int,
        activation: str = "gelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.predictor = nn.Parameter(torch.empty(d_ff, predictor_width))
        self.up = nn.Parameter(torch.empty(d_ff, d_model - predictor_width))  # unit-major, as is down
        self.down = nn.Parameter(torch.empty(d_ff, d_model))
        self.active_units = active_units
        self.activation = activation
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # As one matrix (n, d), which the two are in the layer that they stand for.
        limit = (6 / sum(self.down.shape)) ** 0.5
        nn.init.uniform_(self.predictor, -limit, limit)
        nn.init.uniform_(self.up, -limit, limit)
        nn.init.xavier_uniform_(self.down)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d)."""
        tokens = x.reshape(-1, x.shape[-1])
        gate, rest = self.gate(tokens), tokens[:, self.predictor.shape[1] :]
        few = not self.training and len(tokens) == 1 and not tracing() and not torch.compiler.is_compiling()
        y = self.evaluate_gathered(gate, rest) if few else self.evaluate_masked(gate, rest)
        return shared_dropout(y, self.dropout, self.training, (-2,)).view_as(x)

    def gate(self, x: Tensor) -> Tensor:
        """Activated scores of x (tokens, d): (tokens, n), zero where a unit takes no part."""
        scores = F.linear(x[:, : self.predictor.shape[1]], self.predictor)
        return ACTIVATIONS[self.activation](statistical_top_k(scores, self.active_units))

    def evaluate_gathered(self, gate: Tensor, rest: Tensor) -> Tensor:
        """gate (1, n), rest (1, d - r) -> (1, d), reading the rows of kept units only."""
        rows = gate[0].nonzero()[:, 0]
        h = gate[:, rows] * F.linear(rest, self.up.index_select(0, rows))
        return h @ self.down.index_select(0, rows)

    def evaluate_masked(self, gate: Tensor, rest: Tensor) -> Tensor:
        """gate (tokens, n), rest (tokens, d - r) -> (tokens, d): the same, computing every unit."""
        return (gate * F.linear(rest, self.up)) @ self.down
