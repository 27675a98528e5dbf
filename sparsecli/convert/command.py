"""`sparsecli sparsify-convert`: checks the recipe and the dense model, then previews or runs the conversion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from sparsecli import console
from sparsecli.bench.peers import PEERS
from sparsecli.console import Failure, RecipeError
from sparsecli.convert import page
from sparsecli.convert.candidates import (
    ConversionCandidate,
    ConversionPreview,
    list_candidates,
    rounds,
    weight_bytes_per_token,
)
from sparsecli.convert.report import Report
from sparsecli.convert.resume import (
    delete_leftover,
    fingerprint,
    open_work_folder,
    stop_on_signals,
    work_path,
)
from sparsecli.convert.run import Conversion, measured_threads
from sparsecli.convert.search import within_size_budget
from sparsecli.convert.text import choose_data, read_text
from sparsecli.decode.native import binding
from sparsecli.interchange.importing import check_source_tokenizer, model_folder
from sparsecli.interchange.sources import ForeignModel, OwnModel, open_source
from sparsecli.interchange.stored_weights import stored_weights
from sparsecli.model.loading import load_model, stored_dtype
from sparsecli.recipe.budget import parse_budget
from sparsecli.recipe.data import TextSpec
from sparsecli.recipe.loader import LoadedRecipe, require
from sparsecli.recipe.schema import ConvertSpec, Recipe
from sparsecli.report import files
from sparsecli.spec.model import ModelSpec
from sparsecli.train import run_directory

PEER_NAMES = ("llama.cpp",)


def run(
    loaded: LoadedRecipe,
    *,
    model: str | None,
    output: Path,
    peers: Sequence[str] | None = None,
    dry_run: bool = False,
    format: str = "table",
    html: Path | None = None,
    plot: Path | None = None,
) -> Report | None:
    """Convert the dense model and print the report; a dry run prints the plan.

    A stopped conversion resumes. `peers` replace those of the recipe. `html` and `plot` are files for a page and a
    figure of the report.

    Raises:
        RecipeError: the recipe's layers do not fit the dense model.
        Failure: there is no such model, `output` exists or cannot be written, or the text cannot be read or does not
            fit.
        Mismatch: the budget cannot be met, or the written model differs from the converted one.
        Stopped: after SIGTERM or SIGINT.
    """
    with stop_on_signals():
        plan = _check(loaded, model, output, peers or (), dry_run)
        if dry_run:
            _preview(plan, format)
            return None
        report = _convert(plan)
    report.show(format)
    files.write_reports(report, (html, page.write_html), (plot, page.write_figure))
    return report


def show_saved(
    path: Path, *, format: str = "table", html: Path | None = None, plot: Path | None = None
) -> Report:
    """Print the report in `path`, the `report.json` of a conversion, and write it as a page and as a figure.

    Raises:
        Failure: the file is no such report, or another one cannot be written.
    """
    report = Report.read(path)
    report.show(format)
    files.write_reports(report, (html, page.write_html), (plot, page.write_figure))
    return report


@dataclass(frozen=True)
class _Plan:
    """A conversion whose recipe and model are checked.

    Attributes:
        reference: the dense model as the user named it.
        folder: the dense model as a model folder of ours, which an import creates.
        with_llama: whether llama.cpp is measured too.
    """

    recipe: Recipe
    convert: ConvertSpec
    reference: str
    source: OwnModel | ForeignModel
    folder: Path
    data: TextSpec
    output: Path
    candidates: list[ConversionCandidate]
    with_llama: bool


def _check(
    loaded: LoadedRecipe, model: str | None, output: Path, peers: Sequence[str], dry_run: bool
) -> _Plan:
    require(loaded, "convert")
    recipe, file = _with_peers(loaded.recipe, peers), loaded.path.name
    assert recipe.convert
    reference = model or recipe.convert.model
    if reference is None:
        raise RecipeError(f"{file}: convert.model: missing; name the dense model here or with --model")
    if missing := binding.available():
        raise Failure(f"sparsify-convert checks its result in the native engine, which is missing: {missing}")
    if output.name in ("", ".."):
        raise Failure(f"{output}: --output must name the folder itself, not its parent")
    measured_threads(recipe)
    source = open_source(reference, weights=not dry_run)
    candidates = list_candidates(source.spec, recipe.convert, file)
    if recipe.convert.budget:
        within_size_budget(candidates, parse_budget(recipe.convert.budget))
    if not dry_run:
        delete_leftover(output)
    run_directory.claim(output, recipe, resume=False, hint="choose another --output")
    # Another budget may resume with another method, which needs the weights in another form.
    name = "dense-as-it-is" if rounds(recipe.convert, source.spec) else "dense"
    folder = source.folder if isinstance(source, OwnModel) else work_path(output) / name
    data = _choose_data(recipe, folder, source.spec, file)
    with_llama = measures_llama(recipe.convert.peers, source.spec)
    return _Plan(recipe, recipe.convert, reference, source, folder, data, output, candidates, with_llama)


def _preview(plan: _Plan, format: str) -> None:
    check_source_tokenizer(plan.source)
    candidates = sorted(plan.candidates, key=lambda each: each.bytes_per_token)
    dense_bytes = weight_bytes_per_token(plan.source.spec, "bfloat16")
    preview = ConversionPreview(
        plan.source.reference, dense_bytes, plan.convert, plan.data, str(plan.output), candidates
    )
    preview.show(format)


def _convert(plan: _Plan) -> Report:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    recipe, convert, source = plan.recipe, plan.convert, plan.source
    weights = source.folder if isinstance(source, OwnModel) else source.path
    with open_work_folder(plan.output, recipe, fingerprint(weights)) as work:
        keeps_types = rounds(convert, source.spec)
        model_folder(source, plan.folder, keeps_types)
        dense, tokenizer = load_model(
            plan.folder, stored_dtype(plan.folder) if keeps_types else torch.float32
        )
        tokens = convert.calibration_tokens, convert.tuning_tokens
        text = read_text(plan.data, *tokens, recipe.seed, imported=dense.config.origin is not None)
        conversion = Conversion(
            recipe=recipe,
            convert=convert,
            reference=plan.reference,
            folder=plan.folder,
            dense=dense,
            tokenizer=tokenizer,
            text=text,
            work=work,
            output=plan.output,
            with_llama=plan.with_llama,
            source_weights=stored_weights(source),
        )
        return conversion.run(plan.candidates)


def _choose_data(recipe: Recipe, folder: Path, spec: ModelSpec, file: str) -> TextSpec:
    data = choose_data(recipe, folder, spec)
    if data.sequence_length > spec.max_positions:
        raise RecipeError(
            f"{file}: data.sequence_length: {data.sequence_length} is longer than the dense model's context of "
            f"{spec.max_positions}"
        )
    return data


# -- peers ---------------------------------------------------------------------------------------------------


def _with_peers(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The recipe with these peers, if there are any. Raises `Failure` for an unknown one."""
    if not names or recipe.convert is None:
        return recipe
    chosen = recipe.convert.model_copy(update={"peers": check_peer_names(names)})
    return recipe.model_copy(update={"convert": chosen})


def check_peer_names(names: Sequence[str]) -> list[str]:
    """`names` without repetitions. Raises `Failure` for one that a conversion cannot measure."""
    for name in names:
        if name not in PEER_NAMES:
            raise Failure(f"--peer: {name!r} is not one of {', '.join(PEER_NAMES)}", exit_code=2)
    return list(dict.fromkeys(names))


def measures_llama(names: Sequence[str], dense: ModelSpec) -> bool:
    """Whether llama.cpp is requested and can run the dense model; if it cannot, a warning gives the reason."""
    if not names:
        return False
    reason = PEERS["llama.cpp"].missing()
    if reason is None:
        from sparsecli.convert import llama_cpp  # needs optional packages

        reason = llama_cpp.unsupported_reason(dense)
    if reason:
        console.warn(f"llama.cpp is not measured: {reason}")
    return reason is None
