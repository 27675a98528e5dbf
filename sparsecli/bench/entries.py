"""From a plan to measured rows: models are built, each row gets its turns, and figures are made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from sparsecli.bench import disk, roofline, variants
from sparsecli.bench.measure import Decoder, PromptReader, Turn, spread, times
from sparsecli.bench.native_decoder import DiskDecoder, NativeDecoder
from sparsecli.bench.peers import PeerDecoder, PromptPeerDecoder
from sparsecli.bench.plan import Case, Model, Plan, pool_elements, precision_of
from sparsecli.bench.report import Disk, Row, Subject
from sparsecli.bench.torch_decoder import TorchDecoder, TorchModel
from sparsecli.bench.traffic import chosen_unit_bytes
from sparsecli.bench.weights import Pools, packed_model, torch_weights
from sparsecli.decode.engine import Engine
from sparsecli.decode.packed.folder import read_weights
from sparsecli.decode.packed.pack import PackedModel, pack

FEED_FORWARD_PARTS = (
    "controller",
    "unit rows in",
    "unit rows out",
    "dense feed-forward",
    "barriers",  # all of them: the native layer is charged rather too much than too little
    "feed-forward",
)
"""Parts of a profile that count as the feed-forward layer's, the native engine's and PyTorch's."""


@dataclass(frozen=True)
class Entry:
    """A row on its way: what it is, and its decoder with its samples."""

    subject: Subject
    case: Case
    turn: Turn


def load(plan: Plan, folder: Path) -> tuple[list[Entry], Disk | None]:
    """Build the models and a decoder for every row; with `plan.from_disk`, files are in `folder` for a moment.

    Raises `Failure` when memory or disk do not suffice, or a trained model does not load.
    """
    pools = Pools.of(pool_elements(plan))
    entries: list[Entry] = []
    speed = None
    for model in plan.models:
        cases = [case for case in plan.cases if case.model is model]
        loader: _Loader
        if model.peer:
            loader = _Peer(plan, model, pools)
        elif model.backend == "torch":
            loader = _Torch(plan, model, pools)
        else:
            loader = _Native(plan, model, pools, folder, probed=speed is None)
            speed = speed or loader.speed
        entries += [
            Entry(plan.subject(case), case, _turn(plan, case, loader.decoder(case))) for case in cases
        ]
    order = {id(case): index for index, case in enumerate(plan.cases)}
    return sorted(entries, key=lambda entry: order[id(entry.case)]), speed


class _Loader(ABC):
    """A model in memory, which gives a decoder for each row."""

    def __init__(self, plan: Plan, model: Model, pools: Pools) -> None:
        self.plan, self.model, self.pools = plan, model, pools
        self.spec = plan.built(model)

    @abstractmethod
    def decoder(self, case: Case) -> Decoder: ...


class _Native(_Loader):
    speed: Disk | None = None

    def __init__(self, plan: Plan, model: Model, pools: Pools, folder: Path, *, probed: bool) -> None:
        super().__init__(plan, model, pools)
        packed = self._packed()
        if plan.from_disk:
            packed, self.file, self.speed = disk.load(packed, folder, probed=probed)
        self.engine = Engine(packed, model.threads, profile=plan.profile)

    def _packed(self) -> PackedModel:
        run, precision = self.model.candidate.run, precision_of(self.model)
        if run:
            return pack(self.spec, read_weights(run), precision)
        return packed_model(self.spec, precision, self.pools, overlapping=self.plan.from_disk)

    def decoder(self, case: Case) -> Decoder:
        capacity, source = self.plan.capacity(case), self.plan.source(case.model)
        if self.plan.from_disk:
            return DiskDecoder(self.engine, capacity, case.batch, source, self.file)
        return NativeDecoder(self.engine, capacity, case.batch, source)


class _Torch(_Loader):
    def __init__(self, plan: Plan, model: Model, pools: Pools) -> None:
        super().__init__(plan, model, pools)
        run = model.candidate.run
        if run:
            weights = variants.trained_weights(run, getattr(torch, model.dtype))
        else:
            weights = torch_weights(self.spec, model.dtype, pools)
        self.network = TorchModel(self.spec, weights, plan.profile)

    def decoder(self, case: Case) -> Decoder:
        return TorchDecoder(self.network, self.model.threads, self.plan.capacity(case), case.batch)


class _Peer(_Loader):
    loaded: PeerDecoder | None = None

    def decoder(self, case: Case) -> Decoder:
        row = self.model.peer
        assert row
        if case.prefill and self.loaded:
            return cast(PromptPeerDecoder, self.loaded).reader(case.prefill)
        torch.set_num_threads(self.model.threads)  # some of them run in PyTorch
        weights = {} if row.peer.own_model else torch_weights(row.beside.spec, row.our_dtype, self.pools)
        self.loaded = row.load(weights, self.plan.capacity(case), self.model.threads)
        return self.loaded


def _turn(plan: Plan, case: Case, decoder: Decoder) -> Turn:
    spec, settings, model = plan.built(case.model), plan.settings, case.model
    return Turn(
        PromptReader(decoder, spec.vocabulary.size) if case.prefill else decoder,
        spec.vocabulary.size,
        model.candidate.spec.layers,
        spec.layers,
        context=case.prefill or case.context,
        steps=1 if case.prefill else settings.tokens_per_round,
        warmup=0 if case.prefill else settings.warmup_tokens,
        tokens=case.prefill or case.batch,
        profiled=decoder if plan.profile and isinstance(decoder, NativeDecoder | TorchDecoder) else None,
        from_disk=decoder if isinstance(decoder, DiskDecoder) else None,
    )


# -- figures -------------------------------------------------------------------------------------------------


def rows(entries: Sequence[Entry], gb_per_second: float, over: str | None) -> list[Row]:
    """The measured rows; a dense row is what rows of the same backend, dtype and sizes are compared with.

    `over` names the backend and dtype of another row that they are compared with, `torch:bfloat16`.
    """
    baselines: dict[tuple[object, ...], Entry] = {}
    rivals: dict[tuple[object, ...], Entry] = {}
    for entry in entries:
        subject = entry.subject
        if subject.group == "dense":
            baselines.setdefault(subject.key[1:], entry)
        if subject.group in ("dense", "peer") and over == f"{subject.backend}:{subject.dtype}":
            rivals.setdefault(subject.key[3:], entry)
    return [
        _row(entry, baselines.get(entry.subject.key[1:]), rivals.get(entry.subject.key[3:]), gb_per_second)
        for entry in entries
    ]


def _row(entry: Entry, baseline: Entry | None, rival: Entry | None, gb_per_second: float) -> Row:
    subject, turn = entry.subject, entry.turn
    candidate = entry.case.model.candidate
    token, block_ms, parts = times(turn.token_ms), turn.block_ms, turn.parts
    paper = None if entry.case.prefill or entry.case.batch > 1 else candidate.paper
    paper_baseline = baseline.case.model.candidate.paper if baseline else None
    limited = not (subject.prefill or subject.from_disk)  # by the memory's bandwidth
    share = roofline.fraction_of_limit(subject.bytes_per_token, token.p50, gb_per_second)
    layer = sum(parts.get(name, 0.0) for name in FEED_FORWARD_PARTS) / candidate.spec.layers
    read = int(np.median(turn.bytes_read)) if turn.bytes_read else None
    decoder = turn.decoder.decoder if isinstance(turn.decoder, PromptReader) else turn.decoder
    return Row(
        **dict(subject),
        ms_per_token=token,
        ms_per_block=None if block_ms is None else spread(block_ms),
        tokens_per_second=round(1e3 / token.p50, 3),
        speedup=_speedup(baseline, token.p50),
        speedup_over=_speedup(rival, token.p50),
        bandwidth_fraction=round(share, 4) if limited else None,
        held_out_loss=candidate.held_out_loss,
        paper=paper,
        paper_speedup=round(paper_baseline.ms_per_token / paper.ms_per_token, 4)
        if paper_baseline and paper
        else None,
        parts=parts or None,
        ms_feed_forward=round(layer, 5) if parts else None,
        disk_bytes_per_token=read,
        disk_bytes_expected=None
        if read is None
        else chosen_unit_bytes(candidate.spec, precision_of(entry.case.model), subject.batch),
        disk_mb_s=None if read is None else round(read / token.p50 / 1e3, 1),
        peer_settings=getattr(decoder, "settings", None),
    )


def _speedup(baseline: Entry | None, milliseconds: float) -> float | None:
    return round(times(baseline.turn.token_ms).p50 / milliseconds, 4) if baseline else None
