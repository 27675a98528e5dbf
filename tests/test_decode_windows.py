"""Sliding windows in the engine: keys and values in rings, which hold a window and the tokens of one pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import assert_close, expected, network, packed, some_tokens, spec_of, start, stepped

from sparsecli.console import Failure
from sparsecli.decode.engine import Engine
from sparsecli.decode.kv_state import kv_states
from sparsecli.decode.native import binding
from sparsecli.decode.packed.precision import Precision
from sparsecli.decode.reference.state import import_kv
from sparsecli.decode.reference.step import Reference
from sparsecli.model.cache import DecodeCache

needs_native = pytest.mark.skipif(
    binding.available() is not None, reason=f"native engine: {binding.available()}"
)
COUNT = 1300  # positions: more than two turns of a ring
CHUNK = 512  # tokens of one pass, native/model.h
WINDOWED = ("gemma 2", "gemma 3", "a window of one", "a window in every layer")
windowed = pytest.mark.parametrize("name", WINDOWED)


def tokens_of(name: str, count: int) -> list[int]:
    return some_tokens(spec_of(name).vocabulary.size, count)


@needs_native
@windowed
@pytest.mark.parametrize("precision", [Precision.of("float32"), Precision.of("bfloat16", cache="int8")])
def test_steps_equal_one_prompt(name: str, precision: Precision) -> None:
    """Bit by bit the same ring, in whatever order it is filled."""
    engine = start(packed(name, precision), 2)
    tokens = tokens_of(name, COUNT)
    sequence = engine.sequence(COUNT)
    whole = engine.logits(sequence, tokens)
    assert_close(stepped(engine, tokens), whole)
    if precision == Precision.of("float32"):
        assert_close(whole, expected(name, COUNT))


@needs_native
def test_texts_of_different_lengths_in_a_batch() -> None:
    name = "gemma 3"
    engine = start(packed(name), 2)
    tokens, held = tokens_of(name, COUNT), (5, 600, 1200)
    sequences = [engine.sequence(COUNT) for _ in held]
    for sequence, length in zip(sequences, held, strict=True):
        engine.prefill(sequence, tokens[:length])
    for step in range(20):
        rows = engine.step_batch(sequences, [tokens[length + step] for length in held])
        assert_close(rows, expected(name, COUNT)[[length + step for length in held]])


@needs_native
@windowed
def test_copies_hold_the_same_rings(name: str) -> None:
    """Full rings and others; as with truncation, what rings do not hold any more is refused."""
    engine = start(packed(name), 2)
    tokens, wanted = tokens_of(name, COUNT), expected(name, COUNT)
    first, second = engine.sequence(COUNT), engine.sequence(COUNT)
    engine.prefill(first, tokens[:1200])
    for length in (1200, 1200 - CHUNK):
        second.copy_from(first, length)
        assert_close(engine.logits(second, tokens[length : length + 50]), wanted[length : length + 50])
    with pytest.raises(Failure, match="sliding window do not hold the first 300 tokens any more"):
        second.copy_from(first, 300)
    assert second.length == 1200 - CHUNK + 50
    first.truncate(0)
    engine.prefill(first, tokens[:40])
    second.copy_from(first, 30)
    assert_close(engine.logits(second, tokens[30:60]), wanted[30:60])


@needs_native
def test_rings_take_less_memory() -> None:
    full = start(packed("dense, gated, grouped queries")).sequence
    ring = start(packed("gemma 3")).sequence
    assert full(100_000).nbytes > 40 * full(2000).nbytes
    grown = ring(100_000).nbytes - ring(10_000).nbytes  # of the only layer of three without a window
    assert grown == 90_000 * 2 * 4 * (20 + 32) // 2


@needs_native
@windowed
def test_going_back(name: str) -> None:
    """As far as rings hold what is seen then; further back is refused, and changes nothing."""
    engine = start(packed(name), 2)
    tokens, wanted = tokens_of(name, COUNT), expected(name, COUNT)
    sequence = engine.sequence(COUNT)
    engine.prefill(sequence, tokens[:1200])
    other = tokens[::-1]
    for back in (1, 300, CHUNK):
        sequence.truncate(1200 - back)
        assert_close(engine.logits(sequence, tokens[1200 - back : 1200]), wanted[1200 - back : 1200])
        sequence.truncate(1200 - back)
        engine.prefill(sequence, other[:back])
    with pytest.raises(Failure, match="sliding window do not hold the tokens before 300 any more"):
        sequence.truncate(300)
    assert sequence.length == 1200
    sequence.truncate(1200 - CHUNK)
    assert_close(engine.logits(sequence, tokens[1200 - CHUNK : 1200]), wanted[1200 - CHUNK : 1200])
    sequence.truncate(0)
    assert_close(engine.logits(sequence, tokens[:50]), wanted[:50])
    sequence.truncate(1)  # a ring that was never full holds everything
    assert_close(engine.logits(sequence, tokens[1:50]), wanted[1:50])


@windowed
@torch.no_grad()
def test_going_on_from_pytorch(name: str) -> None:
    tokens, held = tokens_of(name, 700), 690
    model, spec = network(name), spec_of(name)
    memory = DecodeCache.for_model(spec)
    model(torch.tensor([tokens[:held]]), cache=memory)
    layers, wanted = kv_states(spec, memory.layers, held), expected(name, 700)[held:]
    reference = Reference(packed(name))
    import_kv(reference, layers)
    assert_close(np.stack([reference.step(token) for token in tokens[held:]]), wanted)
    if binding.available() is None:
        engine = Engine(packed(name), 2)
        sequence = engine.sequence(700)
        engine.import_kv(sequence, layers)
        assert_close(engine.logits(sequence, tokens[held:]), wanted)
        with pytest.raises(Failure, match="sliding window"):
            sequence.truncate(30)


@torch.no_grad()
def test_padding_before_a_window() -> None:
    """PyTorch: a window counts positions of the batch, as in transformers; padding within it is not seen."""
    name = "gemma 2"
    model, tokens = network(name), torch.tensor([tokens_of(name, 30)])
    padded = torch.nn.functional.pad(tokens, (6, 0))
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (6, 0))
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits[:, 6:], model(tokens).logits, atol=1e-5, rtol=1e-5
    )
