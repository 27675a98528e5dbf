"""Models in memory: their size is checked, they are loaded, and each case gets a decoder."""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import psutil
import torch

from sparsecli import console
from sparsecli.bench import host
from sparsecli.bench.bytes_read import bucket_bytes, cached_bytes, source_bytes
from sparsecli.bench.cases import Case, Plan, built, built_with_torch
from sparsecli.bench.decoders import PromptReader, TimedDecoder
from sparsecli.bench.decoders.native import DiskDecoder, NativeDecoder
from sparsecli.bench.decoders.torch import ImageReader, TorchDecoder, TorchModel
from sparsecli.bench.peers import PeerDecoder, PromptPeerDecoder
from sparsecli.bench.random_weights import (
    Pools,
    largest,
    packed_elements,
    packed_model,
    planned,
    torch_elements,
    torch_weights,
)
from sparsecli.bench.result import Disk
from sparsecli.bench.timing import Timing
from sparsecli.bench.variants import GGUF, gguf_weights
from sparsecli.decode.engine import Engine
from sparsecli.decode.packed.file import open_packed, save
from sparsecli.decode.packed.folder import read_weights
from sparsecli.decode.packed.pack import PackedModel, pack
from sparsecli.decode.packed.tensor_file import WIDTHS
from sparsecli.model.files import of_images
from sparsecli.model.loading import load_classifier, load_model

WORKSPACE_BYTES = 2**30  # the interpreter, activations and the bandwidth probe's buffer


# -- does it fit? --------------------------------------------------------------------------------------------


def pool_elements(plan: Plan) -> dict[str, int]:
    """Elements of the shared pools of the random models, by type."""
    needs = []
    for cases in plan.models:
        case = cases[0]
        if case.peer:
            if not case.peer.peer.own_model:
                needs.append(torch_elements(case.peer.beside.spec, case.peer.our_dtype))
        elif case.variant.run:
            continue
        elif case.backend == "native":
            needs.append(packed_elements(built(cases), case.precision, overlapping=case.from_disk))
        else:
            needs.append(torch_elements(built_with_torch(cases), case.dtype))
    return largest(needs)


def _packed_bytes(cases: Sequence[Case], *, units: bool = True) -> int:
    """Bytes of a packed model, with or without the units of its sparse layers."""
    return sum(
        slot.elements * WIDTHS[kind] + (4 * slot.scales if kind == "int8" else 0)
        for slot, kind in planned(built(cases), cases[0].precision)
        if units or slot.layout != "units"
    )


def disk_bytes(plan: Plan) -> int:
    """Bytes of the files that hold packed models while they are measured."""
    return sum(_packed_bytes(cases) for cases in plan.models if cases[0].from_disk)


def memory_bytes(plan: Plan) -> int:
    """An estimate of the memory: shared pools, trained or mapped models' own weights, and every case's cache."""
    total = WORKSPACE_BYTES + sum(count * WIDTHS[kind] for kind, count in pool_elements(plan).items())
    for cases in plan.models:
        if cases[0].peer:
            total += sum(case.peer.needed_bytes(case.capacity) for case in cases if case.peer)
            continue
        if cases[0].variant.run or cases[0].from_disk:
            total += _packed_bytes(cases, units=not cases[0].from_disk)
        spec, precision = built(cases), cases[0].precision
        kept = cached_bytes(spec, precision) + bucket_bytes(spec)
        if "conv" in spec.attention.projection:  # the convolutions' inputs, with their padding
            rows = spec.layers * spec.attention_layers
            kept += round(1.2 * rows * spec.d_model * WIDTHS[precision.convolution])
        held = source_bytes(spec, precision) + bucket_bytes(spec)
        total += sum(case.batch * (case.capacity * kept + case.source * held) for case in cases)
    return total


def check_memory(plan: Plan) -> None:
    """Raise `Failure` if less memory is available than `memory_bytes`."""
    needed, available = memory_bytes(plan), psutil.virtual_memory().available
    if needed > available:
        raise console.Failure(
            f"{needed / 1e9:.1f} GB of memory are needed, {available / 1e9:.1f} GB are available; "
            "choose one --dtype, a smaller --context or --batch, or build part of the model with "
            "bench.measured_layers=1"
        )


def check_disk(plan: Plan, folder: Path) -> None:
    """Raise `Failure` if `folder` has no room for the packed models."""
    needed = disk_bytes(plan)
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise console.Failure(
            f"{folder}: {console.system_reason(error)}; name another --disk-folder"
        ) from error
    if needed > free:
        raise console.Failure(
            f"{folder}: {needed / 1e9:.1f} GB are needed for the packed models, {free / 1e9:.1f} GB are "
            "free; name another --disk-folder"
        )


# -- loading -------------------------------------------------------------------------------------------------


def load(plan: Plan, folder: Path) -> tuple[list[Timing], Disk | None]:
    """Build the models, and a decoder for every case. Files to read from are in `folder` only while they are opened.

    Raises `Failure` if memory or disk space is too small, or a trained model does not load.
    """
    pools = Pools.of(pool_elements(plan))
    timings: dict[Case, Timing] = {}
    speed = None
    for cases in plan.models:
        model: _LoadedModel
        if cases[0].peer:
            model = _LoadedPeer(cases, pools)
        elif cases[0].backend == "torch":
            model = _LoadedTorch(cases, pools, plan.profile)
        else:
            model = _LoadedNative(cases, pools, plan.profile, folder, probed=speed is None)
            speed = speed or model.speed
        for case in cases:
            timings[case] = _timing(case, model.spec.layers, model.decoder(case), plan.profile)
    return [timings[case] for case in plan.cases], speed


class _LoadedModel(ABC):
    """A model in memory that makes the decoder of each case."""

    def __init__(self, cases: Sequence[Case], pools: Pools) -> None:
        self.case, self.pools, self.spec = cases[0], pools, built(cases)

    @abstractmethod
    def decoder(self, case: Case) -> TimedDecoder: ...


class _LoadedNative(_LoadedModel):
    speed: Disk | None = None

    def __init__(
        self, cases: Sequence[Case], pools: Pools, profile: bool, folder: Path, *, probed: bool
    ) -> None:
        super().__init__(cases, pools)
        packed = self._packed()
        if self.case.from_disk:
            packed, self.file, self.speed = _mapped(packed, folder, probed=probed)
        self.engine = Engine(packed, self.case.threads, profile=profile)

    def _packed(self) -> PackedModel:
        run, precision = self.case.variant.run, self.case.precision
        if run:
            return pack(self.spec, gguf_weights(run) if run.suffix == GGUF else read_weights(run), precision)
        return packed_model(self.spec, precision, self.pools, overlapping=self.case.from_disk)

    def decoder(self, case: Case) -> TimedDecoder:
        if case.from_disk:
            return DiskDecoder(self.engine, case.capacity, case.batch, case.source, self.file)
        return NativeDecoder(self.engine, case.capacity, case.batch, case.source)


def _mapped(model: PackedModel, folder: Path, *, probed: bool) -> tuple[PackedModel, int, Disk | None]:
    """`model` with its units mapped from a file in `folder`, the open file, and, if `probed`, the disk's speed.

    The file is unlinked at once, so that the system frees its space when the program ends, however it ends.
    Raises `Failure` if the file cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix=".sparsecli-bench-", dir=folder) as temporary:
        path = Path(temporary) / "model.spk"
        save(model, path)
        mapped = open_packed(path, from_disk=True)
        return mapped, os.open(path, os.O_RDONLY), host.disk_speed(path) if probed else None


class _LoadedTorch(_LoadedModel):
    def __init__(self, cases: Sequence[Case], pools: Pools, profile: bool) -> None:
        super().__init__(cases, pools)
        run, dtype = self.case.variant.run, self.case.dtype
        spec = built_with_torch(cases)
        weights = trained_weights(run, getattr(torch, dtype)) if run else torch_weights(spec, dtype, pools)
        self.network = TorchModel(spec, weights, profile)

    def decoder(self, case: Case) -> TimedDecoder:
        if case.variant.vision:
            return ImageReader(self.network, case.threads, case.batch)
        return TorchDecoder(self.network, case.threads, case.capacity, case.batch)


class _LoadedPeer(_LoadedModel):
    loaded: PeerDecoder | None = None

    def decoder(self, case: Case) -> TimedDecoder:
        model = case.peer
        assert model
        if case.prefill and self.loaded:
            return cast(PromptPeerDecoder, self.loaded).reader(case.prefill)
        torch.set_num_threads(case.threads)  # some of them run in PyTorch
        weights = (
            {} if model.peer.own_model else torch_weights(model.beside.spec, model.our_dtype, self.pools)
        )
        self.loaded = model.load(weights, case.capacity, case.threads)
        return self.loaded


def trained_weights(folder: Path, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
    """A trained model's parameters by name."""
    model = load_classifier(folder, dtype) if of_images(folder) else load_model(folder, dtype)[0]
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


PROFILED = NativeDecoder | TorchDecoder | ImageReader


def _timing(case: Case, measured_layers: int, decoder: TimedDecoder, profile: bool) -> Timing:
    vocabulary, settings = case.variant.spec.vocabulary.size, case.settings
    return Timing(
        PromptReader(decoder, vocabulary) if case.prefill else decoder,
        vocabulary,
        case.variant.spec.layers,
        measured_layers,
        context=case.prefill or case.context,
        steps=1 if case.prefill else settings.tokens_per_round,
        warmup=0 if case.prefill else settings.warmup_tokens,
        tokens=case.prefill or case.batch,
        profiled=decoder if profile and isinstance(decoder, PROFILED) else None,
        evicting=decoder if isinstance(decoder, DiskDecoder) else None,
    )
