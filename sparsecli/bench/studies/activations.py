"""Peak memory of a training step against depth: stored activations, checkpointed blocks, reversible blocks.

    python -m sparsecli.bench.studies.activations --depths 4 8 16 32 --tokens 2048

Every figure is measured in its own process, in the second of two steps. It is the peak of the step, minus the memory
that remains after it: the weights and their gradients. On a GPU torch gives the peak, elsewhere Linux (the largest
resident set).
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsecli import console
from sparsecli.model.auto import build_network
from sparsecli.spec.model import ModelSpec

KINDS = ("stored", "checkpointed", "reversible")
VOCABULARY = 256  # logits are not activations of blocks, so their number is the smallest possible
MIB = 2**20


@dataclass(frozen=True)
class TrainedShape:
    """A model, and the sequence that it trains on."""

    d_model: int = 256
    attention: str = "full"
    chunk: int | None = None
    """Tokens that a feed-forward layer computes at once."""
    tokens: int = 2048
    source: int = 0
    """Tokens of the encoder's input, which half of the blocks read; 0: no encoder."""

    def spec(self, kind: str, layers: int) -> ModelSpec:
        """Terraformer, or its decoder, with `layers` blocks in total. Kinds that are not reversible have one stream."""
        reversible = kind == "reversible"
        encoder = None
        if self.source:
            encoder = {
                "layers": layers // 2,
                "max_positions": self.source,
                "attention": {"kind": self.attention},
                "read_by": {"kind": "prefix" if reversible else "cross_attention"},
            }
        feed_forward = {
            "kind": "sparse",
            "d_ff": 4 * self.d_model,
            "block_size": 64,
            "rank": self.d_model // 16,
        }
        return ModelSpec.model_validate(
            {
                "d_model": self.d_model,
                "layers": layers - layers // 2 if self.source else layers,
                "heads": self.d_model // 64,
                "max_positions": self.tokens,
                "positions": "digits",
                "feed_forward": feed_forward,
                "attention": {"projection": "multiplicative_conv", "kind": self.attention},
                "vocabulary": {"kind": "dense", "size": VOCABULARY},
                "residual": "reversible" if reversible else "single",
                "sru": {"width": 32},
                "feed_forward_chunk": self.chunk,
                "encoder": encoder,
            }
        )


@dataclass(frozen=True)
class TrainingStep:
    """Memory and time of one training step."""

    activations: int
    """Peak bytes above the weights and gradients."""
    peak: int
    """Total peak bytes; on a CPU they include the program itself."""
    seconds: float


def measure(kind: str, shape: TrainedShape, layers: int, device: str) -> TrainingStep:
    """Train on one sequence of random tokens twice, and return the second step's figures."""
    torch.manual_seed(0)
    with torch.device(device):
        model = build_network(shape.spec(kind, layers)).train()
        target = torch.randint(2, VOCABULARY, (1, shape.tokens))
        read = torch.randint(2, VOCABULARY, (1, shape.source)) if shape.source else target
    if kind == "checkpointed":
        model.activation_checkpointing_enable()

    def step() -> None:
        model.zero_grad()
        model(read, labels=target).loss.backward()

    step()
    gc.collect()
    start = time.perf_counter()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peak, left = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        step()
        # both from one reading, which itself takes memory, so that the peak is never below the remaining memory
        status = Path("/proc/self/status").read_text()
        peak, left = _resident(status, "VmHWM"), _resident(status, "VmRSS")
    return TrainingStep(peak - left, peak, time.perf_counter() - start)


def _resident(status: str, name: str) -> int:
    """Bytes that Linux calls `name` in `status`, the text of /proc/self/status."""
    for line in status.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise console.Failure(f"/proc/self/status: has no {name}")


def in_a_process(kind: str, shape: TrainedShape, layers: int, device: str, threads: int) -> TrainingStep:
    """`measure` in a new process, which returns memory to the system at once."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)  # return freed memory to the system; read at the start
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) as process:
        return process.submit(measure, kind, shape, layers, device).result()


def run(
    shape: TrainedShape, depths: Sequence[int], kinds: Sequence[str], device: str, threads: int
) -> dict[str, list[TrainingStep]]:
    """Measure and show every kind at every depth. Returns the steps by kind, in the order of `depths`."""
    if torch.device(device).type != "cuda" and not Path("/proc/self/clear_refs").exists():
        raise console.Failure(
            "peak memory: needs a GPU or Linux, which can reset the peak; use --device cuda"
        )
    found: dict[str, list[TrainingStep]] = {}
    for kind in kinds:
        found[kind] = []
        for layers in depths:
            step = in_a_process(kind, shape, layers, device, threads)
            found[kind].append(step)
            figures = (
                f"{step.activations / MIB:,.0f} MiB, {step.peak / MIB:,.0f} MiB total, {step.seconds:.1f} s"
            )
            console.say(f"{kind}, {layers} layers: {figures}")
    read = f"{shape.source} + {shape.tokens}" if shape.source else f"{shape.tokens}"
    console.print_table(
        ("activations", *(f"{layers} layers, MiB" for layers in depths), "MiB a layer", "ms a layer"),
        [
            (kind, *(f"{step.activations / MIB:,.0f}" for step in steps), *_slopes(depths, steps))
            for kind, steps in found.items()
        ],
        title=f"{read} tokens, width {shape.d_model}, {shape.attention} attention, float32",
    )
    return found


def _slopes(depths: Sequence[int], steps: Sequence[TrainingStep]) -> tuple[str | None, str | None]:
    """Memory and time per added layer, from the first depth to the last; None for a single depth."""
    layers = depths[-1] - depths[0]
    if not layers:
        return None, None
    memory = (steps[-1].activations - steps[0].activations) / layers / MIB
    return f"{memory:,.1f}", f"{(steps[-1].seconds - steps[0].seconds) / layers * 1000:,.0f}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m sparsecli.bench.studies.activations")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32], help="numbers of blocks")
    parser.add_argument(
        "--tokens", type=int, default=TrainedShape.tokens, help="tokens of the sequence, or of the target"
    )
    parser.add_argument(
        "--source", type=int, default=TrainedShape.source, help="tokens of the encoder's input; 0: no encoder"
    )
    parser.add_argument("--d-model", type=int, default=TrainedShape.d_model)
    parser.add_argument("--attention", choices=("full", "lsh"), default=TrainedShape.attention)
    parser.add_argument("--chunk", type=int, help="tokens that a feed-forward layer computes at once")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    shape = TrainedShape(given.d_model, given.attention, given.chunk, given.tokens, given.source)
    run(shape, given.depths, given.kinds, given.device, given.threads)


if __name__ == "__main__":
    main()
