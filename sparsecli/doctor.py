"""The `doctor` command: reports the machine and the installation, which determine the speed of decoding."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
import torch

from sparsecli import __version__, console
from sparsecli.bench import host
from sparsecli.bench.figures import LEAST_SHARE
from sparsecli.decode.engine import processors
from sparsecli.decode.native import binding
from sparsecli.model.versions import too_old

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "accelerate")

INSTRUCTIONS = {
    "avx2": "8 float32 at once",
    "fma": "multiply and add in one instruction",
    "avx512f": "16 float32 at once",
    "avx512_bf16": "bfloat16 products",
    "avx512_vnni": "int8 products",
    "amx_tile": "matrix products: batches and prompts, not single tokens",
}
"""Flags of /proc/cpuinfo and their use in decoding."""


@dataclass(frozen=True)
class Backend:
    """A backend, whether it is usable here, and the reason."""

    name: str
    usable: bool
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """The facts that `doctor` shows. A figure is None if the system does not give it."""

    versions: dict[str, str | None]
    cpu: str
    instructions: dict[str, bool] | None
    cores: int | None
    """Physical cores of the machine."""
    usable_cpus: int
    """Logical CPUs that this process may run on."""
    torch_threads: int
    torch_isa: str
    memory_gb: float
    available_gb: float
    bandwidth_gb_s: float
    """Memory read bandwidth with all of torch's threads."""
    engine_share: dict[str, float] | None
    """Share of this bandwidth that the native engine's gemv reaches, by weight type."""
    backends: list[Backend]


def run(format: Literal["table", "json"]) -> None:
    """Examine the machine for a few seconds, and show the result on stdout."""
    host.warn_if_busy()
    diagnosis = examine()
    if format == "json":
        console.json_out(asdict(diagnosis))
    else:
        console.print_table(["item", "value", "note"], rows(diagnosis))


def examine(cpuinfo: Path = host.CPUINFO) -> Diagnosis:
    """Examine this machine and measure its memory bandwidth."""
    name, flags = host.processor(cpuinfo)
    memory, bandwidth = psutil.virtual_memory(), host.bandwidth()
    backend = _native()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Diagnosis(
        versions={
            "sparsecli": __version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
        },
        cpu=name,
        instructions=None if flags is None else {flag: flag in flags for flag in INSTRUCTIONS},
        cores=psutil.cpu_count(logical=False),
        usable_cpus=usable,
        torch_threads=torch.get_num_threads(),
        torch_isa=torch.backends.cpu.get_cpu_capability(),
        memory_gb=round(memory.total / 1e9, 1),
        available_gb=round(memory.available / 1e9, 1),
        bandwidth_gb_s=round(bandwidth, 2),
        engine_share=host.engine_shares(bandwidth) if backend.usable else None,
        backends=[
            Backend(
                "torch", True, f"torch {torch.__version__} with {torch.backends.cpu.get_cpu_capability()}"
            ),
            backend,
        ],
    )


def _native() -> Backend:
    """The native engine's instruction set, or the reason why the engine is not usable."""
    try:
        reason = binding.available()
    except console.Failure as failure:  # a wrong environment variable
        reason = failure.message
    if reason is not None:
        return Backend("native", False, reason)
    others = [name for name in binding.instruction_sets() if name != binding.isa()]
    also = f"; SPARSECLI_ISA selects another: {', '.join(others)}" if others else ""
    return Backend("native", True, f"{binding.isa()} with {processors()} threads{also}")


def rows(diagnosis: Diagnosis) -> list[tuple[str, str, str]]:
    """Rows of the table: item, value, note."""
    result = [
        (package, found or "not installed", _note(package, found))
        for package, found in diagnosis.versions.items()
    ]
    cores = "unknown" if diagnosis.cores is None else str(diagnosis.cores)
    result += [
        ("processor", diagnosis.cpu, ""),
        ("cores", cores, f"{diagnosis.usable_cpus} logical CPUs for this process"),
        ("torch threads", str(diagnosis.torch_threads), "OMP_NUM_THREADS or --threads sets them"),
    ]
    for flag, meaning in INSTRUCTIONS.items():
        have = None if diagnosis.instructions is None else diagnosis.instructions[flag]
        result.append((flag, {None: "unknown", True: "yes", False: "no"}[have], meaning))
    limit = diagnosis.bandwidth_gb_s
    result += [
        ("memory", f"{diagnosis.memory_gb:.1f} GB", f"{diagnosis.available_gb:.1f} GB available"),
        ("bandwidth", f"{limit:.1f} GB/s", f"1 GB of weights per token: at best {limit:.1f} tokens/s"),
    ]
    for kind, share in (diagnosis.engine_share or {}).items():
        note = "" if share >= LEAST_SHARE else "slow: speed-ups over dense rows of this type mean little"
        result.append(
            (f"engine: {kind}", f"{share:.0%}", note or "share of the bandwidth, one token at a time")
        )
    for backend in diagnosis.backends:
        result.append((f"decode: {backend.name}", "yes" if backend.usable else "no", backend.reason))
    return result


def _note(package: str, found: str | None) -> str:
    """What to do about a package, such as its installation; empty if nothing."""
    if found is None:
        return f"pip install {package}"
    return (package == "transformers" and too_old(found)) or ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
