"""The reference of the Python API: the objects below, whose docstrings mkdocstrings renders."""

from __future__ import annotations

INTRODUCTION = """# Python API

What other programs may import. The models are models of transformers; the engine and the results are plain objects.
Shapes use the letters of [the layers](../layers.md).
"""
SECTIONS = {
    "Models": (
        "sparsecli.model.configuration.ScalingTransformerConfig",
        "sparsecli.model.causal_lm.ScalingTransformerForCausalLM",
        "sparsecli.model.encoder_decoder.ScalingTransformerForConditionalGeneration",
        "sparsecli.model.terraformer.TerraformerForConditionalGeneration",
        "sparsecli.model.loading.load_model",
    ),
    "Layers": (
        "sparsecli.model.layers.feed_forward.SparseFeedForward",
        "sparsecli.model.layers.feed_forward.MixtureFeedForward",
        "sparsecli.model.layers.multiplicative.MultiplicativeDense",
        "sparsecli.model.layers.multiplicative.ModuleConvolution",
        "sparsecli.model.layers.reversible.reversible_stack",
    ),
    "Decode engine": (
        "sparsecli.decode.engine.Engine",
        "sparsecli.decode.packed.pack.pack",
        "sparsecli.decode.packed.precision.Precision",
        "sparsecli.decode.packed.file",
    ),
    "Recipes": (
        "sparsecli.recipe.loader.load",
        "sparsecli.recipe.schema.Recipe",
    ),
    "Results": (
        "sparsecli.bench.result.BenchResult",
        "sparsecli.bench.result.Row",
        "sparsecli.convert.report.Report",
    ),
}


def markdown() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for title, names in SECTIONS.items():
        lines += ["", f"## {title}", ""]
        for name in names:
            lines += [f"::: {name}", ""]
    return "\n".join(lines)
