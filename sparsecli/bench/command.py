"""`sparsecli bench`: choose the rows, measure them, say what came out."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from sparsecli import console
from sparsecli.bench import compare, disk, entries, machine, plan, roofline, table, variants, yardsticks
from sparsecli.bench.measure import measure
from sparsecli.bench.plan import Plan
from sparsecli.bench.report import Bandwidth, Machine, Processor, Result, Settings
from sparsecli.bench.variants import Candidate
from sparsecli.decode.engine import MAX_THREADS, processors
from sparsecli.decode.native import binding
from sparsecli.decode.packed.precision import WORDS
from sparsecli.recipe.loader import LoadedRecipe
from sparsecli.recipe.schema import BenchSpec

BACKENDS = ("native", "torch")
BETWEEN_ROUNDS = 0.05  # seconds of a probe of the memory


def run(
    loaded: LoadedRecipe,
    *,
    dense: bool = False,
    sparse: bool = False,
    mixture: bool = False,
    names: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    peers: Sequence[str] | None = None,
    over: str | None = None,
    dtypes: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    context: Sequence[int] | None = None,
    batch: Sequence[int] | None = None,
    prefill: int | None = None,
    profile: bool = False,
    from_disk: bool = False,
    disk_folder: Path | None = None,
    rounds: int | None = None,
    tokens: int | None = None,
    format: Literal["table", "json", "csv", "markdown"] = "table",
    against: Path | None = None,
    fail_above: float | None = None,
    output: Path | None = None,
    dry_run: bool = False,
    models: Sequence[str] = (),
) -> Result | None:
    """Measure decoding and show it in `format`; the result, or None for a dry run.

    `over` names a backend and a weight type, `torch:bfloat16`, with whose dense row all rows are compared.
    `models` are trained runs to measure in place of the recipe's variants; `names` chooses some of either. What is
    given goes before the recipe's `bench:` block; of `threads`, `context` and `batch` every combination is measured.
    `from_disk` writes packed models to `disk_folder` (the working directory) for as long as it takes. `fail_above`
    is a fraction (0.05: five per cent).
    Raises `Failure` for anything that cannot be measured or compared, `Regression` when a row is slower than
    in `against` by more than `fail_above`.
    """
    if fail_above is not None and against is None:
        raise console.Failure("--fail-above needs --against FILE, an earlier result in JSON", exit_code=2)
    earlier = compare.read(against) if against else None
    if output:
        _check_writable(output)
    given = {
        "backends": _names("--backend", backends, BACKENDS),
        "peers": list(peers) if peers else None,
        "dtypes": _names("--dtype", dtypes, WORDS),
        "threads": _positive("--threads", threads),
        "context": _positive("--context", context),
        "batch": _positive("--batch", batch),
        "prefill": _one("--prefill", prefill),
        "profile": profile or None,
        "from_disk": from_disk or None,
        "rounds": _one("--rounds", rounds),
        "tokens_per_round": _one("--tokens", tokens),
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    bench = (loaded.recipe.bench or BenchSpec.model_construct(variants=[])).model_copy(update=chosen)
    folder = disk_folder or Path()
    groups = {"dense": dense, "sparse": sparse, "mixture": mixture}
    candidates = variants.choose(_candidates(loaded, models), **groups, names=names)
    if "context" not in bench.model_fields_set:
        bench = bench.model_copy(update={"context": [_context(bench, candidates)]})
    what = _plan(bench, candidates, models)
    processor = Processor(
        cpu=machine.processor()[0],
        isa=_isa(what),
        threads=max(model.threads for model in what.models),
    )
    _check_over(over, what)
    plan.check_positions(what)
    if what.from_disk:
        disk.check_supported(folder)
        plan.check_disk(what, folder)
    if earlier and against:
        compare.check_comparable(processor, what.subjects(), earlier, against)
    compared = bench.equal_sizes or bool(models)
    if compared and what.candidates and (warning := variants.check_same_size(what.candidates)):
        console.warn(warning)
    if dry_run:
        _show_plan(what, output, folder, format)
        return None
    plan.check_memory(what)

    with machine.threads(processor.threads):
        machine.warn_if_busy()
        result = _measure(loaded, bench, what, processor, folder, over)
    if earlier:
        changes = compare.compare(result, earlier, fail_above or 0.0)
        result = result.model_copy(update={"comparison": changes})
    _show(result, format)
    if output:
        _write(result, output)
    if earlier:
        _judge(result, earlier, fail_above)
    return result


# -- what to measure -----------------------------------------------------------------------------------------


def _candidates(loaded: LoadedRecipe, models: Sequence[str]) -> list[Candidate]:
    recipe = loaded.recipe
    if models:
        return variants.from_runs(models)
    if recipe.model is None or recipe.bench is None:
        block = "model" if recipe.model is None else "bench"
        raise console.RecipeError(
            f"{loaded.path}: bench needs a `{block}:` block, or trained runs by --model DIR; "
            "`sparsecli bench bench-800m` measures the paper's shapes"
        )
    return variants.from_recipe(recipe.model, recipe.bench)


def _context(bench: BenchSpec, candidates: Sequence[Candidate]) -> int:
    """The default context, or the longest that the trained models have positions for."""
    positions = [candidate.spec.max_positions for candidate in candidates if candidate.run]
    [default] = BenchSpec.model_fields["context"].default
    longest = min(positions, default=default) - bench.warmup_tokens - bench.tokens_per_round
    return max(1, min(default, longest)) if positions else default


def _plan(bench: BenchSpec, candidates: Sequence[Candidate], models: Sequence[str]) -> Plan:
    backends = bench.backends or _default_backends()
    if "native" in backends and (reason := binding.available()):
        raise console.Failure(f"--backend native: {reason}")
    if models and bench.peers:
        raise console.Failure("--peer: other programs have random weights; leave out --model", exit_code=2)
    threads = bench.threads or [processors()]
    if max(threads) > MAX_THREADS:
        raise console.Failure(f"--threads: {max(threads)} is more than {MAX_THREADS}", exit_code=2)
    settings = Settings(
        context=bench.context[0],
        source=bench.source if any(candidate.spec.encoder for candidate in candidates) else None,
        rounds=bench.rounds,
        tokens_per_round=bench.tokens_per_round,
        warmup_tokens=bench.warmup_tokens,
    )
    cases = plan.rows(
        candidates,
        backends=backends,
        dtypes=bench.dtypes,
        threads=threads,
        contexts=bench.context,
        batches=bench.batch,
        prefill=bench.prefill,
        from_disk=bench.from_disk,
    )
    cases += plan.peer_rows(
        bench.peers,
        candidates,
        dtypes=bench.dtypes,
        threads=threads,
        contexts=bench.context,
        positions=max(max(bench.context) + bench.warmup_tokens + bench.tokens_per_round, bench.prefill or 0),
        prefill=bench.prefill,
        variants_named=bench.peer_variants,
    )
    return Plan(cases, settings, profile=bench.profile, from_disk=bench.from_disk)


def _default_backends() -> list[Literal["native", "torch"]]:
    reason = binding.available()
    if reason is None:
        return ["native"]
    console.say(f"measuring with PyTorch: {reason}")
    return ["torch"]


def _check_over(over: str | None, what: Plan) -> None:
    """Before an expensive measurement: is there such a row?"""
    subjects = [subject for subject in what.subjects() if subject.group in ("dense", "peer")]
    there = list(dict.fromkeys(f"{subject.backend}:{subject.dtype}" for subject in subjects))
    if over is not None and over not in there:
        raise console.Failure(
            f"--over: no dense or peer row is {over!r} (there are: {', '.join(there) or 'none'})", exit_code=2
        )


def _isa(what: Plan) -> str:
    if any(model.backend == "native" for model in what.models):
        return binding.isa()
    return torch.backends.cpu.get_cpu_capability()


def _names(option: str, names: Sequence[str] | None, known: Sequence[str]) -> list[str] | None:
    for name in names or ():
        if name not in known:
            raise console.Failure(f"{option}: {name!r} is not one of {', '.join(known)}", exit_code=2)
    return list(dict.fromkeys(names)) if names else None


def _one(option: str, value: int | None) -> int | None:
    _positive(option, None if value is None else [value])
    return value


def _positive(option: str, values: Sequence[int] | None) -> list[int] | None:
    for value in values or ():
        if value < 1:
            raise console.Failure(f"{option}: {value} should be at least 1", exit_code=2)
    return list(dict.fromkeys(values)) if values else None


def _show_plan(what: Plan, output: Path | None, folder: Path, format: str) -> None:
    """The rows without their figures, memory, disk and files; in `format`, what is not JSON as a table."""
    disk_bytes = sum(plan.packed_bytes(what, model) for model in what.models) if what.from_disk else None
    if format == "json":
        console.json_out(
            {
                "dry_run": True,
                "rows": [subject.model_dump(mode="json") for subject in what.subjects()],
                "memory_bytes": plan.needed_bytes(what),
                "disk_bytes": disk_bytes,
                "output": str(output) if output else None,
            }
        )
        return
    rows = [
        (
            subject.variant + (" *" if subject.projected else ""),
            subject.backend,
            subject.dtype + (f", {subject.changed_parts}" if subject.changed_parts else ""),
            subject.sizes,
            table.count(subject.parameters),
            table.count(subject.active_parameters),
            table.megabytes(subject.bytes_per_token),
        )
        for subject in what.subjects()
    ]
    columns = (
        "variant",
        "backend",
        "weights",
        "sizes",
        "parameters",
        "active",
        "MB / token",
    )
    console.print_table(columns, rows, title="dry run: nothing is measured")
    if any(subject.projected for subject in what.subjects()):
        console.say("* projected: some of its blocks would be measured and their time multiplied out")
    console.say(f"memory needed: about {plan.needed_bytes(what) / 1e9:.1f} GB")
    if disk_bytes is not None:
        console.say(f"disk needed meanwhile: {disk_bytes / 1e9:.1f} GB in {folder.absolute()}")
    console.say(f"files to be written: {output or 'none'}")


# -- measuring -----------------------------------------------------------------------------------------------


def _measure(
    loaded: LoadedRecipe,
    bench: BenchSpec,
    what: Plan,
    processor: Processor,
    folder: Path,
    over: str | None,
) -> Result:
    console.say(f"building {len(what.models)} model{'s' if len(what.models) > 1 else ''}")
    found, disk_speed = entries.load(what, folder)
    probes = [roofline.bandwidth()]

    def probe() -> None:  # the memory of a virtual machine has several speeds within a minute
        torch.set_num_threads(processor.threads)
        probes.append(roofline.bandwidth(seconds=BETWEEN_ROUNDS))

    with console.progress("measuring", len(found) * (what.settings.rounds + 1)) as progress:
        measure([entry.turn for entry in found], what.settings.rounds, loaded.recipe.seed, progress, probe)
    torch.set_num_threads(processor.threads)
    probes.append(roofline.bandwidth())
    bandwidths = Bandwidth(before=round(probes[0], 2), after=round(probes[-1], 2), best=round(max(probes), 2))
    if roofline.drifted(bandwidths.before, bandwidths.after):
        console.warn(
            f"memory bandwidth went from {bandwidths.before:.1f} to {bandwidths.after:.1f} GB/s meanwhile: the "
            "machine was busy or changed; trust ratios more than milliseconds, or measure again"
        )
    rows = yardsticks.rated(entries.rows(found, bandwidths.limit, over), yardsticks.last_level_cache())
    for line in [*yardsticks.warnings(rows), *yardsticks.warm(rows)]:
        console.warn(line)
    memory_gb = round(psutil.virtual_memory().total / 1e9, 1)
    return Result(
        command=shlex.join(["sparsecli", *sys.argv[1:]]),
        recipe=_as_run(loaded, bench, what),
        settings=what.settings,
        versions={name: version(name) for name in ("sparsecli", "torch", "transformers")}
        | {"python": platform.python_version()},
        machine=Machine(**dict(processor), bandwidth_gb_s=bandwidths, memory_gb=memory_gb, disk=disk_speed),
        rows=rows,
        over=over,
        peak_memory_gb=machine.peak_memory_gb(),
    )


def _as_run(loaded: LoadedRecipe, bench: BenchSpec, what: Plan) -> dict[str, Any] | None:
    """The recipe with the command line's options in it, or None for trained runs: it does not describe them."""
    if loaded.recipe.bench is None or any(candidate.run for candidate in what.candidates):
        return None
    names = {candidate.name for candidate in what.candidates}
    ours = [name for name in BACKENDS if any(model.backend == name for model in what.models)]
    chosen = {
        "backends": bench.backends or ours,
        "variants": [variant for variant in bench.variants if variant.name in names],
    }
    recipe = loaded.recipe.model_copy(update={"bench": bench.model_copy(update=chosen)})
    return recipe.model_dump(mode="json", exclude_none=True)


# -- saying it -----------------------------------------------------------------------------------------------


def _show(result: Result, format: str) -> None:
    if format != "table":
        console.out(_text(result, format))
        return
    width = shutil.get_terminal_size((240, 24)).columns if sys.stdout.isatty() else 240
    console.table(table.table(result, width))
    if parts := table.parts_table(result):
        console.table(parts)
    if result.comparison:
        console.table(table.changes_table(result.comparison))


def _text(result: Result, format: str) -> str:
    formats = {"json": table.as_json, "csv": table.as_csv, "markdown": table.as_markdown}
    return formats[format](result)


def _check_writable(output: Path) -> None:
    """Before an expensive measurement, not after it."""
    if output.is_dir():
        raise console.Failure(f"{output}: is a directory; name a file for --output")
    if not output.parent.is_dir():
        raise console.Failure(f"{output}: the folder {output.parent} does not exist")
    if not os.access(output.parent, os.W_OK) or (output.exists() and not os.access(output, os.W_OK)):
        raise console.Failure(f"{output}: cannot be written; choose another --output")


def _write(result: Result, output: Path) -> None:
    """The format follows the suffix: .csv, .md, else JSON. Written beside, then renamed."""
    format = {".csv": "csv", ".md": "markdown"}.get(output.suffix, "json")
    beside = output.with_name(output.name + ".tmp")
    try:
        beside.write_text(_text(result, format) + "\n", encoding="utf-8")
        beside.replace(output)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise console.Failure(f"{output}: cannot be written: {error.strerror}") from error
    console.say(f"wrote {output}")


def _judge(result: Result, earlier: Result, fail_above: float | None) -> None:
    """Raise `Regression` for slower rows when a threshold was given."""
    before, now = earlier.machine.bandwidth_gb_s.mean, result.machine.bandwidth_gb_s.mean
    if roofline.drifted(before, now):
        console.warn(
            f"memory reads {now:.1f} GB/s, {before:.1f} in the earlier result; the comparison allows for it"
        )
    slower = [change for change in result.comparison or [] if change.verdict == "slower"]
    if fail_above is None or not slower:
        return
    rows = ", ".join(
        f"{change.variant} ({change.backend}, {change.dtype}, {change.sizes}) {change.ratio - 1:+.1%}"
        for change in slower
    )
    raise console.Regression(f"slower than before by more than {fail_above:.1%}: {rows}")
