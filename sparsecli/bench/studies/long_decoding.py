"""Decoding of whole models after a long text, with full and with hashed attention: time and memory of a token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from sparsecli import console
from sparsecli.bench import bytes_read, variants
from sparsecli.bench.decoders import others
from sparsecli.bench.random_weights import Pools, largest, packed_elements, packed_model
from sparsecli.bench.result import Spread
from sparsecli.bench.timing import Timing, measure, spread
from sparsecli.decode.engine import Engine
from sparsecli.decode.kv_state import KVState
from sparsecli.decode.packed.precision import Precision
from sparsecli.decode.packed.tensors import convolves, crosses, joins
from sparsecli.spec.model import ModelSpec

TOKENS, WARM_UP = 8, 4
"""Tokens of a turn. The first token after a text hashes all keys and is not counted."""


@dataclass(frozen=True)
class Decoding:
    """The figures of one token after `length` others, or after a prefix of this length."""

    length: int
    attention: str
    ms_per_token: Spread
    cache_bytes: int
    """Bytes of the sequence's cache: keys, values, buckets, state of convolutions and recurrent units."""
    bytes_per_token: int
    bytes_of_cache: int
    """Bytes of keys, values and buckets that a token reads, with the rotations."""


class LongDecoder:
    """A sequence whose cache is filled with random numbers instead of a text: see `TimedDecoder`."""

    def __init__(self, engine: Engine, layers: Sequence[KVState]) -> None:
        spec, held = engine.model.spec, layers[0].positions
        source = held if joins(spec) else 0
        self.engine, self.begun = engine, held - source
        self.text = engine.sequence(self.begun + TOKENS + WARM_UP, source)
        engine.import_kv(self.text, layers, source)

    def prefill(self, tokens: Sequence[int]) -> None:
        """See `TimedDecoder.prefill`. The cache is already filled."""

    def rewind(self) -> None:
        """See `TimedDecoder.rewind`."""
        self.text.truncate(self.begun)

    def step(self, token: int) -> tuple[int, int]:
        """See `TimedDecoder.step`. Random weights would repeat one token, with one hash, so another token follows."""
        best = int(self.engine.step(self.text, token).argmax())
        return others(best, self.text.length, self.engine.vocabulary), self.engine.block_stack_ns


def random_memories(spec: ModelSpec, length: int) -> list[KVState]:
    """The same numbers for every layer, with keys of unit length."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    heads = spec.attention.key_value_heads or spec.heads
    keys = normal(length, heads, spec.width_of_head)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    inputs = 1 if spec.attention.value_concat == "none" else 2
    memory = KVState(
        keys,
        normal(length, heads, spec.width_of_head),
        normal(length, inputs * spec.d_model) if convolves(spec) else None,
        normal(length, spec.d_model) if spec.attention.output == "multiplicative_conv" else None,
    )
    states = normal(spec.sru.layers, length, spec.sru.width) if spec.sru else None
    first = KVState(memory.keys, memory.values, memory.inputs, memory.output_inputs, states)
    return [first, *[memory] * (spec.attention_layers - 1)] * spec.layers


def compare(
    spec: ModelSpec, lengths: Sequence[int], dtype: str, threads: int | None, layers: int | None, rounds: int
) -> Iterator[Decoding]:
    """Measure both kinds of attention in turn at every length, on random weights, with at most `layers` layers.

    Raises:
        Failure: attention that is not hashed, cross-attention, or too little memory.
    """
    if spec.attention.hashing is None or crosses(spec):
        raise console.Failure("needs attention.kind: lsh, in a decoder alone or one with a prefix")
    precision = Precision.of(dtype)
    spec = variants.with_positions(variants.part(spec, layers), max(lengths) + TOKENS + WARM_UP)
    both = {"full": spec.unhashed, "hashed": spec}
    pools = Pools.of(largest([packed_elements(each, precision) for each in both.values()]))
    engines = {name: Engine(packed_model(each, precision, pools), threads) for name, each in both.items()}
    with closing(engines["full"]), closing(engines["hashed"]):
        for length in lengths:
            memories = random_memories(spec, length)
            decoders = {name: LongDecoder(engine, memories) for name, engine in engines.items()}
            timings = {
                name: Timing(
                    each, spec.vocabulary.size, spec.layers, spec.layers, steps=TOKENS, warmup=WARM_UP
                )
                for name, each in decoders.items()
            }
            with console.progress(f"after {length:,} tokens", len(timings) * (1 + rounds)) as progress:
                measure(list(timings.values()), rounds, 0, progress)
            for name, timing in timings.items():
                source, context = (length, 0) if joins(spec) else (0, length)
                read = bytes_read.bytes_per_token(both[name], precision, context, source=source)
                weights = bytes_read.bytes_per_token(both[name], precision, context=0)
                text = decoders[name].text
                yield Decoding(length, name, spread(timing.token_ms), text.nbytes, read, read - weights)
                text.close()


def print_table(found: Sequence[Decoding], title: str) -> None:
    """One row for each kind of attention and each length."""
    console.print_table(
        ("tokens", "attention", "ms a token", "p10", "p90", "cache, MB", "read, MB a token", "of it cache"),
        [
            (
                *(f"{row.length:,}", row.attention),
                *(
                    f"{value:,.2f}"
                    for value in (row.ms_per_token.p50, row.ms_per_token.p10, row.ms_per_token.p90)
                ),
                *(
                    f"{size / 1e6:,.1f}"
                    for size in (row.cache_bytes, row.bytes_per_token, row.bytes_of_cache)
                ),
            )
            for row in found
        ],
        title=title,
    )
