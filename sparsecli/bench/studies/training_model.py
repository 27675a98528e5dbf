"""Compares whole training steps of a recipe's variants on a CPU: forward, loss, backward and optimizer.

    python -m sparsecli.bench.studies.training_model bench-800m --layers 4 --tokens 2048

Variants take turns on the same random tokens, with products in bfloat16. Layers choose hard, so that Sparse FF computes
chosen rows alone. The first step does not count.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from sparsecli import console
from sparsecli.bench.variants import from_recipe
from sparsecli.decode.native import binding
from sparsecli.model.auto import Network, build_network
from sparsecli.recipe.loader import load
from sparsecli.spec.model import ModelSpec
from sparsecli.train.memory import keep_freed_memory


def build(spec: ModelSpec, layers: int) -> Network:
    """The model of `spec` with fewer layers, random weights and hard choices."""
    fields = spec.model_dump() | {"layers": layers}
    if spec.feed_forward.kind == "sparse":
        fields["feed_forward"]["hard_fraction"] = 1.0
    return build_network(ModelSpec.model_validate(fields)).train()


def step(model: Network, optimizer: torch.optim.Optimizer, tokens: Tensor) -> float:
    """Seconds of a step on tokens (B, T)."""
    begin = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - begin


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print a table.

    Raises:
        Failure: the recipe has no such variant, or no dense one.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", help="a recipe with bench.variants")
    parser.add_argument(
        "--variants", nargs="+", default=["dense", "+ Sparse FF", "+ Sparse FF + QKV"], help="their names"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--length", type=int, default=512, help="of a sequence")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    recipe = load(options.recipe, []).recipe
    found = {}
    if isinstance(recipe.model, ModelSpec) and recipe.bench:
        found = {variant.name: variant for variant in from_recipe(recipe.model, recipe.bench)}
    for name in options.variants:
        if name not in found:
            raise console.Failure(f"{options.recipe}: no variant {name!r}; there are: {', '.join(found)}")
    keep_freed_memory()
    seconds: dict[str, list[float]] = {name: [] for name in options.variants}
    torch.manual_seed(0)
    models = {name: build(found[name].spec, options.layers) for name in options.variants}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for name, model in models.items()
    }
    smallest = min(found[name].spec.vocabulary.size for name in options.variants)
    tokens = torch.randint(smallest, (max(options.tokens // options.length, 1), options.length))
    for turn in range(options.rounds + 1):
        for name, model in models.items():
            passed = step(model, optimizers[name], tokens)
            if turn:
                seconds[name].append(passed)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    dense = min((median[name] for name in median if found[name].group == "dense"), default=None)
    rows = [
        (
            name,
            f"{sum(weight.numel() for weight in models[name].parameters()) / 1e6:.1f}",
            f"{1e3 * time_of_step:.0f}",
            f"{tokens.numel() / time_of_step:,.0f}",
            f"{dense / time_of_step:.2f}x" if dense else None,
        )
        for name, time_of_step in median.items()
    ]
    isa = binding.isa() if binding.available() is None else "no native engine"
    title = f"{options.layers} layers, {tokens.numel()} tokens, {torch.get_num_threads()} threads, {isa}"
    console.print_table(("variant", "M parameters", "ms", "tokens/s", "against dense"), rows, title)


if __name__ == "__main__":
    with console.failing():
        main()
