"""Feed-forward layers: dense, sparse (paper section 3.1) and a mixture of experts.

Shapes: d residual width, d_ff units, N units of a block, k chosen of each, r rank of the controller. Unit-major
means that the d weights of one unit lie side by side, so that reading a chosen unit is one contiguous read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecli.model.layers import exploring, native_units
from sparsecli.model.layers.balancing import load_balancing_loss, with_loss
from sparsecli.model.layers.choices import recorded_choice
from sparsecli.model.layers.dropout import shared_dropout
from sparsecli.model.layers.tracing import tracing

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


class DenseFeedForward(nn.Module):
    """y = W_down act(W_up x + b) + b, or W_down (act(W_gate x) * W_up x) when gated."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: str = "relu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias) if gated else None
        self.up = nn.Linear(d_model, d_ff, bias)
        self.down = nn.Linear(d_ff, d_model, bias)
        self.activation = activation
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> (B, T, d)."""
        activation = ACTIVATIONS[self.activation]
        up = self.up(x)
        if self.gate is not None:
            h = activation(self.gate(x)) * up
        else:
            h = activation(
                shared_dropout(up, self.dropout, self.training, (-2,))
            )  # before the ReLU, as the original
        return shared_dropout(self.down(h), self.dropout, self.training, (-2,))


def choose(scores: Tensor, count: int) -> Tensor:
    """Indices (..., count) of the largest scores of the last axis, best first; of equal ones the lowest index.

    On a CPU a few maxima are several times faster than sorting, and `max` is faster than `argmax`. Torch's top-k has no
    rule for equal scores, which ReLU makes many of.
    """
    if count > 4:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    best = [scores.max(dim=-1, keepdim=True).indices]
    for _ in range(count - 1):
        scores = scores.scatter(-1, best[-1], -torch.inf)
        best.append(scores.max(dim=-1, keepdim=True).indices)
    return torch.cat(best, dim=-1) if count > 1 else best[0]


def training_mask(
    logits: Tensor, count: int, temperature: float, hard_fraction: float
) -> tuple[Tensor, Tensor]:
    """The mask of a training call and whether it is hard (paper section 3.1).

    With probability `hard_fraction`, drawn once for the whole call, the mask is the noisy choice of `count` units
    (ones and zeros) and passes its gradient straight to the probabilities; otherwise it is `count` times the
    noise-free probabilities. Gumbel noise enters through the choice alone.

    Args:
        logits: (..., N).
    Returns:
        The mask (..., N), and a bool scalar tensor that is true for a hard draw.
    """
    p = logits.float().softmax(dim=-1)
    scores = logits.detach().float()
    if temperature > 0:
        uniform = torch.rand_like(scores).clamp_(1e-6, 1 - 1e-6)
        gumbel = uniform.log_().neg_().log_().neg_()
        scores = scores + temperature * gumbel  # logits differ from log p by a shift, which changes no choice
    chosen = recorded_choice(lambda: choose(scores, count), below=scores.shape[-1])
    one_hot = torch.zeros_like(p).scatter_(-1, chosen, 1.0)
    straight_through = one_hot + (p - p.detach())
    if hard_fraction >= 1:
        return straight_through, torch.ones((), dtype=torch.bool, device=p.device)
    is_hard = torch.rand((), device=p.device) < hard_fraction
    return torch.where(is_hard, straight_through, count * p), is_hard


class Controller(nn.Module):
    """Low-rank logits of every unit: z = C2 C1 x + b, with no activation in between (paper section 3.1)."""

    def __init__(self, d_model: int, d_ff: int, block_size: int, rank: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(rank, d_model))
        self.second = nn.Parameter(torch.empty(d_ff, rank))
        self.bias = nn.Parameter(torch.empty(d_ff))
        self.block_size = block_size
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.first)
        nn.init.xavier_uniform_(self.second)
        nn.init.normal_(self.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> logits (..., d_ff / N, N)."""
        z = F.linear(F.linear(x, self.first), self.second, self.bias)
        return z.unflatten(-1, (-1, self.block_size))


class ChosenUnits(nn.Module, ABC):
    """Units of which every token uses some, `units_per_block` of each block; subclasses choose them.

    For a few tokens the chosen rows alone are read, for many the dense product is masked. The two agree:
    `evaluate_gathered` has `evaluate_masked` as its readable twin.

    Args:
        d_ff, block_size, units_per_block: sizes; d_ff is a multiple of block_size.
        unit_bias: a bias on what enters the activation (none in the paper's layer).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        block_size: int,
        units_per_block: int,
        activation: str,
        gated: bool,
        unit_bias: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        if d_ff % block_size:
            raise ValueError(f"d_ff {d_ff} is not a multiple of block_size {block_size}")
        self.gate = (
            nn.Parameter(torch.empty(d_ff, d_model)) if gated else None
        )  # unit-major, as are up and down
        self.up = nn.Parameter(torch.empty(d_ff, d_model))
        self.down = nn.Parameter(torch.empty(d_ff, d_model))
        self.unit_bias = nn.Parameter(torch.empty(d_ff)) if unit_bias else None
        self.bias = nn.Parameter(torch.empty(d_model))
        self.block_size = block_size
        self.units_per_block = units_per_block
        self.activation = activation
        self.dropout = dropout

    def reset_parameters(self) -> None:
        for weight in (self.gate, self.up, self.down):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for bias in (self.unit_bias, self.bias):
            if bias is not None:
                nn.init.normal_(bias, std=1e-6)

    def evaluate(self, x: Tensor, chosen: Tensor, scale: Tensor | None = None) -> Tensor:
        """x (tokens, d), chosen (tokens, blocks, k), scale like chosen -> (tokens, d)."""
        return (self.evaluate_gathered if self.few(x) else self.evaluate_masked)(x, chosen, scale)

    def few(self, x: Tensor) -> bool:
        """Whether x (tokens, d) has so few tokens that copies of their rows are cheaper than one dense product."""
        return not tracing() and (x.shape[0] == 1 or 4 * x.shape[0] * self.units_per_block <= self.block_size)

    def evaluate_gathered(self, x: Tensor, chosen: Tensor, scale: Tensor | None = None) -> Tensor:
        """x (tokens, d), chosen (tokens, blocks, k), scale like chosen -> (tokens, d), reading chosen rows only."""
        tokens, blocks, _ = chosen.shape
        first = torch.arange(0, blocks * self.block_size, self.block_size, device=x.device)
        rows = (chosen + first[:, None]).flatten()

        def units(weight: Tensor) -> Tensor:
            """Products of x with the chosen rows: (tokens, blocks * k)."""
            read = weight.index_select(0, rows)
            if tokens == 1:  # a plain product is up to twice as fast as a batch of one
                return F.linear(x, read)
            return torch.bmm(read.view(tokens, -1, x.shape[-1]), x.unsqueeze(-1)).squeeze(-1)

        h = units(self.up if self.gate is None else self.gate)
        if self.unit_bias is not None:
            h = h + self.unit_bias[rows].view_as(h)
        h = ACTIVATIONS[self.activation](h)
        if self.gate is not None:
            h = h * units(self.up)
        if scale is not None:
            h = h * scale.flatten(1)
        if tokens == 1:
            if self.activation == "relu" and not torch.compiler.is_compiling():
                alive = h[0].nonzero().squeeze(1)  # rows of units that the ReLU silenced need not be read
                h, rows = h[:, alive], rows[alive]
            return h @ self.down.index_select(0, rows) + self.bias
        read = self.down.index_select(0, rows)
        return torch.bmm(h.unsqueeze(1), read.view(tokens, -1, x.shape[-1])).squeeze(1) + self.bias

    def evaluate_masked(self, x: Tensor, chosen: Tensor, scale: Tensor | None = None) -> Tensor:
        """The same as `evaluate_gathered`, computing every unit and masking."""
        mask = x.new_zeros(x.shape[0], self.up.shape[0] // self.block_size, self.block_size)
        mask = mask.scatter(-1, chosen, 1.0)
        after = None if scale is None else torch.zeros_like(mask).scatter(-1, chosen, scale.to(mask.dtype))
        return self._masked(x, mask, after)

    def _masked(self, x: Tensor, mask: Tensor | None, after: Tensor | None) -> Tensor:
        return self.values(x, mask, after) @ self.down + self.bias

    def values(self, x: Tensor, mask: Tensor | None = None, after: Tensor | None = None) -> Tensor:
        """Every unit's value for x (tokens, d), with `mask` (tokens, blocks, N) before the activation and `after`
        behind it: (tokens, d_ff)."""
        h = F.linear(x, self.up if self.gate is None else self.gate, self.unit_bias)
        h = ACTIVATIONS[self.activation](h if mask is None else h * mask.flatten(1).to(h.dtype))
        if self.gate is not None:
            h = h * F.linear(x, self.up)
        if after is not None:
            h = h * after.flatten(1).to(h.dtype)
        return h

    @abstractmethod
    def mask(self, x: Tensor) -> Tensor:
        """Which units of each block decoding uses for x (tokens, d): ones and zeros (tokens, blocks, N)."""


class SparseFeedForward(ChosenUnits):
    """Sparse FF (paper section 3.1): a low-rank controller chooses the units that take part.

    Training multiplies the mask in before the activation, as the paper does. Evaluation takes the controller's argmax.
    On a CPU both compute chosen rows alone where that is exact (`native_units`), else every unit.

    Args:
        d_ff, block_size, rank, units_per_block: sizes; d_ff is a multiple of block_size.
        unit_bias: a bias on what enters the activation (none in the paper's layer).
        hard_fraction, temperature: training behaviour, see `training_mask`.
        explored_fraction: share of tokens whose controllers learn from every unit (0 in the paper), see `exploring`.
        probability_gate: multiply a chosen unit by its probability (off in the paper).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        block_size: int,
        rank: int,
        units_per_block: int = 1,
        activation: str = "relu",
        gated: bool = False,
        unit_bias: bool = False,
        hard_fraction: float = 0.3,
        temperature: float = 0.1,
        probability_gate: bool = False,
        dropout: float = 0.0,
        explored_fraction: float = 0.0,
    ) -> None:
        super().__init__(d_model, d_ff, block_size, units_per_block, activation, gated, unit_bias, dropout)
        self.controller = Controller(d_model, d_ff, block_size, rank)
        self.hard_fraction = hard_fraction
        self.explored_fraction = explored_fraction
        self.temperature = temperature
        self.probability_gate = probability_gate
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d)."""
        tokens = x.reshape(-1, x.shape[-1])
        if (self.training or not self.few(tokens)) and native_units.usable(self, tokens):
            y = native_units.chosen_rows(self, tokens)
        elif self.training:
            y = self.masked_product(tokens)
        else:
            logits = self.controller(tokens)  # (tokens, blocks, N)
            chosen = recorded_choice(lambda: choose(logits, self.units_per_block), below=self.block_size)
            scale = logits.softmax(dim=-1).gather(-1, chosen) if self.probability_gate else None
            y = self.evaluate(tokens, chosen, scale)
        # One dropout mask for all tokens, as in the original, which drops after flattening batch and length.
        return shared_dropout(y, self.dropout, self.training, (-2,)).view_as(x)

    def mask(self, x: Tensor) -> Tensor:
        """See `ChosenUnits.mask`."""
        logits = self.controller(x)
        return torch.zeros_like(logits).scatter_(-1, choose(logits, self.units_per_block), 1.0)

    def masked_product(self, x: Tensor) -> Tensor:
        """The paper's training call, which multiplies every unit by the mask: twin of `native_units.chosen_rows`."""
        if self.units_per_block == self.block_size and not self.probability_gate:
            return self._masked(
                x, None, None
            )  # nothing is left to choose, as in the first stage of a training
        logits = self.controller(x)  # (tokens, blocks, N)
        mask, is_hard = training_mask(logits, self.units_per_block, self.temperature, self.hard_fraction)
        if self.explored_fraction:
            return self._explored_product(x, logits, mask.detach())
        after = None
        if self.probability_gate:  # soft draws carry the probability already
            after = torch.where(is_hard, logits.detach().softmax(dim=-1), 1.0)
        return self._masked(x, mask, after)

    def _explored_product(self, x: Tensor, logits: Tensor, chosen: Tensor) -> Tensor:
        """The same with the mask behind the activation, for the hard mask `chosen` (tokens, blocks, N)."""
        p = logits.float().softmax(dim=-1)
        passed = p * exploring.weights(chosen, *exploring.draw(self.explored_fraction, len(x)))
        mask = chosen + passed - passed.detach()
        after = mask * p.detach() if self.probability_gate else mask
        return self._masked(x, None, after)


class MixtureFeedForward(nn.Module):
    """Mixture of experts over slices of consecutive units: the layers the paper compares with, and those of Mixtral.

    Without `probability_gate` the chosen expert enters with weight 1 and the router learns through a
    straight-through mask; with it the mask is hard times probability, as in Switch Transformer.

    Args:
        bias: on the sum of the experts.
        probability_gate: `probability` multiplies what an expert's units read by its router probability,
            `output_probability` what it gives; None for neither.
        normalize_probabilities: divide the probabilities of the chosen experts by their sum.
        load_balancing: weight of the loss that keeps all experts in use, over all tokens of a training call, padding
            included; see `load_balancing_loss`. It enters the backward pass, not the value that is minimised.
    """

    balancing: Tensor | None = None
    """That loss in the last training call, not weighted."""
    balancing_share: float = 1.0
    """Share of an optimizer step that a training call is; below 1 where gradients of several are accumulated."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        experts: int,
        experts_per_token: int = 1,
        activation: str = "relu",
        gated: bool = False,
        bias: bool = True,
        hard_fraction: float = 0.5,
        temperature: float = 0.7,
        probability_gate: str | None = None,
        normalize_probabilities: bool = False,
        load_balancing: float = 0.01,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if d_ff % experts:
            raise ValueError(f"d_ff {d_ff} is not a multiple of experts {experts}")
        self.router = nn.Linear(d_model, experts, bias=False)
        # Unit-major, an expert's units side by side.
        self.gate = nn.Parameter(torch.empty(d_ff, d_model)) if gated else None
        self.up = nn.Parameter(torch.empty(d_ff, d_model))
        self.down = nn.Parameter(torch.empty(d_ff, d_model))
        self.bias = nn.Parameter(torch.empty(d_model)) if bias else None
        self.experts = experts
        self.experts_per_token = experts_per_token
        self.activation = activation
        self.hard_fraction = hard_fraction
        self.temperature = temperature
        self.probability_gate = probability_gate
        self.normalize_probabilities = normalize_probabilities
        self.load_balancing = load_balancing
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.gate, self.up, self.down):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.bias is not None:
            nn.init.normal_(self.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d)."""
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.router(tokens)  # (tokens, experts)
        if self.training:
            y = shared_dropout(self._masked(tokens, *self._training_masks(logits)), self.dropout, True, (-2,))
            y = self._balanced(y, logits)
        else:
            chosen = choose(logits, self.experts_per_token)
            scale = self._scale(logits, chosen)
            if tracing() or (torch.compiler.is_compiling() and tokens.shape[0] > 1):
                y = self.evaluate_masked(tokens, chosen, scale)
            elif tokens.shape[0] == 1:
                y = self.evaluate_sliced(tokens, chosen, scale)
            else:
                y = self.evaluate_by_expert(tokens, chosen, scale)
        return y.view_as(x)

    def _scale(self, logits: Tensor, chosen: Tensor) -> Tensor | None:
        """Probabilities of the chosen experts (tokens, k); None where there is no gate."""
        if not self.probability_gate:
            return None
        scale = logits.float().softmax(dim=-1).gather(-1, chosen)
        return scale / scale.sum(dim=-1, keepdim=True) if self.normalize_probabilities else scale

    def _training_masks(self, logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What multiplies the experts (tokens, experts): before their activations, and behind."""
        if not self.probability_gate:
            mask = training_mask(logits, self.experts_per_token, self.temperature, self.hard_fraction)[0]
            return mask, None
        noisy, _ = training_mask(logits.detach(), self.experts_per_token, self.temperature, hard_fraction=1.0)
        mask = noisy * logits.float().softmax(dim=-1)
        if self.normalize_probabilities:
            mask = mask / mask.sum(dim=-1, keepdim=True)
        return (mask, None) if self.probability_gate == "probability" else (None, mask)

    def _balanced(self, y: Tensor, logits: Tensor) -> Tensor:
        """y with the load-balancing loss of what decoding would choose, noise left out and soft draws alike."""
        chosen = recorded_choice(lambda: choose(logits.detach(), self.experts_per_token), below=self.experts)
        loss = load_balancing_loss(logits, chosen)
        self.balancing = loss.detach()
        return with_loss(y, loss, self.load_balancing * self.balancing_share) if self.load_balancing else y

    def evaluate_sliced(self, x: Tensor, chosen: Tensor, scale: Tensor | None = None) -> Tensor:
        """x (1, d), chosen (1, k) -> (1, d), reading the chosen experts only."""

        def units(weight: Tensor) -> Tensor:
            """Rows of the chosen experts (k * units of an expert, d)."""
            return weight.view(self.experts, -1, x.shape[-1])[chosen[0]].flatten(0, 1)

        factor = None if scale is None else scale[0, :, None].to(x.dtype)
        before = factor if self.probability_gate == "probability" else None

        def products(weight: Tensor) -> Tensor:
            """Products of x with them (k, units of an expert)."""
            made = F.linear(x, units(weight)).view(chosen.shape[1], -1)
            return made if before is None else made * before

        h = ACTIVATIONS[self.activation](products(self.up if self.gate is None else self.gate))
        if self.gate is not None:
            h = h * products(self.up)
        if factor is not None and before is None:
            h = h * factor
        y = h.flatten()[None] @ units(self.down)
        return y if self.bias is None else y + self.bias

    def evaluate_by_expert(self, x: Tensor, chosen: Tensor, scale: Tensor | None = None) -> Tensor:
        """x (tokens, d), chosen (tokens, k), scale like chosen -> (tokens, d), reading each chosen expert once."""
        gate, up, down = (
            None if weight is None else weight.view(self.experts, -1, x.shape[-1])
            for weight in (self.gate, self.up, self.down)
        )
        assert up is not None
        assert down is not None
        y = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows, choices = (chosen == expert).nonzero(as_tuple=True)
            factor = None if scale is None else scale[rows, choices, None].to(x.dtype)
            read = x[rows]
            if factor is not None and self.probability_gate == "probability":
                read, factor = read * factor, None
            first = F.linear(read, up[expert] if gate is None else gate[expert])
            h = ACTIVATIONS[self.activation](first)
            if gate is not None:
                h = h * F.linear(read, up[expert])
            given = h @ down[expert]
            given = given if factor is None else given * factor
            y.index_add_(0, rows, given.to(y.dtype))  # narrower within autocast
        return y if self.bias is None else y + self.bias

    def evaluate_masked(self, x: Tensor, chosen: Tensor, scale: Tensor | None = None) -> Tensor:
        """The same as `evaluate_by_expert`, computing every unit and masking: where a program is recorded."""
        values = torch.ones_like(chosen, dtype=x.dtype) if scale is None else scale.to(x.dtype)
        mask = x.new_zeros(x.shape[0], self.experts).scatter(-1, chosen, values)
        behind = self.probability_gate == "output_probability"
        return self._masked(x, None, mask) if behind else self._masked(x, mask, None)

    def _masked(self, x: Tensor, before: Tensor | None, behind: Tensor | None) -> Tensor:
        def of_units(mask: Tensor) -> Tensor:
            return mask.to(x.dtype).repeat_interleave(self.up.shape[0] // self.experts, dim=-1)

        h, up = F.linear(x, self.up if self.gate is None else self.gate), None
        if self.gate is not None:
            up = F.linear(x, self.up)
        if before is not None:
            h, up = h * of_units(before), None if up is None else up * of_units(before)
        h = ACTIVATIONS[self.activation](h)
        if up is not None:
            h = h * up
        if behind is not None:
            h = h * of_units(behind)
        y = h @ self.down
        return y if self.bias is None else y + self.bias
