"""Compares LSH attention with full attention: time by length, decoding, and the share of attention that it finds.

    python -m sparsecli.bench.studies.long_attention time --lengths 1024 4096 16384 65536
    python -m sparsecli.bench.studies.long_attention decode --lengths 16384
    python -m sparsecli.bench.studies.long_attention model terraformer-arxiv --lengths 4096 16384
    python -m sparsecli.bench.studies.long_attention mass runs/my-model TEXT

`time` and `decode` compare with torch's fused attention on random vectors, one layer and one sequence, in float32;
hashing, sorting and unit-length keys count. `model` decodes with a whole model of random weights in the native
engine, after the given number of tokens (of a prefix, if there is an encoder), and reports the time and memory of a
token. `mass` reads text with a trained model and reports the share of full attention's weights (queries as keys,
without a token's weight on itself) on keys that LSH finds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecli import console
from sparsecli.bench.studies import long_decoding
from sparsecli.model.cache import DecodeLayer
from sparsecli.model.files import find_model
from sparsecli.model.layers.lsh import LshAttention
from sparsecli.model.layers.shared_query_key import unit_keys
from sparsecli.model.loading import load_network, load_tokenizer, read_config
from sparsecli.recipe.loader import load
from sparsecli.spec.attention import LshSpec
from sparsecli.spec.model import ModelSpec

WIDTH = 64


@dataclass(frozen=True)
class Seconds:
    """Time of one layer for one sequence, or to decode one token."""

    length: int
    full: float
    hashed: float

    @property
    def times_faster(self) -> float:
        """Time of full attention divided by that of LSH attention."""
        return self.full / self.hashed


def vectors(length: int, heads: int, device: str, gradients: bool = False) -> tuple[Tensor, Tensor]:
    """Random queries, which are also the keys, and values (1, H, T, d_head), laid out as projections make them."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(2, 1, length, heads, WIDTH, generator=generator).to(device).transpose(2, 3)
    q, v = (x.detach().requires_grad_(gradients) for x in made)
    return q, v


def seconds(action: Callable[[], object], device: str, repeats: int) -> float:
    """Median of `repeats` runs, after one run that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def compare(length: int, spec: LshSpec, heads: int, backward: bool, device: str, repeats: int) -> Seconds:
    """Causal attention over `length` tokens, forward or forward and backward."""
    q, v = vectors(length, heads, device, gradients=backward)
    layer = LshAttention(spec).eval()
    upstream = torch.ones_like(v)

    def run(attend: Callable[[], Tensor]) -> Callable[[], object]:
        if backward:
            return lambda: torch.autograd.grad(attend(), (q, v), upstream)
        return attend

    full = run(lambda: F.scaled_dot_product_attention(q, q, v, is_causal=True))
    hashed = run(lambda: layer(q, unit_keys(q), v))
    return Seconds(length, *(seconds(action, device, repeats) for action in (full, hashed)))


@torch.inference_mode()
def compare_decoding(length: int, spec: LshSpec, heads: int, device: str, repeats: int) -> Seconds:
    """One more token after `length` of them."""
    q, v = vectors(length + 1, heads, device)
    k = unit_keys(q)
    layer, memory = LshAttention(spec).eval(), DecodeLayer(capacity=length + 1)
    layer(q[:, :, :length], *memory.update(k[:, :, :length], v[:, :, :length]), layer_cache=memory)
    token = slice(length, length + 1)

    def step(attend: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def run() -> None:
            attend(*memory.update(k[:, :, token], v[:, :, token]))
            memory.crop(-1)

        return run

    full = step(lambda keys, values: F.scaled_dot_product_attention(q[:, :, token], keys, values))
    hashed = step(lambda keys, values: layer(q[:, :, token], keys, values, layer_cache=memory))
    return Seconds(length, *(seconds(action, device, repeats) for action in (full, hashed)))


def brought_together(order: Tensor, spec: LshSpec) -> Tensor:
    """Bool (T, T): whether a query's window has a key in any round; order (rounds, T) of one head."""
    length = order.shape[1]
    chunks = order.reshape(-1, spec.chunk_length)
    shifts = range(spec.chunks_before, -spec.chunks_after - 1, -1)
    windows = torch.cat([chunks.roll(shift, 0) for shift in shifts], dim=1)
    together = torch.zeros(length, length, dtype=torch.bool, device=order.device)
    together[chunks.unsqueeze(2), windows.unsqueeze(1)] = True
    return together


def mass_found(q: Tensor, layer: LshAttention) -> Tensor:
    """Share of causal attention's weights that `layer` finds, mean over tokens, (B, H), of q (B, H, T, d_head).

    T is a multiple of the chunk length. A token's weight on itself, and the first token, do not count.
    """
    length = q.shape[2]
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu()
    orders, k = layer.order(q), unit_keys(q)
    shares = []
    for of_order, of_q, of_k in zip(orders.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1), strict=True):
        weights = (of_q @ of_k.T).masked_fill(later, float("-inf"))[1:].softmax(-1)
        shares.append((weights * brought_together(of_order, layer.spec)[1:]).sum(-1).mean())
    return torch.stack(shares).view(q.shape[:2])


@torch.inference_mode()
def mass_of_model(folder: Path, text: Path, length: int, rounds: Sequence[int]) -> list[float]:
    """Share of attention's weights found with each number of rounds, mean over the model's layers and heads.

    Raises:
        Failure: the model does not load or has an encoder, or the text is too short.
    """
    spec = read_config(folder).spec
    if spec.encoder:
        raise console.Failure(f"{folder}: has an encoder; give a model that is a decoder alone")
    if (
        spec.attention.kind != "lsh"
    ):  # full attention: the share that it would find if the model continued with LSH
        spec = spec.model_copy(update={"attention": spec.attention.model_copy(update={"kind": "lsh"})})
    network, tokenizer = load_network(folder, spec=spec), load_tokenizer(folder)
    hashing = spec.attention.hashing
    assert hashing
    length -= length % hashing.chunk_length
    ids = tokenizer(text.read_text(), return_tensors="pt", verbose=False)["input_ids"][:, :length]
    if ids.shape[1] < length:
        raise console.Failure(f"{text}: has {ids.shape[1]} tokens; give a longer text or --length")
    shares: dict[int, list[Tensor]] = {number: [] for number in rounds}

    def measure(layer: LshAttention, given: tuple[Tensor, ...]) -> None:
        for number, found in shares.items():
            spec = layer.spec.model_copy(update={"rounds": number})
            found.append(mass_found(given[0], LshAttention(spec, layer.layer).eval()))

    for module in network.modules():
        if isinstance(module, LshAttention):
            module.register_forward_pre_hook(measure)
    network(ids)
    return [float(torch.stack(found).mean()) for found in shares.values()]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m sparsecli.bench.studies.long_attention", description=__doc__)
    what = parser.add_subparsers(dest="what", required=True)
    for name, lengths in (("time", [1024, 4096, 16384, 65536]), ("decode", [4096, 16384, 65536])):
        timed = what.add_parser(name)
        timed.add_argument("--lengths", type=int, nargs="+", default=lengths, help="tokens")
        timed.add_argument("--heads", type=int, default=4, help=f"each {WIDTH} wide")
        timed.add_argument("--rounds", type=int, default=2)
        timed.add_argument("--chunk-length", type=int, default=64)
        timed.add_argument("--repeats", type=int, default=3 if name == "time" else 50)
        timed.add_argument("--device", default="cpu")
    model = what.add_parser("model")
    model.add_argument(
        "recipe", help="recipe of a decoder with LSH attention; overrides may follow", nargs="+"
    )
    model.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384], help="tokens")
    model.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "int8"))
    model.add_argument("--threads", type=int, default=None)
    model.add_argument("--layers", type=int, default=None, help="build only this number of blocks")
    model.add_argument("--rounds", type=int, default=5, help="turns of each kind of attention")
    mass = what.add_parser("mass")
    mass.add_argument("model", help="folder of a trained model or its run")
    mass.add_argument("text", type=Path, help="file to read with it")
    mass.add_argument("--length", type=int, default=2048, help="tokens")
    mass.add_argument("--rounds", type=int, nargs="+", default=[1, 2, 4, 8])
    given = parser.parse_args()
    with console.failing():
        _run(given)


def _run(given: argparse.Namespace) -> None:
    if given.what == "model":
        model = load(given.recipe[0], given.recipe[1:]).recipe.model
        if not isinstance(model, ModelSpec):
            raise console.Failure(f"{given.recipe[0]}: has no model: block of a model of text")
        options = given.dtype, given.threads, given.layers, given.rounds
        measured = list(long_decoding.compare(model, given.lengths, *options))
        long_decoding.print_table(measured, f"one token of {given.recipe[0]}, {given.dtype}")
        return
    if given.what == "mass":
        shares = mass_of_model(find_model(given.model), given.text, given.length, given.rounds)
        rows = [(number, f"{share:.1%}") for number, share in zip(given.rounds, shares, strict=True)]
        console.print_table(("rounds", "attention mass found"), rows)
        return
    spec = LshSpec(rounds=given.rounds, chunk_length=given.chunk_length)
    shape = f"{given.heads} heads, {spec.rounds} rounds, chunks of {spec.chunk_length}"
    if given.what == "time":
        for backward in (False, True):
            found = [
                compare(length, spec, given.heads, backward, given.device, given.repeats)
                for length in given.lengths
            ]
            _print(found, f"forward and backward, {shape}" if backward else f"forward, {shape}")
        return
    found = [
        compare_decoding(length, spec, given.heads, given.device, given.repeats) for length in given.lengths
    ]
    _print(found, f"one token after this number of tokens, {shape}")


def _print(found: Sequence[Seconds], title: str) -> None:
    console.print_table(
        ("tokens", "full, ms", "hashed, ms", "times faster"),
        [
            (row.length, f"{row.full * 1e3:,.2f}", f"{row.hashed * 1e3:,.2f}", f"{row.times_faster:.2f}")
            for row in found
        ],
        title=title,
    )


if __name__ == "__main__":
    main()
