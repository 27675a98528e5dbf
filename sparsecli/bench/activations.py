"""Peak memory of a training step against depth: stored activations, checkpointed blocks, reversible blocks.

    python -m sparsecli.bench.activations --depths 4 8 16 32 --tokens 2048

Every figure is measured, in a process of its own, in the second of two steps: the peak over the step above what is
left behind it, which is the weights and their gradients. On a GPU torch counts; elsewhere Linux does (the largest
resident set).
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsecli import console
from sparsecli.model.architecture import ModelSpec
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.configuration import ScalingTransformerConfig

KINDS = ("stored", "checkpointed", "reversible")
VOCABULARY = 256  # logits are no activations of blocks: as few as may be
MIB = 2**20


@dataclass(frozen=True)
class Step:
    """What one training step needed."""

    peak: int
    """Bytes above the weights and gradients."""
    seconds: float


def architecture(kind: str, layers: int, d_model: int, attention: str, chunk: int | None) -> ModelSpec:
    """Terraformer's decoder with `layers` blocks, or the same layers with one stream (`kind` not reversible)."""
    return ModelSpec.model_validate(
        {
            "d_model": d_model,
            "layers": layers,
            "heads": d_model // 64,
            "max_positions": 2**20,
            "positions": "digits",
            "feed_forward": {"kind": "sparse", "d_ff": 4 * d_model, "block_size": 64, "rank": d_model // 16},
            "attention": {"projection": "multiplicative_conv", "kind": attention},
            "vocabulary": {"kind": "dense", "size": VOCABULARY},
            "residual": "reversible" if kind == "reversible" else "single",
            "sru": {"width": 32},
            "feed_forward_chunk": chunk,
        }
    )


def measure(kind: str, spec: ModelSpec, tokens: int, device: str) -> Step:
    """Train on one sequence of random `tokens`, twice; the second step's figures."""
    torch.manual_seed(0)
    with torch.device(device):
        model = ScalingTransformerForCausalLM(ScalingTransformerConfig.from_spec(spec)).train()
        ids = torch.randint(VOCABULARY, (1, tokens))
    if kind == "checkpointed":
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # the method has a newer name
            model.gradient_checkpointing_enable()

    def step() -> None:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()

    step()
    start = time.perf_counter()
    peak = _peak_above_rest(step, device)
    return Step(peak, time.perf_counter() - start)


def _peak_above_rest(action: Callable[[], None], device: str) -> int:
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    action()
    gc.collect()
    status = Path("/proc/self/status").read_text().splitlines()
    held = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in status)
        if name in ("VmHWM", "VmRSS")
    }
    return held["VmHWM"] - held["VmRSS"]


def in_a_process(kind: str, spec: ModelSpec, tokens: int, device: str, threads: int) -> Step:
    """`measure`, in a new process that gives memory back at once."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(
        MIB
    )  # what is freed goes back to the system; read at the start
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) as process:
        return process.submit(measure, kind, spec, tokens, device).result()


def run(
    depths: Sequence[int],
    tokens: int,
    d_model: int,
    attention: str,
    chunk: int | None,
    kinds: Sequence[str],
    device: str,
    threads: int,
) -> dict[str, list[Step]]:
    """Measure every kind at every depth and show it; the steps by kind, in the order of `depths`."""
    if torch.device(device).type != "cuda" and not Path("/proc/self/clear_refs").exists():
        raise console.Failure("peak memory: needs a GPU or Linux, which can forget a peak; use --device cuda")
    found: dict[str, list[Step]] = {}
    for kind in kinds:
        found[kind] = []
        for layers in depths:
            spec = architecture(kind, layers, d_model, attention, chunk)
            step = in_a_process(kind, spec, tokens, device, threads)
            found[kind].append(step)
            console.say(f"{kind}, {layers} layers: {step.peak / MIB:,.0f} MiB, {step.seconds:.1f} s")
    console.print_table(
        ("activations", *(f"{layers} layers, MiB" for layers in depths), "MiB a layer", "ms a layer"),
        [
            (kind, *(f"{step.peak / MIB:,.0f}" for step in steps), *_slopes(depths, steps))
            for kind, steps in found.items()
        ],
        title=f"{tokens} tokens, width {d_model}, {attention} attention, float32",
    )
    return found


def _slopes(depths: Sequence[int], steps: Sequence[Step]) -> tuple[str, str]:
    """What a layer adds, from the least to the greatest depth."""
    layers = depths[-1] - depths[0]
    memory = (steps[-1].peak - steps[0].peak) / layers / MIB
    return f"{memory:,.1f}", f"{(steps[-1].seconds - steps[0].seconds) / layers * 1000:,.0f}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m sparsecli.bench.activations", description=__doc__)
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[4, 8, 16, 32], help="numbers of blocks, two or more"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="of the sequence")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--attention", choices=("full", "lsh"), default="full")
    parser.add_argument("--chunk", type=int, help="tokens that a feed-forward layer computes at once")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = vars(parser.parse_args())
    run(**given)


if __name__ == "__main__":
    main()
