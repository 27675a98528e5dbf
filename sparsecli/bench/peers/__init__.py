"""Peers: other programs that are measured beside ours, with their models, requirements and loading."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

from sparsecli import console
from sparsecli.bench.peers.llama_shape import llama_shaped
from sparsecli.bench.variants import Variant
from sparsecli.model.sizes import count_parameters
from sparsecli.spec.model import ModelSpec

if TYPE_CHECKING:
    from sparsecli.bench.peers.llama_file import WeightsRead

WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "q8_0": 34 / 32, "q4_0": 18 / 32}


class PeerDecoder(Protocol):
    """A `TimedDecoder` of another program. It does not measure the time of the blocks."""

    settings: str
    """The program's version and settings, in words. They are final after the first decoded token."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """Start the sequence with these tokens."""

    def rewind(self) -> None:
        """Remove all tokens after the prefill from the cache."""

    def step(self, token: int) -> tuple[int, None]:
        """Append one token. Returns the greedy next token, and None for the time of the blocks."""


class PromptPeerDecoder(PeerDecoder, Protocol):
    """A decoder of a program whose prefill is also measured."""

    def reader(self, length: int) -> PeerDecoder:
        """Another decoder with the same weights, with the program's fastest prefill of `length` tokens."""


class PeerModule(Protocol):
    """The interface of the modules of this package."""

    def refusal(self, spec: ModelSpec, dtype: str) -> str | None:
        """The reason why the program cannot run this model here; None if it can."""

    def load(
        self, spec: ModelSpec, weights: Mapping[str, Tensor], dtype: str, capacity: int, threads: int
    ) -> PeerDecoder:
        """A decoder with room for `capacity` tokens. A program with a model of its own ignores `weights`."""


class FilePeerModule(PeerModule, Protocol):
    """The module of a program that also measures a GGUF file as it is."""

    def load_file(self, file: Path, spec: ModelSpec, capacity: int, threads: int) -> PeerDecoder:
        """A decoder of the model in `file` with room for `capacity` tokens."""


@dataclass(frozen=True)
class Peer:
    """A program to compare with."""

    name: str
    module: str
    packages: tuple[str, ...]  # that it is imported from
    extra: str | None  # that brings them
    own_model: bool  # runs a dense Llama-shaped model of equal size in place of our variants
    dtypes: Mapping[str, tuple[str, ...]]  # its weight types, by that of ours which they are measured beside
    cache_bytes: Mapping[str, int]  # bytes of a cached value, by its weight type
    reads_prompts: bool = False  # its decoders are `PromptPeerDecoder`s
    reads_files: bool = False  # its module is a `FilePeerModule`

    def missing(self) -> str | None:
        """The missing requirement, as the end of a sentence; None if the program can be used."""
        if any(importlib.util.find_spec(package) is None for package in self.packages):
            return f"it is not installed; pip install 'sparsecli[{self.extra}]'"
        if not self.packages and shutil.which(os.environ.get("CXX", "g++")) is None:
            return "it needs a C++ compiler; install g++ or set CXX"
        return None

    def load_module(self) -> PeerModule:
        """Its module. Importing the module imports the program."""
        return cast(PeerModule, importlib.import_module(f"{__name__}.{self.module}"))


FLOAT16_BYTES = 2
OURS = {"float32": ("float32",), "bfloat16": ("bfloat16",)}
BYTES = {"float32": 4, "bfloat16": 2, "int8": 4}
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "llama.cpp",
            "llama_cpp",
            ("llama_cpp", "gguf"),
            "peers-llama-cpp",
            own_model=True,
            dtypes={**OURS, "int8": ("q8_0", "q4_0"), "int4": ("q4_0",)},
            cache_bytes=dict.fromkeys(("float32", "bfloat16", "q8_0", "q4_0"), 2),
            reads_prompts=True,
            reads_files=True,
        ),
        Peer("openvino", "openvino", ("openvino",), "peers-openvino", False, OURS, BYTES),
        Peer(
            "ctranslate2",
            "ctranslate2",
            ("ctranslate2",),
            "peers-ctranslate2",
            own_model=True,
            dtypes={**OURS, "int8": ("int8",)},
            cache_bytes=BYTES,
        ),
        Peer("torch.compile", "torch_compile", (), None, False, OURS, BYTES),
    )
}


@dataclass(frozen=True)
class PeerModel:
    """A model that a peer runs, in one of its weight types."""

    peer: Peer
    beside: Variant  # ours, whose weights `load` takes
    variant: Variant  # what the peer runs: `beside`, or a dense Llama-shaped model
    our_dtype: str  # type of the weights that `load` takes, and beside which it is measured
    dtype: str  # the peer's
    file: WeightsRead | None = None  # what it reads of the GGUF file that `variant` is, if it is one

    @property
    def bits_per_weight(self) -> float:
        """Bits of each weight that a token reads, on average: see `bytes_read.bits_per_weight`."""
        return self.file.bits_per_weight if self.file else 8 * WEIGHT_BYTES[self.dtype]

    def bytes_per_token(self, context: int, prefill: int = 0) -> int:
        """Bytes that a token reads after `context` others, or in a prompt of `prefill` tokens."""
        weights = self.file.bytes if self.file else self.variant.sizes.active * WEIGHT_BYTES[self.dtype]
        return round(weights / max(prefill, 1) + self._cached_bytes(context))

    def needed_bytes(self, positions: int) -> int:
        """Approximate memory beside our weights, because each peer holds its own copy."""
        file = self.variant.gguf
        weights = file.stat().st_size if file else self.variant.sizes.total * WEIGHT_BYTES[self.dtype]
        return round(weights + self._cached_bytes(positions))

    def _cached_bytes(self, positions: int) -> int:
        value_bytes = self.peer.cache_bytes.get(self.dtype, FLOAT16_BYTES)
        return positions * self.variant.sizes.cached_per_position * value_bytes

    def load(self, weights: Mapping[str, Tensor], capacity: int, threads: int) -> PeerDecoder:
        """A decoder. `weights` are those of `beside` in `our_dtype`; a peer with its own model ignores them.

        Raises `Failure` if the disk is full, or the program refuses the model.
        """
        module = self.peer.load_module()
        if file := self.variant.gguf:
            return cast(FilePeerModule, module).load_file(file, self.variant.spec, capacity, threads)
        return module.load(self.variant.spec, weights, self.dtype, capacity, threads)


def choose(
    names: Sequence[str],
    variants: Sequence[Variant],
    dtypes: Sequence[str],
    own_variants: Sequence[str] | None = None,
) -> list[PeerModel]:
    """The models of the peers `names`, in order. Peers that cannot be measured are reported on stderr.

    Variants that are GGUF files are measured by peers that read such files, which run them as they are.
    Peers without a model of their own run `own_variants`; by default the first dense variant, and the last sparse one
    with the same vocabulary layer.
    """
    whole = [variant for variant in variants if variant.measured_layers is None]
    found = []
    for name in dict.fromkeys(names):
        peer = PEERS[name]
        lack = peer.missing()
        if lack or not whole:
            console.warn(
                f"{name} is not measured: {lack or 'peers run whole models, but only some blocks of these are built'}"
            )
            continue
        if files := [variant for variant in whole if variant.gguf]:
            found += [_of_file(peer, variant) for variant in files if peer.reads_files]
            continue
        pairs = _llama_shaped(whole[0]) if peer.own_model else _ours(whole, own_variants)
        found += list(_models(peer, pairs, dtypes))
    return found


def _of_file(peer: Peer, variant: Variant) -> PeerModel:
    from sparsecli.bench.peers.llama_file import weights_read  # needs the package gguf

    assert variant.gguf
    read = weights_read(variant.gguf)
    kinds = [kind for kind in read.bytes_by_type if kind != "f32"]  # in which all files have their vectors
    dtype = " ".join(kinds or ["f32"]).upper()
    return PeerModel(peer, variant, variant, dtype, dtype, read)


def _llama_shaped(variant: Variant) -> list[tuple[Variant, Variant]]:
    spec = llama_shaped(variant.spec, variant.sizes.total)
    return [(variant, Variant("dense, Llama-shaped", "dense", spec, count_parameters(spec)))]


def _ours(variants: Sequence[Variant], names: Sequence[str] | None) -> list[tuple[Variant, Variant]]:
    if names is None:
        dense = [variant for variant in variants if variant.group == "dense"][:1]
        sparse = [variant for variant in variants if variant.group == "sparse"]
        alike = [each for each in sparse if dense and each.spec.vocabulary == dense[0].spec.vocabulary]
        chosen = dense + (alike or sparse)[-1:]
    else:
        chosen = [variant for variant in variants if variant.name in names]
    return [(variant, variant) for variant in chosen]


def _models(
    peer: Peer, pairs: Sequence[tuple[Variant, Variant]], dtypes: Sequence[str]
) -> Iterator[PeerModel]:
    module = peer.load_module()
    found = set()
    for our_dtype in dtypes:
        for dtype in peer.dtypes.get(our_dtype, ()):
            if dtype in found:  # beside a type of ours with more bits
                continue
            found.add(dtype)
            for beside, variant in pairs:
                if reason := _unknown_parts(beside.spec) or module.refusal(variant.spec, dtype):
                    console.warn(f"{peer.name} in {dtype} is not measured: {reason}")
                    break
                yield PeerModel(peer, beside, variant, our_dtype, dtype)


def _unknown_parts(spec: ModelSpec) -> str | None:
    """The reason why other programs have no model like `spec`; None if they have."""
    if spec.encoder or spec.residual == "reversible" or spec.sru or spec.attention.shares_query_key:
        return "peers run decoders of one stream, without an encoder, recurrent layers or shared queries and keys"
    return f"peers run models without {spec.beyond_llama}" if spec.beyond_llama else None
