"""`sparsecli bench`: choose the rows, measure them, say what came out."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import psutil
import torch

from sparsecli import console
from sparsecli.bench import compare, report, roofline, variants
from sparsecli.bench.measure import BACKENDS, Turn, measure, spread, times
from sparsecli.bench.report import Bandwidth, Machine, Result, Row, Settings
from sparsecli.bench.variants import Candidate
from sparsecli.recipe.loader import LoadedRecipe
from sparsecli.recipe.schema import BenchSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BUSY_SECONDS = 0.5
WORKSPACE_BYTES = 2**30  # the interpreter, activations and the bandwidth probe's buffer


def run(
    loaded: LoadedRecipe,
    *,
    dense: bool = False,
    sparse: bool = False,
    dtypes: Sequence[str] | None = None,
    threads: int | None = None,
    context: int | None = None,
    rounds: int | None = None,
    tokens: int | None = None,
    format: Literal["table", "json", "csv", "markdown"] = "table",
    against: Path | None = None,
    fail_above: float | None = None,
    output: Path | None = None,
    dry_run: bool = False,
    models: Sequence[str] = (),
) -> Result | None:
    """Measure single-token decoding and show it in `format`; the result, or None for a dry run.

    `models` are trained runs to measure in place of the recipe's variants. `dtypes`, `context`, `rounds` and
    `tokens` go before the recipe's `bench:` block. `fail_above` is a fraction (0.05: five per cent).
    Raises `Failure` for anything that cannot be measured or compared, `Regression` when a row is slower than
    in `against` by more than `fail_above`.
    """
    if fail_above is not None and against is None:
        raise console.Failure("--fail-above needs --against FILE, an earlier result in JSON", exit_code=2)
    earlier = compare.read(against) if against else None
    if output:
        _check_writable(output)
    candidates = variants.choose(_candidates(loaded, models), dense=dense, sparse=sparse)
    plan = loaded.recipe.bench or BenchSpec.model_construct(variants=[])
    types = _dtypes(dtypes or plan.dtypes)
    settings = Settings(
        context=_positive("--context", context, plan.context),
        rounds=_positive("--rounds", rounds, plan.rounds),
        tokens_per_round=_positive("--tokens", tokens, plan.tokens_per_round),
        warmup_tokens=plan.warmup_tokens,
    )
    layers = plan.measured_layers if not models else None
    _check_positions(candidates, settings)
    if warning := variants.check_same_size(candidates):
        console.warn(warning)
    if dry_run:
        _show_plan(candidates, types, settings, layers, output)
        return None
    _check_memory(candidates, types, settings, layers)

    with _threads(_positive("--threads", threads, torch.get_num_threads())):
        _warn_if_busy()
        result = _measure(loaded, candidates, plan.backends, types, settings, layers)
    if earlier and against:
        compare.check_comparable(result, earlier, against)
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


def _dtypes(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in DTYPES:
            raise console.Failure(f"--dtype: {name!r} is not one of {', '.join(DTYPES)}", exit_code=2)
    return list(dict.fromkeys(names))


def _positive(option: str, value: int | None, default: int) -> int:
    if value is not None and value < 1:
        raise console.Failure(f"{option}: {value} should be at least 1", exit_code=2)
    return default if value is None else value


def _positions(settings: Settings) -> int:
    return settings.context + settings.warmup_tokens + settings.tokens_per_round


def _check_positions(candidates: Sequence[Candidate], settings: Settings) -> None:
    needed = _positions(settings)
    for candidate in candidates:
        if candidate.spec.max_positions < needed:
            raise console.Failure(
                f"{candidate.name}: {needed} positions are needed (context {settings.context} + "
                f"{settings.warmup_tokens} warm-up + {settings.tokens_per_round} measured tokens), the model "
                f"has {candidate.spec.max_positions}; use a smaller --context"
            )


def _needed_bytes(
    candidates: Sequence[Candidate], types: Sequence[str], settings: Settings, layers: int | None
) -> int:
    """An estimate: one pool a dtype, every trained model's weights, and every row's cache."""
    total = WORKSPACE_BYTES
    for name in types:
        pools, trained, cached = [0], 0, 0
        for candidate in candidates:
            spec = variants.part(candidate.spec, layers)
            sizes = variants.count_parameters(spec)
            cached += sizes.cached_per_position * _positions(settings)
            if candidate.run:
                trained += sizes.total
            else:
                pools.append(sizes.total)
        total += (max(pools) + trained + cached) * DTYPES[name].itemsize
    return total


def _check_memory(
    candidates: Sequence[Candidate], types: Sequence[str], settings: Settings, layers: int | None
) -> None:
    needed = _needed_bytes(candidates, types, settings, layers)
    available = psutil.virtual_memory().available
    if needed > available:
        raise console.Failure(
            f"{needed / 1e9:.1f} GB of memory are needed, {available / 1e9:.1f} GB are available; "
            "choose one --dtype, or build part of the model with bench.measured_layers=1"
        )


def _show_plan(
    candidates: Sequence[Candidate],
    types: Sequence[str],
    settings: Settings,
    layers: int | None,
    output: Path | None,
) -> None:
    rows = [
        (
            candidate.name,
            candidate.group,
            f"{candidate.sizes.total:,}",
            f"{candidate.sizes.active:,}",
            *(report.megabytes(candidate.sizes.bytes_per_token(name, settings.context)) for name in types),
        )
        for candidate in candidates
    ]
    columns = ("variant", "group", "parameters", "active / token", *(f"MB / token {name}" for name in types))
    console.print_table(columns, rows, title="dry run: nothing is measured")
    needed = _needed_bytes(candidates, types, settings, layers)
    console.say(f"memory needed: about {needed / 1e9:.1f} GB")
    console.say(f"files to be written: {output or 'none'}")


# -- measuring -----------------------------------------------------------------------------------------------


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _warn_if_busy() -> None:
    """Threads of one step wait for one another, so one that has to share its processor delays them all."""
    processors = psutil.cpu_count() or 1
    others = psutil.cpu_percent(interval=BUSY_SECONDS) / 100 * processors  # while this process sleeps
    threads = torch.get_num_threads()
    if threads > 1 and others + threads > processors + 0.5:
        console.warn(
            f"other processes use {others:.1f} of {processors} processors, and {threads} threads have to share: "
            "expect several times slower rows, or use fewer --threads"
        )


def _measure(
    loaded: LoadedRecipe,
    candidates: Sequence[Candidate],
    backends: Sequence[str],
    types: Sequence[str],
    settings: Settings,
    layers: int | None,
) -> Result:
    console.say(f"building {len(candidates)} models as {', '.join(types)}")
    entries = _load(candidates, backends, types, settings, layers)
    before = roofline.bandwidth()
    with console.progress("measuring", len(entries) * (settings.rounds + 1)) as progress:
        measure([entry.turn for entry in entries], settings, loaded.recipe.seed, progress)
    bandwidths = Bandwidth(before=round(before, 2), after=round(roofline.bandwidth(), 2))
    if roofline.drifted(bandwidths.before, bandwidths.after):
        console.warn(
            f"memory bandwidth went from {bandwidths.before:.1f} to {bandwidths.after:.1f} GB/s meanwhile: the "
            "machine was busy or changed; trust ratios more than milliseconds, or measure again"
        )
    return Result(
        command=shlex.join(["sparsecli", *sys.argv[1:]]),
        recipe=loaded.recipe.model_dump(mode="json", exclude_none=True),
        settings=settings,
        versions={name: version(name) for name in ("sparsecli", "torch", "transformers")}
        | {"python": platform.python_version()},
        machine=_machine(bandwidths),
        rows=_rows(entries, settings, bandwidths.mean),
    )


@dataclass(frozen=True)
class Entry:
    """A row on its way: what it is, and its decoder with its samples."""

    candidate: Candidate
    backend: str
    dtype: str
    turn: Turn


def _load(
    candidates: Sequence[Candidate],
    backends: Sequence[str],
    types: Sequence[str],
    settings: Settings,
    layers: int | None,
) -> list[Entry]:
    entries = []
    for dtype in types:
        for candidate, weights in _weights(candidates, DTYPES[dtype], layers):
            spec = variants.part(candidate.spec, layers)
            for backend in backends:
                decoder = BACKENDS[backend].load(spec, weights, DTYPES[dtype], _positions(settings))
                turn = Turn(decoder, spec.vocabulary.size, candidate.spec.layers, spec.layers)
                entries.append(Entry(candidate, backend, dtype, turn))
    return sorted(entries, key=lambda entry: (backends.index(entry.backend), types.index(entry.dtype)))


def _weights(
    candidates: Sequence[Candidate], dtype: torch.dtype, layers: int | None
) -> Iterator[tuple[Candidate, Mapping[str, torch.Tensor]]]:
    random = [variants.part(candidate.spec, layers) for candidate in candidates if candidate.run is None]
    pool = variants.random_pool(
        max((variants.pool_elements(spec, dtype) for spec in random), default=0), dtype
    )
    for candidate in candidates:
        if candidate.run:
            yield candidate, variants.trained_weights(candidate.run, dtype)
        else:
            yield candidate, variants.random_weights(variants.part(candidate.spec, layers), pool)


def _rows(entries: Sequence[Entry], settings: Settings, gb_per_second: float) -> list[Row]:
    baselines: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        if entry.candidate.group == "dense":
            baselines.setdefault((entry.backend, entry.dtype), entry)
    rows = []
    for entry in entries:
        candidate, turn = entry.candidate, entry.turn
        token = times(turn.token_ms)
        baseline = baselines.get((entry.backend, entry.dtype))
        size = candidate.sizes.bytes_per_token(entry.dtype, settings.context)
        paper_baseline = baseline.candidate.paper if baseline else None
        row = Row(
            variant=candidate.name,
            group=candidate.group,
            backend=entry.backend,
            dtype=entry.dtype,
            parameters=candidate.sizes.total,
            active_parameters=candidate.sizes.active,
            bytes_per_token=size,
            ms_per_token=token,
            ms_per_block=spread(turn.block_ms),
            tokens_per_second=round(1e3 / token.p50, 3),
            speedup=round(times(baseline.turn.token_ms).p50 / token.p50, 4) if baseline else None,
            bandwidth_fraction=round(roofline.fraction_of_limit(size, token.p50, gb_per_second), 4),
            held_out_nats=candidate.held_out_nats,
            projected=turn.layers != turn.measured_layers,
            paper=candidate.paper,
            paper_speedup=round(paper_baseline.ms_per_token / candidate.paper.ms_per_token, 4)
            if paper_baseline and candidate.paper
            else None,
        )
        rows.append(row)
    return rows


def _machine(bandwidths: Bandwidth) -> Machine:
    return Machine(
        cpu=_processor(),
        isa=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        bandwidth_gb_s=bandwidths,
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
    )


def _processor() -> str:
    """The processor's name; Python's own answer is often only the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# -- saying it -----------------------------------------------------------------------------------------------


def _show(result: Result, format: str) -> None:
    if format != "table":
        console.out(_text(result, format))
        return
    width = shutil.get_terminal_size((240, 24)).columns if sys.stdout.isatty() else 240
    console.table(report.table(result, width))
    if result.comparison:
        console.table(report.changes_table(result.comparison))


def _text(result: Result, format: str) -> str:
    formats = {"json": report.as_json, "csv": report.as_csv, "markdown": report.as_markdown}
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
        f"{change.variant} ({change.backend}, {change.dtype}) {change.ratio - 1:+.1%}" for change in slower
    )
    raise console.Regression(f"slower than before by more than {fail_above:.1%}: {rows}")
