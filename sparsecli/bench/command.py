"""`sparsecli bench`: choose the rows, measure them, say what came out."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from sparsecli import console
from sparsecli.bench import compare, machine, report, roofline, variants
from sparsecli.bench.measure import BACKENDS, Turn, measure, spread, times
from sparsecli.bench.report import Bandwidth, Machine, Processor, Result, Row, Settings, Subject
from sparsecli.bench.variants import Candidate
from sparsecli.model.architecture import ModelSpec
from sparsecli.recipe.loader import LoadedRecipe
from sparsecli.recipe.schema import BenchSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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
    bench = loaded.recipe.bench or BenchSpec.model_construct(variants=[])
    plan = Plan(
        candidates=variants.choose(_candidates(loaded, models), dense=dense, sparse=sparse),
        backends=bench.backends,
        dtypes=_dtypes(dtypes or bench.dtypes),
        settings=Settings(
            context=_positive("--context", context, bench.context),
            rounds=_positive("--rounds", rounds, bench.rounds),
            tokens_per_round=_positive("--tokens", tokens, bench.tokens_per_round),
            warmup_tokens=bench.warmup_tokens,
        ),
        layers=None if models else bench.measured_layers,
    )
    processor = Processor(
        cpu=machine.processor()[0],
        isa=torch.backends.cpu.get_cpu_capability(),
        threads=_positive("--threads", threads, torch.get_num_threads()),
    )
    _check_positions(plan)
    if earlier and against:
        compare.check_comparable(processor, plan.settings, plan.subjects(), earlier, against)
    if warning := variants.check_same_size(plan.candidates):
        console.warn(warning)
    if dry_run:
        _show_plan(plan, output)
        return None
    _check_memory(plan)

    with machine.threads(processor.threads):
        machine.warn_if_busy()
        result = _measure(loaded, plan, processor)
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


@dataclass(frozen=True)
class Plan:
    """Which models are measured, and how."""

    candidates: Sequence[Candidate]
    backends: Sequence[str]
    dtypes: Sequence[str]
    settings: Settings
    layers: int | None  # so many blocks of each model are built; None: all

    @property
    def positions(self) -> int:
        """Tokens that a row's cache has to hold."""
        return self.settings.context + self.settings.warmup_tokens + self.settings.tokens_per_round

    def built(self, candidate: Candidate) -> ModelSpec:
        """The part of a model that is built."""
        return variants.part(candidate.spec, self.layers)

    def subject(self, candidate: Candidate, backend: str, dtype: str) -> Subject:
        """A row without its figures."""
        return Subject(
            variant=candidate.name,
            group=candidate.group,
            backend=backend,
            dtype=dtype,
            parameters=candidate.sizes.total,
            active_parameters=candidate.sizes.active,
            bytes_per_token=candidate.sizes.bytes_per_token(dtype, self.settings.context),
            projected=self.built(candidate).layers != candidate.spec.layers,
        )

    def subjects(self) -> list[Subject]:
        """All rows without their figures."""
        return [
            self.subject(candidate, backend, dtype)
            for backend in self.backends
            for dtype in self.dtypes
            for candidate in self.candidates
        ]


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


def _check_positions(plan: Plan) -> None:
    settings = plan.settings
    for candidate in plan.candidates:
        if candidate.spec.max_positions < plan.positions:
            raise console.Failure(
                f"{candidate.name}: {plan.positions} positions are needed (context {settings.context} + "
                f"{settings.warmup_tokens} warm-up + {settings.tokens_per_round} measured tokens), the model "
                f"has {candidate.spec.max_positions}; use a smaller --context"
            )


def _needed_bytes(plan: Plan) -> int:
    """An estimate: one pool a dtype, every trained model's weights, and every row's cache."""
    total = WORKSPACE_BYTES
    for name in plan.dtypes:
        pools, trained, cached = [0], 0, 0
        for candidate in plan.candidates:
            sizes = variants.count_parameters(plan.built(candidate))
            cached += sizes.cached_per_position * plan.positions
            if candidate.run:
                trained += sizes.total
            else:
                pools.append(sizes.total)
        total += (max(pools) + trained + cached) * DTYPES[name].itemsize
    return total


def _check_memory(plan: Plan) -> None:
    needed, available = _needed_bytes(plan), psutil.virtual_memory().available
    if needed > available:
        raise console.Failure(
            f"{needed / 1e9:.1f} GB of memory are needed, {available / 1e9:.1f} GB are available; "
            "choose one --dtype, or build part of the model with bench.measured_layers=1"
        )


def _show_plan(plan: Plan, output: Path | None) -> None:
    rows = [
        (
            candidate.name,
            candidate.group,
            f"{candidate.sizes.total:,}",
            f"{candidate.sizes.active:,}",
            *(
                report.megabytes(candidate.sizes.bytes_per_token(name, plan.settings.context))
                for name in plan.dtypes
            ),
        )
        for candidate in plan.candidates
    ]
    columns = ("variant", "group", "parameters", "active / token", *(f"MB / token {n}" for n in plan.dtypes))
    console.print_table(columns, rows, title="dry run: nothing is measured")
    console.say(f"memory needed: about {_needed_bytes(plan) / 1e9:.1f} GB")
    console.say(f"files to be written: {output or 'none'}")


# -- measuring -----------------------------------------------------------------------------------------------


def _measure(loaded: LoadedRecipe, plan: Plan, processor: Processor) -> Result:
    console.say(f"building {len(plan.candidates)} models as {', '.join(plan.dtypes)}")
    entries = _load(plan)
    before = roofline.bandwidth()
    with console.progress("measuring", len(entries) * (plan.settings.rounds + 1)) as progress:
        measure([entry.turn for entry in entries], plan.settings, loaded.recipe.seed, progress)
    bandwidths = Bandwidth(before=round(before, 2), after=round(roofline.bandwidth(), 2))
    if roofline.drifted(bandwidths.before, bandwidths.after):
        console.warn(
            f"memory bandwidth went from {bandwidths.before:.1f} to {bandwidths.after:.1f} GB/s meanwhile: the "
            "machine was busy or changed; trust ratios more than milliseconds, or measure again"
        )
    memory_gb = round(psutil.virtual_memory().total / 1e9, 1)
    return Result(
        command=shlex.join(["sparsecli", *sys.argv[1:]]),
        recipe=_as_run(loaded, plan),
        settings=plan.settings,
        versions={name: version(name) for name in ("sparsecli", "torch", "transformers")}
        | {"python": platform.python_version()},
        machine=Machine(**dict(processor), bandwidth_gb_s=bandwidths, memory_gb=memory_gb),
        rows=_rows(entries, bandwidths.mean),
    )


def _as_run(loaded: LoadedRecipe, plan: Plan) -> dict[str, Any] | None:
    """The recipe with the command line's options in it, or None for trained runs: it does not describe them."""
    bench = loaded.recipe.bench
    if bench is None or any(candidate.run for candidate in plan.candidates):
        return None
    groups = {candidate.group for candidate in plan.candidates}
    chosen = {
        **dict(plan.settings),
        "dtypes": list(plan.dtypes),
        "variants": [variant for variant in bench.variants if variant.group in groups],
    }
    recipe = loaded.recipe.model_copy(update={"bench": bench.model_copy(update=chosen)})
    return recipe.model_dump(mode="json", exclude_none=True)


@dataclass(frozen=True)
class Entry:
    """A row on its way: what it is, and its decoder with its samples."""

    subject: Subject
    candidate: Candidate
    turn: Turn


def _load(plan: Plan) -> list[Entry]:
    entries = []
    for dtype in plan.dtypes:
        for candidate, weights in _weights(plan, DTYPES[dtype]):
            spec = plan.built(candidate)
            for backend in plan.backends:
                decoder = BACKENDS[backend].load(spec, weights, DTYPES[dtype], plan.positions)
                turn = Turn(decoder, spec.vocabulary.size, candidate.spec.layers, spec.layers)
                entries.append(Entry(plan.subject(candidate, backend, dtype), candidate, turn))
    return sorted(entries, key=lambda entry: plan.backends.index(entry.subject.backend))


def _weights(plan: Plan, dtype: torch.dtype) -> Iterator[tuple[Candidate, Mapping[str, torch.Tensor]]]:
    random = [plan.built(candidate) for candidate in plan.candidates if candidate.run is None]
    elements = max((variants.pool_elements(spec, dtype) for spec in random), default=0)
    pool = variants.random_pool(elements, dtype)
    for candidate in plan.candidates:
        if candidate.run:
            yield candidate, variants.trained_weights(candidate.run, dtype)
        else:
            yield candidate, variants.random_weights(plan.built(candidate), pool)


def _rows(entries: Sequence[Entry], gb_per_second: float) -> list[Row]:
    baselines: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        if entry.subject.group == "dense":
            baselines.setdefault((entry.subject.backend, entry.subject.dtype), entry)
    rows = []
    for entry in entries:
        subject, paper = entry.subject, entry.candidate.paper
        token = times(entry.turn.token_ms)
        baseline = baselines.get((subject.backend, subject.dtype))
        paper_baseline = baseline.candidate.paper if baseline else None
        share = roofline.fraction_of_limit(subject.bytes_per_token, token.p50, gb_per_second)
        row = Row(
            **dict(subject),
            ms_per_token=token,
            ms_per_block=spread(entry.turn.block_ms),
            tokens_per_second=round(1e3 / token.p50, 3),
            speedup=round(times(baseline.turn.token_ms).p50 / token.p50, 4) if baseline else None,
            bandwidth_fraction=round(share, 4),
            held_out_nats=entry.candidate.held_out_nats,
            paper=paper,
            paper_speedup=round(paper_baseline.ms_per_token / paper.ms_per_token, 4)
            if paper_baseline and paper
            else None,
        )
        rows.append(row)
    return rows


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
