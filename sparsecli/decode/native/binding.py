"""The only door to the native library: loading it, its structures, and its errors as exceptions."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from sparsecli.console import Failure

LIBRARY = Path(os.environ.get("SPARSECLI_NATIVE_LIBRARY") or Path(__file__).with_name("_native.so"))
"""Another build may stand in for the installed one: `make sanitize` names its own."""
ERROR_BYTES = 256
INTERFACE_VERSION = 15  # of native/engine.h
INSTRUCTION_SETS = (
    "avx512_bf16", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "neon_i8mm_bf16", "neon_dotprod", "neon", "portable",
)  # fmt: skip
KERNELS = ("auto", "native", "reference")

SHAPE_FIELDS = (
    "d_model", "layers", "heads", "head_width", "key_value_heads", "max_positions", "vocabulary", "feed_forward",
    "d_ff", "activation", "gated", "block_size", "rank", "positive", "probability_gate",
    "normalized_probabilities", "projection", "output", "modules", "kernel", "value_concat", "query_key_norm",
    "query_rank", "key_rank", "rms", "post_norms", "positions", "rotary_width", "rotary_switch", "parallel",
    "streams", "concatenate", "attention_layers", "shared_query_key", "hash_rounds",
    "most_keys", "encoder", "query_modules", "recurrent_layers", "recurrent_width", "head_modules",
    "head_candidates", "cache_type", "conv_type", "units_on_disk", "poison",
)  # fmt: skip


class Shape(Structure):
    """`sparsecli_shape` of native/engine.h."""

    _fields_ = [
        *((name, c_int64) for name in SHAPE_FIELDS),
        ("epsilon", c_double),
        ("embedding_scale", c_double),
        ("rotary_attention_factor", c_double),
        ("attention_scale", c_double),
        ("attention_softcap", c_double),
        ("residual_scale", c_double),
        ("logit_scale", c_double),
        ("logit_softcap", c_double),
        ("unit_quantile", c_double),
        ("units_per_block", c_void_p),  # of every layer
        ("windows", c_void_p),
        ("rotary_tables", c_void_p),
    ]


class BoundTensor(Structure):
    """`sparsecli_tensor` of native/engine.h."""

    _fields_ = [
        ("name", c_char_p),
        ("data", c_void_p),
        ("scale", c_void_p),
        *((name, c_int64) for name in ("layer", "type", "rows", "cols", "by_rows")),
    ]


class Units(Structure):
    """`sparsecli_units` of native/training.h."""

    _fields_ = [
        *((name, c_int64) for name in ("tokens", "d_model", "d_ff", "block_size", "units_per_block")),
        *((name, c_int64) for name in ("activation", "type", "threads")),
        *((name, c_void_p) for name in ("first", "up", "down", "unit_bias", "bias", "x", "chosen", "scale")),
    ]


class UnitGradients(Structure):
    """`sparsecli_unit_gradients` of native/training.h."""

    _fields_ = [
        (name, c_void_p) for name in ("x", "first", "up", "down", "unit_bias", "bias", "mask", "scale")
    ]


class ControllerWeights(Structure):
    """`sparsecli_controller` of native/training.h."""

    _fields_ = [
        *((name, c_int64) for name in ("tokens", "d_ff", "block_size", "units_per_block", "rank", "threads")),
        *((name, c_void_p) for name in ("hidden", "second", "bias")),
    ]


def available() -> str | None:
    """None where the native engine can be used, else why it cannot, in words for a user.

    Raises:
        Failure: SPARSECLI_KERNELS or SPARSECLI_ISA asks for something that does not exist here (exit code 2).
    """
    wanted = os.environ.get("SPARSECLI_KERNELS") or "auto"
    if wanted not in KERNELS:
        raise Failure(f"SPARSECLI_KERNELS={wanted}: expected one of {', '.join(KERNELS)}", exit_code=2)
    _wanted_isa()
    if wanted == "reference":
        return "SPARSECLI_KERNELS=reference"
    reason = None
    try:
        library()
    except OSError as error:
        reason = str(error)
        if not LIBRARY.exists():
            reason = f"{LIBRARY} does not exist"
            if "SPARSECLI_NATIVE_LIBRARY" not in os.environ:
                reason = (
                    "the native engine was not built; install a C++20 compiler, then "
                    "`pip install --force-reinstall --no-deps --no-cache-dir sparsecli`"
                )
    if reason and wanted == "native":
        raise Failure(f"SPARSECLI_KERNELS=native: {reason}", exit_code=2)
    if reason is None:
        isa()
    return reason


def isa() -> str:
    """The instruction set in use: the best one here, or the one that SPARSECLI_ISA names.

    Raises:
        Failure: SPARSECLI_ISA is unknown, or this processor does not have it (exit code 2).
    """
    return _select(_wanted_isa())


def _wanted_isa() -> str:
    wanted = os.environ.get("SPARSECLI_ISA") or "auto"
    if wanted not in ("auto", *INSTRUCTION_SETS):
        expected = ", ".join(("auto", *INSTRUCTION_SETS))
        raise Failure(f"SPARSECLI_ISA={wanted}: expected one of {expected}", exit_code=2)
    return wanted


@functools.lru_cache(maxsize=1)  # selecting again would be harmless, and is only needed when the wish changes
def _select(wanted: str) -> str:
    error = ctypes.create_string_buffer(ERROR_BYTES)
    name = library().sparsecli_instruction_set(wanted.encode(), error)
    if name is None:
        raise Failure(f"SPARSECLI_ISA={error.value.decode()}", exit_code=2)
    return name.decode()


def instruction_sets() -> list[str]:
    """Instruction sets that this processor and this build have, best first."""
    error = ctypes.create_string_buffer(ERROR_BYTES)
    found = [name for name in INSTRUCTION_SETS if library().sparsecli_instruction_set(name.encode(), error)]
    _select.cache_clear()
    isa()
    return found


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises OSError where it is not there, or is of another version than this module."""
    loaded = ctypes.CDLL(str(LIBRARY))
    found = loaded.sparsecli_interface() if hasattr(loaded, "sparsecli_interface") else None
    if found != 1000 * INTERFACE_VERSION + ctypes.sizeof(Shape):
        raise OSError(f"{LIBRARY.name} was built from other sources; install the package again")
    engine = sequence = c_void_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "instruction_set": (c_char_p, [c_char_p, c_char_p]),
        "create": (engine, [POINTER(Shape), c_int64, c_int64, c_char_p]),
        "destroy": (None, [engine]),
        "bind": (c_int64, [engine, POINTER(BoundTensor), c_int64, c_char_p]),
        "bind_rotations": (
            c_int64,
            [engine, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_char_p],
        ),
        "sequence_create": (sequence, [engine, c_int64, c_int64, c_char_p]),
        "sequence_destroy": (None, [sequence]),
        "sequence_length": (c_int64, [sequence]),
        "sequence_truncate": (c_int64, [engine, sequence, c_int64, c_char_p]),
        "sequence_copy": (c_int64, [engine, sequence, c_int64, sequence, c_char_p]),
        "sequence_bytes": (c_int64, [engine, c_int64, c_int64]),
        "read_encoder": (c_int64, [engine, sequence, c_void_p, c_void_p, c_int64, c_char_p]),
        "import_kv": (c_int64, [engine, sequence, c_int64, *[c_void_p] * 5, c_int64, c_char_p]),
        "import_done": (c_int64, [engine, sequence, c_int64, c_int64, c_char_p]),
        "forward": (c_int64, [engine, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_char_p]),
        "active_units": (None, [engine, c_void_p, c_void_p]),
        "block_stack_ns": (c_int64, [engine]),
        "profile": (None, [engine, c_void_p]),
        "profile_part": (c_char_p, [c_int64]),
        "units_forward": (c_int64, [POINTER(Units), *[c_void_p] * 3, c_char_p]),
        "units_backward": (
            c_int64,
            [POINTER(Units), *[c_void_p] * 3, POINTER(UnitGradients), c_char_p],
        ),
        "controller_choose": (
            c_int64,
            [POINTER(ControllerWeights), c_int64, c_float, c_uint64, c_void_p, c_void_p, c_char_p],
        ),
        "controller_backward": (c_int64, [POINTER(ControllerWeights), *[c_void_p] * 5, c_char_p]),
        "arrange_gguf": (c_int64, [c_int64, c_void_p, c_int64, c_int64, c_void_p, c_int64]),
        "fit_groups": (
            c_int64,
            [c_void_p] * 2
            + [c_int64] * 3
            + [c_float] * 2
            + [c_void_p, c_int64] * 2
            + [c_void_p] * 2
            + [c_int64],
        ),
        "round_columns": (
            c_int64,
            [c_void_p] * 7 + [c_int64] * 3 + [c_float] * 2 + [c_void_p] + [c_int64] * 2,
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, f"sparsecli_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded


def call(name: str, *arguments: object) -> None:
    """Call a function of native/training.h.

    Raises:
        Failure: what it reports, such as too little memory.
    """
    error = ctypes.create_string_buffer(ERROR_BYTES)
    if getattr(library(), f"sparsecli_{name}")(*arguments, error):
        raise Failure(error.value.decode())
