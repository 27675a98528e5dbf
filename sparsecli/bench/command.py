"""The command `bench`: chooses the cases, measures them, and shows the result."""

from __future__ import annotations

import platform
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from sparsecli import console
from sparsecli.bench import cases, compare, figures, host, models, page, render, variants
from sparsecli.bench.cases import Plan
from sparsecli.bench.peers import PEERS
from sparsecli.bench.result import Bandwidth, BenchResult, Machine, Processor, weight_types
from sparsecli.bench.timing import measure
from sparsecli.bench.variants import Variant
from sparsecli.decode.engine import MAX_THREADS
from sparsecli.decode.native import binding
from sparsecli.model.sizes import count_parameters
from sparsecli.recipe.loader import LoadedRecipe
from sparsecli.recipe.schema import BenchSpec
from sparsecli.report import files
from sparsecli.spec.vision import AnySpec, VisionSpec

BETWEEN_ROUNDS = 0.05  # seconds of a probe of the memory
PROMPT = 256  # tokens of the prompt that is also read where a GGUF file is compared with a peer


def run(
    loaded: LoadedRecipe,
    *,
    dense: bool = False,
    sparse: bool = False,
    mixture: bool = False,
    names: Sequence[str] | None = None,
    over: str | None = None,
    disk_folder: Path | None = None,
    format: Literal["table", "json", "csv", "markdown"] = "table",
    against: Path | None = None,
    fail_above: float | None = None,
    output: Path | None = None,
    html: Path | None = None,
    plot: Path | None = None,
    dry_run: bool = False,
    runs: Sequence[str] = (),
) -> BenchResult | None:
    """Run the recipe's `bench:` block and show the result in `format`. Returns the result, or None for a dry run.

    `over` names a backend and a weight type, as in `torch:bfloat16`; all rows are compared with that dense row.
    `runs` are trained models to measure instead of the recipe's variants; `names` selects among either. Packed models
    that are read from disk are written to `disk_folder` (by default the working directory) during the measurement.
    `fail_above` is a fraction (0.05: five per cent). `html` and `plot` are files for a page and a figure of the result.

    Raises:
        Failure: something cannot be measured, compared or written.
        Regression: a row is slower than in `against` by more than `fail_above`.
    """
    earlier = compare.read(against) if against else None
    folder = disk_folder or Path()
    chosen = variants.choose(
        _variants(loaded, runs), dense=dense, sparse=sparse, mixture=mixture, names=names
    )
    bench = _resolved(loaded.recipe.bench or BenchSpec(), chosen, bool(runs))
    plan = cases.plan(chosen, bench)
    processor = Processor(
        cpu=host.processor()[0],
        isa=_isa(plan),
        threads=max(case.threads for case in plan.cases),
    )
    _check_over(over, plan)
    cases.check_positions(plan.cases)
    if plan.from_disk:
        host.check_evictable(folder)
        models.check_disk(plan, folder)
    if earlier and against:
        facts = {case.key: case.facts for case in plan.cases}
        compare.check_comparable(processor, facts, earlier, against)
    compared = bench.equal_sizes or bool(runs)
    if compared and plan.variants and (warning := variants.check_same_size(plan.variants)):
        console.warn(warning)
    if dry_run:
        _show_plan(plan, {"output": output, "html": html, "plot": plot}, folder, format)
        return None
    models.check_memory(plan)

    with host.threads(processor.threads):
        host.warn_if_busy("; use fewer --threads")
        result = _measure(loaded, bench, plan, processor, folder, over)
    if earlier:
        result = _compared(result, earlier, fail_above)
    _show(result, format)
    if output:
        _write(result, output)
    files.write_reports(result, {page.write_html: html, page.write_figure: plot})
    if earlier:
        _judge(result, earlier, fail_above)
    return result


def show_saved(
    path: Path,
    *,
    format: Literal["table", "json", "csv", "markdown"] = "table",
    output: Path | None = None,
    html: Path | None = None,
    plot: Path | None = None,
    against: Path | None = None,
    fail_above: float | None = None,
) -> BenchResult:
    """Show the result in a file of `bench --output`, and write it in other forms; nothing is measured.

    Raises:
        Failure: the file is no result of `bench`, it cannot be compared, or another one cannot be written.
        Regression: as for `run`.
    """
    earlier = compare.read(against) if against else None
    result = compare.read(path)
    if earlier and against:
        facts = {row.key: dict(row) for row in result.rows}
        compare.check_comparable(result.machine, facts, earlier, against)
        result = _compared(result, earlier, fail_above)
    _show(result, format)
    if output:
        _write(result, output)
    files.write_reports(result, {page.write_html: html, page.write_figure: plot})
    if earlier:
        _judge(result, earlier, fail_above)
    return result


def measure_runs(
    loaded: LoadedRecipe,
    named: Mapping[str, Path],
    earlier: BenchResult | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> BenchResult:
    """Trained models, by name, measured as the recipe's `bench:` block says, without printing a table.

    `dtypes` names the weight types of models that are not measured in those of the recipe.
    `earlier` is returned if it has the same rows, measured on the same processor in the same way. Raises `Failure` as
    `run` does.
    """
    found = variants.from_runs([str(run) for run in named.values()])
    own = {name: (dtype,) for name, dtype in (dtypes or {}).items()}
    chosen = [
        replace(variant, name=name, dtypes=own.get(name)) for name, variant in zip(named, found, strict=True)
    ]
    bench, plan = _plan_of_runs(loaded, chosen)
    models.check_memory(plan)
    threads = max(case.threads for case in plan.cases)
    processor = Processor(cpu=host.processor()[0], isa=_isa(plan), threads=threads)
    if earlier and earlier.settings == plan.settings:
        known = {name: getattr(earlier.machine, name) for name in Processor.model_fields}
        if known == dict(processor) and [row.key for row in earlier.rows] == [
            case.key for case in plan.cases
        ]:
            return earlier
    with host.threads(threads):
        host.warn_if_busy("; use fewer --threads")
        return _measure(loaded, bench, plan, processor, Path(), None)


def check_measurable(loaded: LoadedRecipe, specs: Mapping[str, AnySpec]) -> None:
    """Raise `Failure` unless trained models of these architectures, by name, could be measured by `measure_runs`."""
    chosen = [
        Variant(
            name,
            "dense",
            variants.layers_of(spec),
            count_parameters(spec),
            run=Path(),
            vision=spec if isinstance(spec, VisionSpec) else None,
        )
        for name, spec in specs.items()
    ]
    _plan_of_runs(loaded, chosen)


def _plan_of_runs(loaded: LoadedRecipe, chosen: Sequence[Variant]) -> tuple[BenchSpec, Plan]:
    bench = _resolved(loaded.recipe.bench or BenchSpec(), chosen, True)
    plan = cases.plan(chosen, bench)
    cases.check_positions(plan.cases)
    return bench, plan


# -- what to measure -----------------------------------------------------------------------------------------


def _variants(loaded: LoadedRecipe, runs: Sequence[str]) -> list[Variant]:
    recipe = loaded.recipe
    if runs:
        return variants.from_runs(runs)
    if recipe.model is None or recipe.bench is None or not recipe.bench.variants:
        block = "`model:` block" if recipe.model is None else "`bench:` block with variants"
        raise console.RecipeError(
            f"{loaded.path}: bench needs a {block}, or trained runs by --model DIR; "
            "`sparsecli bench bench-800m` measures the paper's shapes"
        )
    return variants.from_recipe(recipe.model, recipe.bench)


def _resolved(bench: BenchSpec, chosen: Sequence[Variant], trained: bool) -> BenchSpec:
    """`bench` with its backends, and with a default context for which trained models have enough positions."""
    images = _of_images(chosen)
    if images:
        _check_images(bench)
    backends = bench.backends or (["torch"] if images else _default_backends())
    if "native" in backends and (reason := binding.available()):
        raise console.Failure(f"--backend native: {reason}")
    if trained and bench.peers:
        _check_file_peers(bench.peers, chosen)
    if bench.threads and max(bench.threads) > MAX_THREADS:
        raise console.Failure(f"--threads: {max(bench.threads)} is more than {MAX_THREADS}", exit_code=2)
    if images:
        return bench.model_copy(update={"backends": backends, "context": [0]})
    context, prefill = bench.context, bench.prefill
    positions = min(variant.spec.max_positions for variant in chosen)
    if trained and "context" not in bench.model_fields_set:
        context = [max(1, min(*context, positions - bench.warmup_tokens - bench.tokens_per_round))]
    if trained and bench.peers and "prefill" not in bench.model_fields_set:
        prefill = min(PROMPT, positions)
    return bench.model_copy(update={"backends": backends, "context": context, "prefill": prefill})


def _of_images(chosen: Sequence[Variant]) -> bool:
    """Whether these are models of images. Raises `Failure` if only some are."""
    found = [variant.vision is not None for variant in chosen]
    if any(found) and not all(found):
        raise console.Failure("--model: models of text and of images are measured apart", exit_code=2)
    return all(found)


def _check_images(bench: BenchSpec) -> None:
    """Raise `Failure` for what is for models of text alone."""
    asked = {
        "--backend native": "native" in (bench.backends or ()),
        "--peer": bool(bench.peers),
        "--context": "context" in bench.model_fields_set,
        "--prefill": bench.prefill is not None,
        "--from-disk": bench.from_disk,
    }
    for option in (option for option, given in asked.items() if given):
        raise console.Failure(
            f"{option}: is for models of text; models of images run in PyTorch", exit_code=2
        )


def _check_file_peers(names: Sequence[str], chosen: Sequence[Variant]) -> None:
    """Raise `Failure` unless the peers can run one of the trained models: they read GGUF files, not our folders."""
    for name in names:
        if not PEERS[name].reads_files:
            raise console.Failure(f"--peer: {name} has random weights; leave out --model", exit_code=2)
    if not any(variant.gguf for variant in chosen):
        raise console.Failure(
            f"--peer: with --model, {names[0]} runs GGUF files as they are; name one, --model FILE.gguf",
            exit_code=2,
        )


def _default_backends() -> list[Literal["native", "torch"]]:
    reason = binding.available()
    if reason is None:
        return ["native"]
    console.say(f"measuring with PyTorch: {reason}")
    return ["torch"]


def _check_over(over: str | None, plan: Plan) -> None:
    """Check, before an expensive measurement, that the row of `--over` exists."""
    there = {
        f"{case.backend}:{case.dtype}": None for case in plan.cases if case.facts["group"] in figures.COMPARED
    }
    if over is not None and over not in there:
        raise console.Failure(
            f"--over: no dense or peer row is {over!r} (there are: {', '.join(there) or 'none'})", exit_code=2
        )


def _isa(plan: Plan) -> str:
    if any(case.backend == "native" for case in plan.cases):
        return binding.isa()
    return torch.backends.cpu.get_cpu_capability()


def _show_plan(plan: Plan, written: Mapping[str, Path | None], folder: Path, format: str) -> None:
    """Print the rows without figures, the memory, the disk space and the files, as JSON or else as a table."""
    disk_bytes = models.disk_bytes(plan) if plan.from_disk else None
    if format == "json":
        console.json_out(
            {
                "dry_run": True,
                "rows": [case.facts for case in plan.cases],
                "memory_bytes": models.memory_bytes(plan),
                "disk_bytes": disk_bytes,
                **{name: str(path) if path else None for name, path in written.items()},
            }
        )
        return
    rows = [
        (
            facts["variant"] + (" *" if facts["projected"] else ""),
            facts["backend"],
            weight_types(facts["dtype"], facts["precision"]),
            case.key.sizes,
            render.count(facts["parameters"]),
            render.count(facts["active_parameters"]),
            f"{facts['bits_per_weight']:.2f}",
            render.megabytes(facts["bytes_per_token"]),
        )
        for case in plan.cases
        for facts in [case.facts]
    ]
    columns = (
        "variant",
        "backend",
        "weights",
        "sizes",
        "parameters",
        "active",
        "bits / weight",
        "MB / token",
    )
    console.print_table(columns, rows, title="dry run: nothing is measured")
    if any(case.facts["projected"] for case in plan.cases):
        console.say(
            "* projected: only some blocks would be measured, and their time scaled to the whole model"
        )
    console.say(f"memory needed: about {models.memory_bytes(plan) / 1e9:.1f} GB")
    if disk_bytes is not None:
        console.say(f"temporary disk space needed: {disk_bytes / 1e9:.1f} GB in {folder.absolute()}")
    console.say(f"files to be written: {', '.join(str(path) for path in written.values() if path) or 'none'}")


# -- measuring -----------------------------------------------------------------------------------------------


def _measure(
    loaded: LoadedRecipe,
    bench: BenchSpec,
    plan: Plan,
    processor: Processor,
    folder: Path,
    over: str | None,
) -> BenchResult:
    console.say(f"building {len(plan.models)} model{'s' if len(plan.models) > 1 else ''}")
    timings, disk_speed = models.load(plan, folder)
    probes = [host.bandwidth()]

    def probe() -> None:  # the memory speed of a virtual machine varies within a minute
        torch.set_num_threads(processor.threads)
        probes.append(host.bandwidth(seconds=BETWEEN_ROUNDS))

    with console.progress("measuring", len(timings) * (plan.settings.rounds + 1)) as progress:
        measure(timings, plan.settings.rounds, loaded.recipe.seed, progress, probe)
    torch.set_num_threads(processor.threads)
    probes.append(host.bandwidth())
    bandwidths = Bandwidth(before=round(probes[0], 2), after=round(probes[-1], 2), best=round(max(probes), 2))
    if host.drifted(bandwidths.before, bandwidths.after):
        console.warn(
            f"memory bandwidth went from {bandwidths.before:.1f} to {bandwidths.after:.1f} GB/s meanwhile: the machine "
            "was busy or changed; rely on ratios rather than milliseconds, or measure again"
        )
    rows = figures.rows(list(zip(plan.cases, timings, strict=True)), bandwidths.best, over)
    rows = figures.rated(rows, host.last_level_cache())
    for line in [*figures.warnings(rows), *figures.warm(rows)]:
        console.warn(line)
    memory_gb = round(psutil.virtual_memory().total / 1e9, 1)
    return BenchResult(
        command=shlex.join(["sparsecli", *sys.argv[1:]]),
        recipe=_as_run(loaded, bench, plan),
        settings=plan.settings,
        versions={name: version(name) for name in ("sparsecli", "torch", "transformers")}
        | {"python": platform.python_version()},
        machine=Machine(**dict(processor), bandwidth_gb_s=bandwidths, memory_gb=memory_gb, disk=disk_speed),
        rows=rows,
        over=over,
        peak_memory_gb=host.peak_memory_gb(),
    )


def _as_run(loaded: LoadedRecipe, bench: BenchSpec, plan: Plan) -> dict[str, Any] | None:
    """The recipe with the variants that were chosen; None for trained runs, which it does not describe."""
    if any(variant.run for variant in plan.variants):
        return None
    names = {variant.name for variant in plan.variants}
    measured = {"variants": [variant for variant in bench.variants or () if variant.name in names]}
    recipe = loaded.recipe.model_copy(update={"bench": bench.model_copy(update=measured)})
    return recipe.model_dump(mode="json", exclude_none=True)


# -- output -----------------------------------------------------------------------------------------------


def _show(result: BenchResult, format: str) -> None:
    if format != "table":
        console.out(_text(result, format))
        return
    width = shutil.get_terminal_size((240, 24)).columns if sys.stdout.isatty() else 240
    console.table(render.table(result, width))
    if parts := render.parts_table(result):
        console.table(parts)
    if result.comparison:
        console.table(render.changes_table(result.comparison))


def _text(result: BenchResult, format: str) -> str:
    formats = {"json": render.as_json, "csv": render.as_csv, "markdown": render.as_markdown}
    return formats[format](result)


def _write(result: BenchResult, output: Path) -> None:
    """Write the result. The suffix gives the format: .csv, .md, else JSON."""
    format = {".csv": "csv", ".md": "markdown"}.get(output.suffix, "json")
    files.write_text(output, _text(result, format) + "\n")
    console.say(f"wrote {output}")


def _compared(result: BenchResult, earlier: BenchResult, fail_above: float | None) -> BenchResult:
    """`result` with its comparison."""
    changes = compare.compare(result, earlier, fail_above or 0.0)
    return result.model_copy(update={"comparison": changes})


def _judge(result: BenchResult, earlier: BenchResult, fail_above: float | None) -> None:
    """Raise `Regression` for slower rows if there is a threshold."""
    before, now = earlier.machine.bandwidth_gb_s.mean, result.machine.bandwidth_gb_s.mean
    if host.drifted(before, now):
        console.warn(
            f"memory reads {now:.1f} GB/s, {before:.1f} in the earlier result; the comparison allows for it"
        )
    slower = [change for change in result.comparison or [] if change.verdict == "slower"]
    if fail_above is None or not slower:
        return
    rows = ", ".join(
        f"{change.variant} ({change.backend}, {change.dtype}, {change.key.sizes}) {change.ratio - 1:+.1%}"
        for change in slower
    )
    raise console.Regression(f"slower than before by more than {fail_above:.1%}: {rows}")
