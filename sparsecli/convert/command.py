"""`sparsecli sparsify-convert`: a dense model to a faster one, with its loss before and after, and its speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import transformers
from pydantic import ValidationError

from sparsecli.console import Failure, RecipeError
from sparsecli.convert.conversion import Conversion
from sparsecli.convert.methods import BLOCK, METHODS, method_of
from sparsecli.convert.peers import check_names, usable
from sparsecli.convert.plan import (
    Candidate,
    candidates,
    read_bytes,
    small_enough,
    with_attention,
    with_quantization,
)
from sparsecli.convert.preview import Preview
from sparsecli.convert.report import Report
from sparsecli.convert.stopping import stoppable
from sparsecli.convert.text import data_of, read_text
from sparsecli.convert.work import fingerprint, place_of, tidy, work_folder
from sparsecli.decode.native import binding
from sparsecli.interchange.importing import check_tokenizer, model_folder
from sparsecli.interchange.sources import OwnModel, open_source
from sparsecli.model.loading import load_model
from sparsecli.recipe.budget import parse_budget
from sparsecli.recipe.data import TextSpec
from sparsecli.recipe.loader import LoadedRecipe, require
from sparsecli.recipe.schema import ConvertedFeedForward, ConvertSpec, Recipe
from sparsecli.spec.feed_forward import DenseFeedForwardSpec
from sparsecli.spec.model import ModelSpec, QuantizationSpec
from sparsecli.train import run_directory


def run(
    loaded: LoadedRecipe,
    *,
    model: str | None,
    output: Path,
    peers: Sequence[str] | None = None,
    dry_run: bool = False,
    format: str = "table",
) -> Report | None:
    """Convert the dense model and print the report; a dry run prints the plan.

    An earlier attempt that was stopped goes on. `peers` go before those of the recipe.

    Raises:
        RecipeError: the recipe's layers do not fit the dense model.
        Failure: no such model, `output` is taken or cannot be written, or the text cannot be read or does not fit.
        Mismatch: the budget cannot be met, or what was written does not compute what was converted.
        Stopped: after SIGTERM or SIGINT.
    """
    with stoppable():
        report = _run(loaded, model, output, peers or (), dry_run, format)
    if report:
        report.show(format)
    return report


def _run(
    loaded: LoadedRecipe, model: str | None, output: Path, peers: Sequence[str], dry_run: bool, format: str
) -> Report | None:
    require(loaded, "convert")
    recipe, file = _with_peers(loaded.recipe, peers), loaded.path.name
    assert recipe.convert
    reference = model or recipe.convert.model
    if reference is None:
        raise RecipeError(f"{file}: convert.model: missing; name the dense model here or with --model")
    if missing := binding.available():
        raise Failure(
            f"sparsify-convert checks its result in the native engine, which is not there: {missing}"
        )
    if output.name in ("", ".."):
        raise Failure(f"{output}: --output has to name the folder itself, not the one that it is in")
    opened = open_source(reference, weights=not dry_run)
    found = _candidates(opened.spec, recipe.convert, file)
    if recipe.convert.budget:
        small_enough(found, parse_budget(recipe.convert.budget))
    if not dry_run:
        tidy(output)
    run_directory.claim(output, recipe, resume=False, hint="choose another --output")
    folder = opened.folder if isinstance(opened, OwnModel) else place_of(output) / "dense"
    data = _data(recipe, folder, opened.spec, file)
    with_llama = usable(recipe.convert.peers, opened.spec)
    if dry_run:
        check_tokenizer(opened)
        found = sorted(found, key=lambda each: each.bytes_per_token)
        dense_bytes = read_bytes(opened.spec, "bfloat16")
        Preview(opened.reference, dense_bytes, recipe.convert, data, str(output), found).show(format)
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = opened.folder if isinstance(opened, OwnModel) else opened.path
    with work_folder(output, recipe, fingerprint(source)) as work:
        model_folder(opened, folder)
        dense, tokenizer = load_model(folder)
        tokens = recipe.convert.calibration_tokens, recipe.convert.tuning_tokens
        text = read_text(data, *tokens, recipe.seed, imported=dense.config.origin is not None)
        conversion = Conversion(
            recipe, recipe.convert, reference, folder, dense, tokenizer, text, work, output, with_llama
        )
        return conversion.run(found)


def _with_peers(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The recipe with these peers, where there are any. Raises `Failure` for an unknown one."""
    if not names or recipe.convert is None:
        return recipe
    chosen = recipe.convert.model_copy(update={"peers": check_names(names)})
    return recipe.model_copy(update={"convert": chosen})


def _candidates(dense: ModelSpec, convert: ConvertSpec, file: str) -> list[Candidate]:
    """What the conversion may end at: the recipe's layers, or everything that a search tries.

    Raises:
        RecipeError: the model is not dense, or nothing fits it.
    """
    if dense.encoder or dense.residual == "reversible":
        what = "has an encoder" if dense.encoder else "is reversible"
        raise RecipeError(f"{file}: convert.model: it {what}; decoders of one stream are converted")
    layer = dense.feed_forward
    if not isinstance(layer, DenseFeedForwardSpec):
        raise RecipeError(
            f"{file}: convert.model: its feed-forward layers are {layer.kind} already, not dense"
        )
    if dense.quantization != QuantizationSpec():
        raise RecipeError(f"{file}: convert.model: is in few bits already")
    if layer.gated and layer.bias:
        raise RecipeError(
            f"{file}: convert.model: gated feed-forward layers with biases cannot be converted yet"
        )
    dtype = convert.decode_dtype
    dense = _attended(dense, convert, file)
    if convert.quantization is not None:
        try:
            with_quantization(dense, convert.quantization)
        except ValueError as error:
            raise RecipeError(f"{file}: convert.quantization: {_reason(error)}") from error
    if convert.budget is None:
        given = convert.feed_forward
        spec = given_spec(dense, given, convert.quantization or QuantizationSpec(), file)
        return [Candidate(spec, method_of(spec.feed_forward), read_bytes(spec, dtype))]
    fitting = [name for name, method in METHODS.items() if method.fits(layer)]
    if not fitting:
        raise RecipeError(
            f"{file}: convert.model: {layer.d_ff} units are no whole blocks of {BLOCK}, which a search needs"
        )
    methods = convert.methods or fitting
    if unfit := [name for name in methods if name not in fitting]:
        raise RecipeError(
            f"{file}: convert.methods: {unfit[0]} needs a ReLU without a gate; this model allows {', '.join(fitting)}"
        )
    distils = convert.distillation.tokens > 0
    return candidates(dense, methods, convert.rank, dtype, convert.quantization, distils)


def _attended(dense: ModelSpec, convert: ConvertSpec, file: str) -> ModelSpec:
    """`dense` with the attention that the recipe asks for.

    Raises:
        RecipeError: this model cannot have it.
    """
    attention = dense.attention
    if convert.attention.kind == "keep":
        return dense
    if (attention.projection, attention.output) != ("dense", "dense") or attention.query_key_rank:
        raise RecipeError(f"{file}: convert.attention: the model's own is not made by dense maps any more")
    try:
        return with_attention(dense, convert.attention)
    except ValueError as error:
        raise RecipeError(f"{file}: convert.attention: {_reason(error)}") from error


def given_spec(
    dense: ModelSpec, layer: ConvertedFeedForward | None, quantization: QuantizationSpec, file: str
) -> ModelSpec:
    """The architecture after a conversion into a given layer; None leaves feed-forward layers dense.

    Raises:
        RecipeError: `layer` differs from the dense one in a way that units cannot be copied.
    """
    where, theirs = f"{file}: convert.feed_forward", dense.feed_forward
    assert isinstance(theirs, DenseFeedForwardSpec)
    if layer is None:
        return with_quantization(dense, quantization)
    if layer.d_ff != theirs.d_ff:
        raise RecipeError(f"{where}.d_ff: {layer.d_ff}, but the dense model has {theirs.d_ff} units")
    for name in ("activation", "gated"):
        if getattr(layer, name) != getattr(theirs, name):
            expected = getattr(theirs, name)
            raise RecipeError(f"{where}.{name}: {getattr(layer, name)}, but the dense model has {expected}")
    if getattr(layer, "rank", 0) > dense.d_model:
        raise RecipeError(f"{where}.rank: {layer.rank} is more than the model's width {dense.d_model}")  # type: ignore[union-attr]
    changed = {"feed_forward": layer.model_copy(update={"unit_bias": theirs.bias})}
    try:
        return ModelSpec(**{**dict(with_quantization(dense, quantization)), **changed})
    except ValueError as error:
        raise RecipeError(f"{where}: {_reason(error)}") from error


def _reason(error: ValueError) -> str:
    return error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)


def _data(recipe: Recipe, folder: Path, spec: ModelSpec, file: str) -> TextSpec:
    data = data_of(recipe, folder, spec)
    if data.sequence_length > spec.max_positions:
        raise RecipeError(
            f"{file}: data.sequence_length: {data.sequence_length} is longer than the dense model's context of "
            f"{spec.max_positions}"
        )
    return data
