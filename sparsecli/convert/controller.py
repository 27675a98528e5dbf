"""A controller that is fitted to choose among the units of a dense feed-forward layer."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecli.model.layers.feed_forward import SparseFeedForward, choose
from sparsecli.train.controllers import controller_loss, unit_scores


@torch.no_grad()
def start_controller(sparse: SparseFeedForward, x: Tensor) -> None:
    """Start the controller as the best low-rank copy of the units' pre-activations on x (tokens, d).

    The error is measured on x, not on the weights: with the Cholesky factor L of x^T x, the truncated singular
    value decomposition of W L, taken back by L^-1, is the best rank-r map for these inputs (conversion by an
    activation-whitened decomposition). A unit counts by the norm of its row of W_down.
    """
    weight = sparse.up if sparse.gate is None else sparse.gate
    importance = sparse.down.norm(dim=-1)
    target = (importance[:, None] * weight).double()
    covariance = x.double().T @ x.double() / len(x)
    covariance.diagonal().add_(1e-4 * covariance.diagonal().mean().clamp(min=1e-12))  # may be a subspace
    factor = torch.linalg.cholesky(covariance)
    left, values, right = torch.linalg.svd(target @ factor, full_matrices=False)
    rank = sparse.controller.first.shape[0]
    first = torch.linalg.solve_triangular(factor, right[:rank], upper=False, left=False)
    bias = torch.zeros_like(importance) if sparse.unit_bias is None else importance * sparse.unit_bias
    # Logits of unit spread: a softmax over them is neither flat nor already certain.
    spread = (x.double() @ first.T @ (left[:, :rank] * values[:rank]).T + bias).std()
    spread = spread.clamp(min=1e-12)  # units that add nothing have none
    sparse.controller.first.copy_(first)
    sparse.controller.second.copy_(left[:, :rank] * values[:rank] / spread)
    sparse.controller.bias.copy_(bias / spread)


def fit_controller(
    sparse: SparseFeedForward, x: Tensor, steps: int, generator: torch.Generator, batch_size: int = 1024
) -> float:
    """Fit the controller on x (tokens, d): cross-entropy towards each block's shares of the output.

    The start is kept where it already chooses better than the fit, as it does at a generous rank. Returns the share
    of the total score that the chosen units hold, relative to a perfect choice (1 is perfect).
    """
    start_controller(sparse, x)
    scores = unit_scores(sparse, x)
    started = captured_share(sparse, x, scores)
    start = {name: value.clone() for name, value in sparse.controller.state_dict().items()}
    optimizer = torch.optim.Adam(sparse.controller.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        rows = torch.randint(len(x), (min(batch_size, len(x)),), generator=generator)
        optimizer.zero_grad()
        controller_loss(sparse, x[rows], scores[rows]).backward()
        optimizer.step()
    fitted = captured_share(sparse, x, scores)
    if fitted < started:
        sparse.controller.load_state_dict(start)
    return max(fitted, started)


@torch.no_grad()
def captured_share(sparse: SparseFeedForward, x: Tensor, scores: Tensor) -> float:
    """Score held by the controller's choice over that of the best choice, on x (tokens, d)."""
    k = sparse.units_per_block
    chosen = scores.gather(-1, choose(sparse.controller(x), k)).sum()
    best = scores.gather(-1, choose(scores, k)).sum()
    return (chosen / best.clamp(min=1e-12)).item()
