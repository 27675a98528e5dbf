"""Which rows are measured, what of each model is built for them, and whether memory and disk suffice."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import psutil

from sparsecli import console
from sparsecli.bench import peers, variants
from sparsecli.bench.peers import PeerRow
from sparsecli.bench.report import Settings, Subject
from sparsecli.bench.traffic import bucket_bytes, bytes_per_token, cached_bytes, source_bytes
from sparsecli.bench.variants import UNCHANGED, Candidate
from sparsecli.bench.weights import largest, packed_elements, planned, torch_elements
from sparsecli.decode.packed.precision import Precision
from sparsecli.decode.packed.tensor_file import WIDTHS
from sparsecli.spec.model import ModelSpec

WORKSPACE_BYTES = 2**30  # the interpreter, activations and the bandwidth probe's buffer
TORCH_DTYPES = ("float32", "bfloat16")
PROMPT_RIVAL = "bfloat16"  # PyTorch reads a prompt fastest in this type


@dataclass(frozen=True, eq=False)
class Model:
    """A model in memory: one engine, one PyTorch model, or one of another program."""

    candidate: Candidate
    backend: str
    dtype: str
    threads: int
    peer: PeerRow | None = None


@dataclass(frozen=True)
class Case:
    """A row: a model and what it has to do."""

    model: Model
    context: int
    batch: int = 1
    prefill: int = 0  # tokens of the prompt whose reading is measured; 0: decoding is


@dataclass(frozen=True)
class Plan:
    """All rows, in order, and how they are measured."""

    cases: Sequence[Case]
    settings: Settings
    profile: bool = False
    from_disk: bool = False

    @cached_property
    def models(self) -> list[Model]:
        """The models that the rows need, in order."""
        return list(dict.fromkeys(case.model for case in self.cases))

    @property
    def candidates(self) -> list[Candidate]:
        """What our own backends measure."""
        return list(
            {id(model.candidate): model.candidate for model in self.models if not model.peer}.values()
        )

    def capacity(self, case: Case) -> int:
        """Tokens that a row's cache has to hold."""
        if case.prefill:
            return case.prefill
        return case.context + self.settings.warmup_tokens + self.settings.tokens_per_round

    def source(self, model: Model) -> int:
        """Tokens of the source that a decoder has; 0 without an encoder."""
        return self.settings.source or 0 if model.candidate.spec.encoder else 0

    def built(self, model: Model) -> ModelSpec:
        """The part of a model that is built. Random positions are made up where a long context needs more."""
        candidate = model.candidate
        spec = variants.part(candidate.spec, candidate.measured_layers)
        if candidate.run or model.peer:
            return spec
        needed = max(self.capacity(case) for case in self.cases if case.model == model)
        return variants.with_positions(spec, needed)

    def subject(self, case: Case) -> Subject:
        """A row without its figures."""
        candidate, model = case.model.candidate, case.model
        if model.peer:
            return Subject(
                **model.peer.figures(case.context, case.prefill), threads=model.threads, context=case.context
            )
        native = model.backend == "native"
        sequences = case.batch * max(case.prefill, 1)
        return Subject(
            variant=candidate.name,
            group=candidate.group,
            backend=model.backend,
            dtype=model.dtype,
            precision=vars(precision_of(model)) if native else None,
            threads=model.threads,
            context=case.context,
            batch=case.batch,
            prefill=case.prefill or None,
            from_disk=self.from_disk,
            parameters=candidate.sizes.total,
            active_parameters=candidate.sizes.active,
            bytes_per_token=bytes_per_token(
                candidate.spec,
                precision_of(model),
                case.context,
                sequences,
                vectors="float32" if native else model.dtype,
                source=self.source(model),
            ),
            projected=not candidate.whole,
        )

    def subjects(self) -> list[Subject]:
        """All rows without their figures."""
        return [self.subject(case) for case in self.cases]


def precision_of(model: Model) -> Precision:
    """The types of a model's parts."""
    changes = {name: value for name, value in model.candidate.precision if value is not None}
    return Precision.of(model.dtype, **changes)


def rows(
    candidates: Sequence[Candidate],
    *,
    backends: Sequence[str],
    dtypes: Sequence[str],
    threads: Sequence[int],
    contexts: Sequence[int],
    batches: Sequence[int],
    prefill: int | None = None,
    from_disk: bool = False,
) -> list[Case]:
    """Every combination that a backend can compute; one line says what was left out.

    With `prefill`, each model reads a prompt too, and so does the first dense one in PyTorch as bfloat16.
    Raises `Failure` when nothing is left.
    """
    pairs = [(backend, dtype) for backend in backends for dtype in dtypes]
    fits = {pair: [each for each in candidates if _computes(*pair, each, from_disk)] for pair in pairs}
    wanted = [pair for pair in pairs for each in candidates if pair[1] in (each.dtypes or dtypes)]
    if len(wanted) > sum(map(len, fits.values())):
        if not any(fits.values()):
            raise console.Failure(_nothing_left(backends, from_disk), exit_code=2)
        console.say(f"rows left out: {_nothing_left(backends, from_disk)}")
    cases = []
    for (backend, dtype), chosen in fits.items():
        for count in threads:
            models = [Model(candidate, backend, dtype, count) for candidate in chosen]
            cases += [Case(m, context, batch) for context in contexts for batch in batches for m in models]
            cases += [
                Case(model, 0, prefill=prefill) for model in models if prefill and model.candidate.whole
            ]
    if prefill and not all(candidate.whole for candidate in candidates):
        console.say("rows left out: prompts are read by whole models, not by some of their blocks")
    if prefill and not from_disk:
        cases += _torch_prompt(cases, candidates, prefill, max(threads))
    return cases


def _computes(backend: str, dtype: str, candidate: Candidate, from_disk: bool) -> bool:
    if candidate.dtypes is not None and dtype not in candidate.dtypes:
        return False
    if from_disk and candidate.spec.feed_forward.kind == "dense":
        return False
    special = candidate.precision != UNCHANGED or candidate.spec.encoder is not None
    return backend == "native" or (dtype in TORCH_DTYPES and not special and not from_disk)


def _nothing_left(backends: Sequence[str], from_disk: bool) -> str:
    if from_disk:
        return "--from-disk is for sparse layers on the native backend"
    if "native" in backends:
        return "in PyTorch, int8, int4, what has a precision of its own, and decoders of an encoder's output"
    return "int8, int4, what has a precision of its own, and decoders of an encoder's output need the native backend"


def _torch_prompt(
    cases: Sequence[Case], candidates: Sequence[Candidate], prefill: int, threads: int
) -> Iterator[Case]:
    dense = next((candidate for candidate in candidates if candidate.group == "dense"), None)
    if dense is None or not dense.whole or dense.spec.encoder:
        return
    case = Case(Model(dense, "torch", PROMPT_RIVAL, threads), 0, prefill=prefill)
    there = {
        (each.model.candidate.name, each.model.backend, each.model.dtype) for each in cases if each.prefill
    }
    if (dense.name, case.model.backend, case.model.dtype) not in there:
        yield case


def peer_rows(
    names: Sequence[str],
    candidates: Sequence[Candidate],
    *,
    dtypes: Sequence[str],
    threads: Sequence[int],
    contexts: Sequence[int],
    positions: int,
    prefill: int | None = None,
    variants_named: Sequence[str] | None = None,
) -> list[Case]:
    """The rows of other programs, which decode one sequence with whole models; `peers.choose` has the rules.

    Some of them read a prompt of `prefill` tokens, too.
    """
    ours = [
        replace(each, spec=variants.with_positions(each.spec, positions))
        for each in candidates
        if each.precision == UNCHANGED and each.spec.encoder is None
    ]
    chosen = peers.choose(names, ours, dtypes, variants_named) if names and ours else []
    cases = []
    for count in threads:
        models = [Model(row.model, row.peer.name, row.dtype, count, row) for row in chosen]
        cases += [Case(model, context) for context in contexts for model in models]
        readers = [model for model in models if model.peer and model.peer.peer.reads_prompts]
        cases += [Case(model, 0, prefill=prefill) for model in readers if prefill]
    return cases


# -- does it fit? --------------------------------------------------------------------------------------------


def check_positions(plan: Plan) -> None:
    """Raise `Failure` when a trained model has fewer positions than a row needs."""
    settings = plan.settings
    for case in plan.cases:
        spec, needed = plan.built(case.model), plan.capacity(case)
        if spec.max_positions >= needed:
            continue
        reason, option = f"a prompt of {case.prefill} tokens", "--prefill"
        if not case.prefill:
            option = "--context"
            reason = (
                f"context {case.context} + {settings.warmup_tokens} warm-up + "
                f"{settings.tokens_per_round} measured tokens"
            )
        raise console.Failure(
            f"{case.model.candidate.name}: {needed} positions are needed ({reason}), the model has "
            f"{spec.max_positions}; use a smaller {option}"
        )


def pool_elements(plan: Plan) -> dict[str, int]:
    """Elements that the shared memory of the random models needs, by type."""
    needs = []
    for model in plan.models:
        if model.peer:
            if not model.peer.peer.own_model:
                needs.append(torch_elements(model.peer.beside.spec, model.peer.our_dtype))
        elif model.candidate.run:
            continue
        elif model.backend == "native":
            needs.append(packed_elements(plan.built(model), precision_of(model), overlapping=plan.from_disk))
        else:
            needs.append(torch_elements(plan.built(model), model.dtype))
    return largest(needs)


def packed_bytes(plan: Plan, model: Model, *, units: bool = True) -> int:
    """Bytes of a packed model, with or without the units of its sparse layers."""
    return sum(
        slot.elements * WIDTHS[kind] + (4 * slot.scales if kind == "int8" else 0)
        for slot, kind in planned(plan.built(model), precision_of(model))
        if units or slot.layout != "units"
    )


def needed_bytes(plan: Plan) -> int:
    """An estimate of the memory: shared pools, trained or mapped models' own weights, and every row's cache."""
    total = WORKSPACE_BYTES + sum(count * WIDTHS[kind] for kind, count in pool_elements(plan).items())
    for model in plan.models:
        if not model.peer and (model.candidate.run or plan.from_disk):
            total += packed_bytes(plan, model, units=not plan.from_disk)
    for case in plan.cases:
        if case.model.peer:
            total += case.model.peer.needed_bytes(plan.capacity(case))
            continue
        spec = plan.built(case.model)
        kept = cached_bytes(spec, precision_of(case.model)) + bucket_bytes(spec)
        if "conv" in spec.attention.projection:  # the convolutions' inputs, with their margins
            rows = spec.layers * spec.attention_layers
            kept += round(1.2 * rows * spec.d_model * WIDTHS[precision_of(case.model).convolution])
        source = plan.source(case.model) * (source_bytes(spec, precision_of(case.model)) + bucket_bytes(spec))
        total += case.batch * (plan.capacity(case) * kept + source)
    return total


def check_memory(plan: Plan) -> None:
    """Raise `Failure` when less memory is available than `needed_bytes`."""
    needed, available = needed_bytes(plan), psutil.virtual_memory().available
    if needed > available:
        raise console.Failure(
            f"{needed / 1e9:.1f} GB of memory are needed, {available / 1e9:.1f} GB are available; "
            "choose one --dtype, a smaller --context or --batch, or build part of the model with "
            "bench.measured_layers=1"
        )


def check_disk(plan: Plan, folder: Path) -> None:
    """Raise `Failure` when the packed models do not fit beside what is in `folder`."""
    needed = sum(packed_bytes(plan, model) for model in plan.models)
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise console.Failure(f"{folder}: {error.strerror}; name another --disk-folder") from error
    if needed > free:
        raise console.Failure(
            f"{folder}: {needed / 1e9:.1f} GB are needed for the packed models, {free / 1e9:.1f} GB are "
            "free; name another --disk-folder"
        )
