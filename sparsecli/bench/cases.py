"""Cases of a bench: each variant with each weight type, decoder and size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from sparsecli import console
from sparsecli.bench import peers, variants
from sparsecli.bench.bytes_read import bits_per_weight, bytes_per_token
from sparsecli.bench.peers import PeerModel
from sparsecli.bench.result import RowKey, Settings
from sparsecli.bench.variants import UNCHANGED, Variant
from sparsecli.decode.engine import processors
from sparsecli.decode.packed.precision import Precision
from sparsecli.recipe.schema import BenchSpec
from sparsecli.spec.model import ModelSpec
from sparsecli.spec.vision import AnySpec

TORCH_DTYPES = ("float32", "bfloat16")
NATIVE_ROWS = (
    "int8, int4, codes of GGUF files, rows with a precision of their own, and models with an encoder"
)
PROMPT_DTYPE = "bfloat16"  # PyTorch reads a prompt fastest in this type


@dataclass(frozen=True, eq=False)
class Case:
    """One measurement: a variant with a weight type on a decoder, at one size."""

    variant: Variant
    backend: str  # native, torch, or the name of a peer
    dtype: str
    threads: int
    context: int
    settings: Settings
    batch: int = 1
    prefill: int = 0  # tokens of the prompt whose prefill is measured; 0: decoding is measured
    from_disk: bool = False
    peer: PeerModel | None = None

    @property
    def model(self) -> tuple[object, ...]:
        """Key of the model in memory; cases with the same key share it."""
        return id(self.variant), self.backend, self.dtype, self.threads

    @property
    def capacity(self) -> int:
        """Tokens for which the cache needs room."""
        if self.variant.vision:
            return self.variant.vision.positions
        return self.prefill or self.context + self.settings.warmup_tokens + self.settings.tokens_per_round

    @property
    def source(self) -> int:
        """Tokens of the encoder's input; 0 without an encoder."""
        return self.settings.source or 0 if self.variant.spec.encoder else 0

    @property
    def precision(self) -> Precision:
        """The weight types of the parts of our model."""
        if self.variant.spec.quantization.gguf:  # as `generate` has it
            return Precision.of("float32", cache="bfloat16")
        changes = {name: value for name, value in self.variant.precision if value is not None}
        return Precision.of(self.dtype, **changes)

    @property
    def key(self) -> RowKey:
        """The key of its row."""
        return RowKey(
            self.variant.name,
            self.backend,
            self.dtype,
            self.threads,
            self.context,
            self.batch,
            self.prefill or None,
            self.from_disk,
        )

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The fields of its `Row` that are known before it is measured."""
        sizes, native = self.variant.sizes, self.backend == "native"
        if vision := self.variant.vision:  # the tokens of a batch are its patches
            kinds = self.precision, 0, self.batch * vision.positions, self.dtype
            read = vision.positions * bytes_per_token(self.variant.spec, *kinds)
        elif self.peer:
            read = self.peer.bytes_per_token(self.context, self.prefill)
        else:
            read = bytes_per_token(
                self.variant.spec,
                self.precision,
                self.context,
                self.batch * max(self.prefill, 1),
                vectors="float32" if native else self.dtype,
                source=self.source,
            )
        return {
            **self.key._asdict(),
            "group": "peer" if self.peer else self.variant.group,
            "precision": vars(self.precision) if native else None,
            "parameters": sizes.total,
            "active_parameters": sizes.active,
            "bytes_per_token": read,
            "bits_per_weight": round(self._bits_per_weight, 3),
            "projected": not self.variant.whole,
        }

    @property
    def _bits_per_weight(self) -> float:
        if self.peer:
            return self.peer.bits_per_weight
        vectors = "float32" if self.backend == "native" else self.dtype
        return bits_per_weight(self.variant.spec, self.precision, vectors)


@dataclass(frozen=True)
class Plan:
    """All cases in order, and the settings of the measurement."""

    cases: Sequence[Case]
    settings: Settings
    profile: bool = False

    @cached_property
    def models(self) -> list[list[Case]]:
        """The cases, in order, in one list for each model in memory."""
        served: dict[tuple[object, ...], list[Case]] = {}
        for case in self.cases:
            served.setdefault(case.model, []).append(case)
        return list(served.values())

    @property
    def variants(self) -> list[Variant]:
        """The variants that our own backends measure."""
        return list({id(case.variant): case.variant for case in self.cases if not case.peer}.values())

    @property
    def from_disk(self) -> bool:
        """Whether weights are read from a file."""
        return any(case.from_disk for case in self.cases)


def built_with_torch(cases: Sequence[Case]) -> AnySpec:
    """As `built`, but for `cases` of a model of images the whole of it, not its layers alone."""
    variant = cases[0].variant
    if variant.vision is None:
        return built(cases)
    return variant.vision.model_copy(update={"layers": built(cases).layers})


def built(cases: Sequence[Case]) -> ModelSpec:
    """The architecture that is built for `cases`, perhaps with fewer blocks. Random models get enough positions."""
    variant = cases[0].variant
    spec = variants.part(variant.spec, variant.measured_layers)
    if variant.run or cases[0].peer:
        return spec
    return variants.with_positions(spec, max(case.capacity for case in cases))


# -- choosing ------------------------------------------------------------------------------------------------


def plan(chosen: Sequence[Variant], bench: BenchSpec) -> Plan:
    """All combinations that a backend can compute, then those of peers. One message lists the others.

    With `bench.prefill`, each whole model also reads a prompt, and so does the first dense one in PyTorch as bfloat16.
    Raises `Failure` when no combination is left.
    """
    settings = Settings(
        unit="image" if any(variant.vision for variant in chosen) else "token",
        context=bench.context[0],
        source=bench.source if any(variant.spec.encoder for variant in chosen) else None,
        rounds=bench.rounds,
        tokens_per_round=bench.tokens_per_round,
        warmup_tokens=bench.warmup_tokens,
    )
    threads = list(dict.fromkeys(bench.threads or [processors()]))
    cases = _own_cases(chosen, bench, settings, threads) + _peer_cases(chosen, bench, settings, threads)
    return Plan(cases, settings, profile=bench.profile)


def _own_cases(
    chosen: Sequence[Variant], bench: BenchSpec, settings: Settings, threads: Sequence[int]
) -> list[Case]:
    backends, dtypes, from_disk = bench.backends or ["native"], bench.dtypes, bench.from_disk
    types = {variant.name: variant.weight_types(dtypes) for variant in chosen}
    kinds = dict.fromkeys([*dtypes, *(kind for found in types.values() for kind in found)])
    pairs = list(product(dict.fromkeys(backends), kinds))
    fits = {
        (backend, dtype): [
            each
            for each in chosen
            if dtype in types[each.name] and _computes(backend, dtype, each, from_disk)
        ]
        for backend, dtype in pairs
    }
    asked = [pair for pair in pairs for each in chosen if pair[1] in types[each.name]]
    if len(asked) > sum(map(len, fits.values())):
        if not any(fits.values()):
            raise console.Failure(_nothing_left(backends, from_disk), exit_code=2)
        console.say(f"rows left out: {_nothing_left(backends, from_disk)}")
    sizes = list(product(dict.fromkeys(bench.context), dict.fromkeys(bench.batch)))
    cases: list[Case] = []
    for ((backend, dtype), fitting), count in product(fits.items(), threads):
        cases += [
            Case(variant, backend, dtype, count, context, settings, batch, from_disk=from_disk)
            for context, batch in sizes
            for variant in fitting
        ]
        if bench.prefill:
            cases += [
                Case(variant, backend, dtype, count, 0, settings, prefill=bench.prefill, from_disk=from_disk)
                for variant in fitting
                if variant.whole
            ]
    if bench.prefill and not all(variant.whole for variant in chosen):
        console.say(
            "rows left out: the prefill is measured only for whole models, not for some of their blocks"
        )
    if bench.prefill and not from_disk:
        cases += _torch_prompt(cases, chosen, bench.prefill, settings, max(threads))
    return cases


def _computes(backend: str, dtype: str, variant: Variant, from_disk: bool) -> bool:
    if from_disk and variant.spec.feed_forward.kind == "dense":
        return False
    special = variant.precision != UNCHANGED or variant.spec.encoder is not None
    return backend == "native" or (dtype in TORCH_DTYPES and not special and not from_disk)


def _nothing_left(backends: Sequence[str], from_disk: bool) -> str:
    if from_disk:
        return "--from-disk is for sparse layers on the native backend"
    if "native" in backends:
        return f"in PyTorch, {NATIVE_ROWS}"
    return f"{NATIVE_ROWS} need the native backend"


def _torch_prompt(
    cases: Sequence[Case], chosen: Sequence[Variant], prefill: int, settings: Settings, threads: int
) -> Iterator[Case]:
    dense = next((variant for variant in chosen if variant.group == "dense"), None)
    if dense is None or not dense.whole or dense.spec.encoder or dense.spec.quantization.gguf:
        return
    there = {(each.variant.name, each.backend, each.dtype) for each in cases if each.prefill}
    if (dense.name, "torch", PROMPT_DTYPE) not in there:
        yield Case(dense, "torch", PROMPT_DTYPE, threads, 0, settings, prefill=prefill)


def _peer_cases(
    chosen: Sequence[Variant], bench: BenchSpec, settings: Settings, threads: Sequence[int]
) -> list[Case]:
    """The cases of peers: one sequence, whole models, and for some peers a prompt; see `peers.choose`."""
    positions = max(bench.context) + bench.warmup_tokens + bench.tokens_per_round
    ours = [
        replace(each, spec=variants.with_positions(each.spec, max(positions, bench.prefill or 0)))
        for each in chosen
        if each.precision == UNCHANGED and each.spec.encoder is None
    ]
    if not (bench.peers and ours):
        return []
    models = peers.choose(bench.peers, ours, bench.dtypes, bench.peer_variants)
    cases: list[Case] = []
    for count in threads:
        decoding = [
            Case(model.variant, model.peer.name, model.dtype, count, context, settings, peer=model)
            for context in dict.fromkeys(bench.context)
            for model in models
        ]
        reading = [
            Case(
                model.variant,
                model.peer.name,
                model.dtype,
                count,
                0,
                settings,
                prefill=bench.prefill,
                peer=model,
            )
            for model in models
            if bench.prefill and model.peer.reads_prompts
        ]
        cases += decoding + reading
    return cases


def check_positions(cases: Sequence[Case]) -> None:
    """Raise `Failure` if a trained model has fewer positions than a case needs."""
    for case in cases:
        spec, needed = case.variant.spec, case.capacity
        if not case.variant.run or spec.max_positions >= needed:
            continue
        reason, option = f"a prompt of {case.prefill} tokens", "--prefill"
        if not case.prefill:
            settings, option = case.settings, "--context"
            reason = (
                f"context {case.context} + {settings.warmup_tokens} warm-up + "
                f"{settings.tokens_per_round} measured tokens"
            )
        raise console.Failure(
            f"{case.variant.name}: {needed} positions are needed ({reason}), the model has "
            f"{spec.max_positions}; use a smaller {option}"
        )
