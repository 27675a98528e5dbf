"""The method `controller`: a low-rank controller is fitted to choose among the units of a dense layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecli.convert.methods.base import FitOptions, Method, block_fields, copy_units
from sparsecli.model.layers.feed_forward import DenseFeedForward, SparseFeedForward, choose
from sparsecli.spec.feed_forward import DenseFeedForwardSpec, FeedForwardSpec, SparseFeedForwardSpec
from sparsecli.train.controllers import controller_loss, unit_scores


class ControllerMethod(Method):
    """Sparse FF (paper section 3.1): units chosen by a low-rank controller, the others dropped."""

    name = "controller"
    fit_groups = ((12, 8, 6, 4, 2),)
    recovers = True

    def spec(
        self, dense: DenseFeedForwardSpec, d_model: int, units_per_block: int, rank: int
    ) -> FeedForwardSpec:
        """See `Method.spec`."""
        return SparseFeedForwardSpec(
            kind="sparse",
            rank=min(rank, d_model),
            hard_fraction=1.0,
            **block_fields(dense, units_per_block),
        )

    def fit(self, dense: DenseFeedForward, layer: nn.Module, x: Tensor, options: FitOptions) -> None:
        """See `Method.fit`."""
        assert isinstance(layer, SparseFeedForward)
        copy_units(dense, layer)
        with torch.enable_grad():
            fit_controller(layer, x, options.controller_steps, options.generator)


@torch.no_grad()
def initialize_controller(sparse: SparseFeedForward, x: Tensor) -> None:
    """Initialize the controller as the best low-rank approximation of the units' pre-activations on x (tokens, d).

    The error is measured on x, not on the weights (activation-whitened decomposition): with the Cholesky factor L
    of x^T x, the truncated singular value decomposition of W L, multiplied by L^-1, is the best rank-r linear layer
    for these inputs. Units are weighted by the norms of their rows of W_down.
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
    """Fit the controller on x (tokens, d): cross-entropy with each block's shares of the output as targets.

    The initialization is kept where it already chooses better than the fit, as it does at a high rank. Returns the
    share of the total score that the chosen units have, relative to a perfect choice (1 is perfect).
    """
    initialize_controller(sparse, x)
    scores = unit_scores(sparse, x)
    initial_share = captured_share(sparse, x, scores)
    initial = {name: value.clone() for name, value in sparse.controller.state_dict().items()}
    optimizer = torch.optim.Adam(sparse.controller.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        rows = torch.randint(len(x), (min(batch_size, len(x)),), generator=generator)
        optimizer.zero_grad()
        controller_loss(sparse, x[rows], scores[rows]).backward()
        optimizer.step()
    fitted_share = captured_share(sparse, x, scores)
    if fitted_share < initial_share:
        sparse.controller.load_state_dict(initial)
    return max(fitted_share, initial_share)


@torch.no_grad()
def captured_share(sparse: SparseFeedForward, x: Tensor, scores: Tensor) -> float:
    """Total score of the controller's choice over that of the best choice, on x (tokens, d)."""
    k = sparse.units_per_block
    chosen = scores.gather(-1, choose(sparse.controller(x), k)).sum()
    best = scores.gather(-1, choose(scores, k)).sum()
    return (chosen / best.clamp(min=1e-12)).item()
