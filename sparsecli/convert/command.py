"""`sparsecli sparsify-convert`: a trained dense model to a sparse one, with its loss before and after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch import Tensor

from sparsecli import console
from sparsecli.console import Mismatch, RecipeError, progress
from sparsecli.convert.calibration import feed_forward_inputs
from sparsecli.convert.feed_forward import copy_units, fit_controller
from sparsecli.convert.report import Report, Stage
from sparsecli.data.packing import PackedCorpus, Windows, pack
from sparsecli.model.architecture import DenseFeedForwardSpec, ModelSpec, SparseFeedForwardSpec
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.checkpoint import load_model, read_config
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.folder import find_model, share
from sparsecli.model.layers.feed_forward import DenseFeedForward, SparseFeedForward
from sparsecli.model.sizes import count_parameters
from sparsecli.recipe.loader import LoadedRecipe, dump, load, require
from sparsecli.recipe.schema import ConvertSpec, DataSpec, Recipe, SavedTokenizer
from sparsecli.train import run_directory
from sparsecli.train.distillation import distil
from sparsecli.train.evaluation import HeldOut, evaluate

Layer = TypeVar("Layer", DenseFeedForward, SparseFeedForward)


def run(
    loaded: LoadedRecipe, *, model: str | None, output: Path, dry_run: bool = False, format: str = "table"
) -> Report | None:
    """Convert the dense model and print the report; a dry run prints the plan.

    Raises:
        RecipeError: the recipe's sparse layer does not fit the dense model.
        Failure: no such model, `output` is taken or cannot be written, or the text cannot be read.
        Mismatch: what was written does not compute what was converted.
    """
    require(loaded, "convert")
    recipe = loaded.recipe
    assert recipe.convert
    reference = model or recipe.convert.model
    if reference is None:
        raise RecipeError(
            f"{loaded.path.name}: convert.model: missing; name the dense model here or with --model"
        )
    source = find_model(reference)
    spec = sparse_spec(read_config(source).spec, recipe.convert.feed_forward, loaded.path.name)
    data = _corpus_of(recipe, source)
    if data.sequence_length > spec.max_positions:
        raise RecipeError(
            f"{loaded.path.name}: data.sequence_length: {data.sequence_length} is longer than the dense model's "
            f"context of {spec.max_positions}"
        )
    run_directory.claim(output, recipe, resume=False, hint="choose another --output")
    if dry_run:
        _print_plan(recipe.convert, source, spec, data, output)
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dense, _ = load_model(source)
    report = _convert(recipe, recipe.convert, dense, spec, pack(data), data, source, output)
    report.show(format)
    return report


def sparse_spec(dense: ModelSpec, sparse: SparseFeedForwardSpec, file: str) -> ModelSpec:
    """The architecture after conversion: `dense` with its feed-forward layers replaced.

    Raises:
        RecipeError: the model is not dense, or `sparse` differs from it in a way that units cannot be copied.
    """
    layer = dense.feed_forward
    where = f"{file}: convert.feed_forward"
    if not isinstance(layer, DenseFeedForwardSpec):
        raise RecipeError(
            f"{file}: convert.model: its feed-forward layers are {layer.kind} already, not dense"
        )
    if sparse.d_ff != layer.d_ff:
        raise RecipeError(f"{where}.d_ff: {sparse.d_ff}, but the dense model has {layer.d_ff} units")
    for name in ("activation", "gated"):
        if getattr(sparse, name) != getattr(layer, name):
            expected = getattr(layer, name)
            raise RecipeError(f"{where}.{name}: {getattr(sparse, name)}, but the dense model has {expected}")
    if sparse.rank > dense.d_model:
        raise RecipeError(f"{where}.rank: {sparse.rank} is more than the model's width {dense.d_model}")
    if layer.gated and layer.bias:
        raise RecipeError(f"{where}: a gated dense layer with biases cannot be converted yet")
    return dense.model_copy(update={"feed_forward": sparse.model_copy(update={"unit_bias": layer.bias})})


def _print_plan(convert: ConvertSpec, source: Path, spec: ModelSpec, data: DataSpec, output: Path) -> None:
    sizes, dense = count_parameters(spec), count_parameters(read_config(source).spec)
    layer = convert.feed_forward
    rows = [
        ("dense model", str(source)),
        ("units kept per token", f"{layer.units_per_block} of every {layer.block_size}"),
        ("parameters", f"{dense.total:,} → {sizes.total:,}"),
        ("weights read per token", f"{dense.active:,} → {sizes.active:,}"),
        (
            "calibration",
            f"{convert.calibration_tokens:,} tokens, {convert.controller_steps} steps a controller",
        ),
        ("distillation", f"{convert.distillation.tokens:,} tokens"),
        ("files", f"recipe.yaml, run.json, report.json, report.md, model/ in {output}"),
    ]
    console.print_table(["plan", ""], rows)


def _corpus_of(recipe: Recipe, source: Path) -> DataSpec:
    """The recipe's text, or that of the run which trained the dense model; always with the model's own tokenizer."""
    data = recipe.data
    stored = source.parent / run_directory.RECIPE
    if data is None and stored.is_file():
        data = load(str(stored)).recipe.data
    if data is None:
        raise RecipeError(
            "this recipe needs a `data:` block: the dense model's folder does not say what it was trained on"
        )
    return data.model_copy(update={"tokenizer": SavedTokenizer(kind="saved", path=str(source))})


def _convert(
    recipe: Recipe,
    convert: ConvertSpec,
    dense: ScalingTransformerForCausalLM,
    spec: ModelSpec,
    corpus: PackedCorpus,
    data: DataSpec,
    source: Path,
    output: Path,
) -> Report:
    generator = torch.Generator().manual_seed(recipe.seed)
    windows = corpus.train.windows(data.sequence_length)
    held_out = corpus.held_out.windows(data.sequence_length, data.held_out_tokens)
    bytes_per_token = held_out.bytes_per_token(corpus.tokenizer)
    stages: list[Stage] = []

    def note(name: str, network: ScalingTransformerForCausalLM) -> None:
        figures = evaluate(network, held_out, bytes_per_token)
        assert isinstance(figures, HeldOut)
        reference = stages[0].nats_per_token if stages else figures.nats_per_token
        change = figures.nats_per_token / reference - 1
        stages.append(Stage(name, figures.nats_per_token, figures.bits_per_byte, change))
        console.say(f"{name}: held-out {figures.nats_per_token:.4f} nats per token ({change:+.2%})")

    note("dense", dense)
    sparse = _with_units_of(dense, spec)
    with progress("fitting controllers", spec.layers) as bar:
        inputs = feed_forward_inputs(dense, _batches(windows, generator), convert.calibration_tokens)
        captured = []
        for layer, x in zip(_layers(sparse, SparseFeedForward), inputs, strict=True):
            captured.append(fit_controller(layer, x, convert.controller_steps, generator))
            bar.advance(1, captured_share=captured[-1])
    note("controllers fitted", sparse)
    if convert.distillation.tokens:
        training = convert.distillation.training(data.sequence_length)
        distil(
            sparse,
            dense,
            corpus,
            data,
            convert.distillation,
            training,
            recipe.seed,
            output / "distillation",
            "convert again with another --output",
        )
        note("distilled", sparse)

    dense_sizes, sizes = count_parameters(dense.config.spec), count_parameters(spec)
    report = Report(
        source=str(source),
        output=str(output),
        kept_fraction=spec.kept_fraction,
        dense_parameters=dense_sizes.total,
        sparse_parameters=sizes.total,
        dense_bytes_per_token=dense_sizes.bytes_per_token("float32", context=0),
        sparse_bytes_per_token=sizes.bytes_per_token("float32", context=0),
        captured_share=captured,
        stages=stages,
    )
    with run_directory.writing(output, "convert again with another --output"):
        _write(recipe, report, sparse, corpus, output)
    return report


def _with_units_of(dense: ScalingTransformerForCausalLM, spec: ModelSpec) -> ScalingTransformerForCausalLM:
    """A model of `spec` with the weights of `dense`, its units in the sparse layers, and fresh controllers."""
    tokens = {name: getattr(dense.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sparse = ScalingTransformerForCausalLM(ScalingTransformerConfig.from_spec(spec, **tokens)).eval()
    kept = {name: value for name, value in dense.state_dict().items() if ".feed_forward." not in name}
    sparse.load_state_dict(kept, strict=False)
    for theirs, ours in zip(
        _layers(dense, DenseFeedForward), _layers(sparse, SparseFeedForward), strict=True
    ):
        copy_units(theirs, ours)
    return sparse


def _layers(model: ScalingTransformerForCausalLM, kind: type[Layer]) -> list[Layer]:
    """The feed-forward layers of one kind, from the first block to the last."""
    return [layer for layer in model.modules() if isinstance(layer, kind)]


def _batches(windows: Windows, generator: torch.Generator, size: int = 8) -> Iterator[Tensor]:
    """Token ids (size, T) of windows in random order."""
    for rows in torch.randperm(len(windows), generator=generator).split(size):
        yield torch.stack([windows[int(row)]["input_ids"] for row in rows])


def _write(
    recipe: Recipe, report: Report, model: ScalingTransformerForCausalLM, corpus: PackedCorpus, output: Path
) -> None:
    """The run directory. What is written is read back and compared; the recipe, which marks a run, comes last.

    Raises:
        Mismatch: the model on disk does not compute what the one in memory does.
    """
    output.mkdir(parents=True, exist_ok=True)
    beside = output / "model.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    corpus.tokenizer.save_pretrained(beside)
    _verify(model, beside)
    share(beside)
    beside.rename(output / "model")
    run_directory.replace_text(output / "report.md", report.markdown())
    run_directory.replace_text(output / "report.json", json.dumps(report.as_json(), indent=2) + "\n")
    last = report.stages[-1]
    figures = {"held_out_nats": last.nats_per_token, "bits_per_byte": last.bits_per_byte}
    facts = run_directory.environment() | {"source": report.source, "seed": recipe.seed, "result": figures}
    run_directory.write_facts(output, facts)
    resolved = recipe.model_copy(update={"output": str(output)})
    run_directory.replace_text(output / run_directory.RECIPE, dump(resolved))


@torch.no_grad()
def _verify(model: ScalingTransformerForCausalLM, folder: Path) -> None:
    written, _ = load_model(folder)
    ids = torch.arange(min(32, model.config.max_positions)).unsqueeze(0) % model.config.vocab_size
    difference = (written(ids).logits - model(ids).logits).abs().max().item()
    if not difference <= 1e-5:
        raise Mismatch(f"{folder}: logits differ by {difference:.1e} from those of the converted model")
