"""Compares a training step of Sparse FF with PyTorch's dense layer: forward and backward of one layer on a CPU.

    python -m sparsecli.bench.studies.training_step --d-model 1024 --d-ff 14784 --block-size 64 --tokens 2048

Layers take turns on the same random inputs, whose gradient is computed, too. Sparse FF counts with its controller and
noise, in float32, from chosen rows; `masked` is its twin, which computes every unit. Neither a loss nor an optimizer
is measured. SPARSECLI_ISA chooses the instruction set of the rows' code, not of PyTorch's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsecli import console
from sparsecli.decode.native import binding
from sparsecli.model.layers import native_units
from sparsecli.model.layers.feed_forward import DenseFeedForward, SparseFeedForward


@dataclass
class Measured:
    """A layer, and the seconds of each of its steps: forward and backward."""

    name: str
    layer: nn.Module
    compute: Callable[[Tensor], Tensor]
    bfloat16: bool
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def step(self, x: Tensor, dy: Tensor, counts: bool) -> None:
        """One forward and backward pass; noted if it counts."""
        self.layer.zero_grad()
        x = x.clone().requires_grad_()
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            y = self.compute(x)
        between = time.perf_counter()
        y.backward(dy.to(y.dtype))
        end = time.perf_counter()
        if counts:
            self.forward.append(between - begin)
            self.backward.append(end - between)

    @property
    def seconds(self) -> float:
        """Median time of a step."""
        return statistics.median(map(sum, zip(self.forward, self.backward, strict=True)))


def measure(
    d_model: int,
    d_ff: int,
    block_size: int,
    rank: int,
    units_per_block: int,
    tokens: int,
    rounds: int,
    masked: bool,
) -> list[Measured]:
    """Times of the dense layer in both types, of chosen rows and, on request, of the masked product."""
    torch.manual_seed(0)
    dense = DenseFeedForward(d_model, d_ff)
    sparse = SparseFeedForward(d_model, d_ff, block_size, rank, units_per_block, hard_fraction=1.0)
    x, dy = torch.randn(2, tokens, d_model)
    cases = [
        Measured("dense, float32", dense, dense, False),
        Measured("dense, bfloat16", dense, dense, True),
        Measured("Sparse FF, chosen rows", sparse, lambda x: native_units.chosen_rows(sparse, x), False),
    ]
    if masked:
        cases.append(Measured("Sparse FF, masked product, bfloat16", sparse, sparse.masked_product, True))
    for turn in range(rounds + 1):
        for case in cases:
            case.step(x, dy, counts=turn > 0)
    return cases


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--d-ff", type=int, default=14784)
    parser.add_argument("--block-size", type=int, default=64, help="N")
    parser.add_argument("--units-per-block", type=int, default=1, help="k")
    parser.add_argument("--rank", type=int, default=64, help="of the controller")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--masked", action="store_true", help="measure the masked product, too")
    options = vars(parser.parse_args(arguments))
    reason = binding.available()
    if reason:
        raise console.Failure(reason)
    cases = measure(**options)
    fastest = min(case.seconds for case in cases if case.name.startswith("dense"))
    rows = [
        (
            case.name,
            f"{1e3 * statistics.median(case.forward):.1f}",
            f"{1e3 * statistics.median(case.backward):.1f}",
            f"{1e3 * case.seconds:.1f}",
            f"{fastest / case.seconds:.2f}x",
        )
        for case in cases
    ]
    title = f"milliseconds of a step, {torch.get_num_threads()} threads, {binding.isa()}, torch {torch.__version__}"
    console.print_table(("layer", "forward", "backward", "step", "against dense"), rows, title)


if __name__ == "__main__":
    with console.failing():
        main()
