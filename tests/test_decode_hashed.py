"""Hashed attention token by token: the engine and its readable twin against PyTorch, and going on from its prompts."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from small_models import (
    DEFAULTS,
    INSTRUCTION_SETS,
    assert_close,
    assert_twins,
    some_tokens,
    start,
    weights_of,
)
from transformers.modeling_outputs import BaseModelOutput

from sparsecli.console import Failure
from sparsecli.decode.engine import Engine, Sequence
from sparsecli.decode.kv_state import KVState, kv_states
from sparsecli.decode.native import binding
from sparsecli.decode.packed.pack import PackedModel, pack
from sparsecli.decode.packed.precision import Precision
from sparsecli.decode.reference.state import import_kv
from sparsecli.decode.reference.step import Reference
from sparsecli.model.auto import build_network
from sparsecli.model.cache import DecodeCache
from sparsecli.spec.model import ModelSpec

needs_native = pytest.mark.skipif(
    binding.available() is not None, reason=f"native engine: {binding.available()}"
)
COUNT, SOURCE = (
    150,
    5,
)  # tokens, over several numbers of buckets; rows of a source that is no longer than a chunk
EXACT = Precision.of("float32")
ENCODER = {"layers": 1, "max_positions": 200, "feed_forward": {"kind": "dense", "d_ff": 32}}
DENSE = {"kind": "dense", "d_ff": 64}


def hashed(rounds: int, chunk_length: int, before: int = 1, buckets: Any = None, **attention: Any) -> dict:
    lsh = {"rounds": rounds, "chunk_length": chunk_length, "chunks_before": before, "buckets": buckets}
    return {"kind": "lsh", "lsh": lsh, "projection": "dense", **attention}


MODELS: dict[str, dict] = {
    "mean of queries and keys": {"attention": hashed(2, 8), "feed_forward": DENSE},
    "reformer": {
        "residual": "reversible",
        "merge": "concatenate",
        "feed_forward": DENSE,
        "attention": hashed(3, 6, 0, share_query_key=True, bias=False),
        "positions": "learned",
    },
    "given buckets": {"attention": hashed(1, 10, 2, [4, 6], output_projection="none"), "feed_forward": DENSE},
    "convolved": {
        "attention": hashed(
            2,
            7,
            projection="multiplicative_conv",
            value_concat="modules",
            output_projection="multiplicative_conv",
        ),
        "sru": {"width": 7},
    },
    "terraformer": {
        "residual": "reversible",
        "attention_layers": 2,
        "attention": hashed(
            2, 8, projection="multiplicative_conv", value_concat="whole", share_query_key=True
        ),
        "encoder": {**ENCODER, "read_by": {"kind": "prefix"}},
        "sru": {"layers": 2, "width": 18},
        "positions": "digits",
    },
    "cross-attention": {
        "attention": hashed(2, 8, buckets=8),
        "encoder": ENCODER,
        "positions": "learned",
    },
    "itself alone": {"attention": hashed(1, 1, 0), "feed_forward": DENSE},
}
PRECISIONS = {name: Precision.of(name) for name in ("bfloat16", "int8")}
PRECISIONS["int8 cache"] = Precision.of("bfloat16", cache="int8")

every_model = pytest.mark.parametrize("name", MODELS)


def spec_of(name: str) -> ModelSpec:
    return ModelSpec.model_validate({**DEFAULTS, **MODELS[name]})


@cache
def network(name: str) -> Any:
    torch.manual_seed(0)
    made = build_network(spec_of(name)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


@cache
def packed(name: str, precision: Precision = EXACT) -> PackedModel:
    return pack(spec_of(name), weights_of(network(name)), precision)


@cache
def encoded(name: str, length: int = SOURCE) -> torch.Tensor | None:
    """What the encoder makes of a source (1, length, streams * d)."""
    if spec_of(name).encoder is None:
        return None
    with torch.no_grad():
        return network(name).model.encode(torch.tensor([some_tokens(100, length)])).last_hidden_state


def streams(rows: torch.Tensor | None) -> np.ndarray | None:
    """The same as the engine takes it (streams, length, d)."""
    return None if rows is None else torch.stack(rows[0].split(DEFAULTS["d_model"], dim=-1)).numpy()


@torch.no_grad()
def read(name: str, memory: DecodeCache, tokens: list[int], rows: torch.Tensor | None) -> np.ndarray:
    """PyTorch's logits (n, V) after each of `tokens`, in one pass."""
    given = {"input_ids": torch.tensor([tokens])}
    if rows is not None:
        given = {"decoder_input_ids": given["input_ids"], "encoder_outputs": BaseModelOutput(rows)}
    return network(name)(**given, past_key_values=memory, use_cache=True).logits[0].numpy()


def tokens_of(name: str, count: int = COUNT) -> list[int]:
    return some_tokens(spec_of(name).vocabulary.size, count)


@cache
def expected(name: str) -> np.ndarray:
    """PyTorch's logits (COUNT, V), token by token."""
    memory = DecodeCache.for_model(spec_of(name), 8)
    return np.concatenate([read(name, memory, [token], encoded(name)) for token in tokens_of(name)])


@cache
def twin(name: str, precision: Precision = EXACT) -> np.ndarray:
    return Reference(packed(name, precision)).logits(tokens_of(name), streams(encoded(name)))


def begin(engine: Engine, name: str, capacity: int = COUNT) -> Sequence:
    source = streams(encoded(name))
    sequence = engine.sequence(capacity, 0 if source is None else source.shape[1])
    if source is not None:
        engine.read_source(sequence, source)
    return sequence


# -- token by token ------------------------------------------------------------------------------------------


@every_model
def test_the_twin_equals_pytorch(name: str) -> None:
    assert_close(twin(name), expected(name))


@needs_native
@every_model
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_the_engine_equals_pytorch(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECLI_ISA", isa)
    engine = start(packed(name), 2)
    sequence = begin(engine, name)
    assert_close(np.stack([engine.step(sequence, token) for token in tokens_of(name)]), expected(name))


@pytest.mark.parametrize("name", ["mean of queries and keys", "given buckets"])
def test_hashing_leaves_keys_out(name: str) -> None:
    """The comparisons above can fail: full attention is something else, from the first token on that has to choose."""
    spec, model = spec_of(name), packed(name)
    assert spec.attention.hashing
    most = spec.attention.hashing.most_keys
    wide = spec.attention.hashing.model_copy(update={"chunk_length": COUNT})
    full = spec.model_copy(update={"attention": spec.attention.model_copy(update={"lsh": wide})})
    found = Reference(replace(model, spec=full)).logits(tokens_of(name))
    worst = np.abs(found - expected(name)).max(axis=-1)
    assert worst[:most].max() < 1e-5 < 1e-3 < worst[most:].min()


@needs_native
@every_model
def test_prompts_and_truncated_texts_equal_single_steps(name: str) -> None:
    """Cut where nothing is hashed, within a number of buckets, and back over one that another text has changed."""
    engine, tokens = start(packed(name), 2), tokens_of(name)
    sequence = begin(engine, name)
    assert_close(engine.logits(sequence, tokens), expected(name))
    for length in (140, 40, 3, 0):
        sequence.truncate(length)
        engine.prefill(sequence, tokens[::-1][: COUNT - length])
        sequence.truncate(length)
        for begun, end in ((length, length + 7), (length + 7, COUNT)):
            assert_close(engine.logits(sequence, tokens[begun:end]), expected(name)[begun:end])


@needs_native
@every_model
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_rounded_weights_equal_the_twin(name: str, precision: Precision) -> None:
    engine = start(packed(name, precision), 2)
    sequence = begin(engine, name)
    assert_twins(np.stack([engine.step(sequence, token) for token in tokens_of(name)]), twin(name, precision))


@needs_native
@every_model
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    """Bit by bit."""
    runs = []
    for threads in (1, 2, 3):
        engine = start(packed(name, PRECISIONS["bfloat16"]), threads)
        sequence = begin(engine, name)
        stepped = np.stack([engine.step(sequence, token) for token in tokens_of(name)])
        runs.append((stepped, engine.logits(begin(engine, name), tokens_of(name))))
    for run in runs[1:]:
        for ours, theirs in zip(run, runs[0], strict=True):
            np.testing.assert_array_equal(ours, theirs)


@needs_native
@pytest.mark.parametrize("name", ["mean of queries and keys", "terraformer"])
def test_texts_of_different_lengths_side_by_side(name: str) -> None:
    """Some hash, into different numbers of buckets, and some do not."""
    engine, tokens = start(packed(name), 2), tokens_of(name)
    starts = (0, 20, 60, 125)
    sequences = [begin(engine, name) for _ in starts]
    for sequence, begun in zip(sequences, starts, strict=True):
        if begun:
            engine.prefill(sequence, tokens[:begun])
    for step in range(20):
        rows = engine.step_batch(sequences, [tokens[begun + step] for begun in starts])
        assert_close(rows, expected(name)[[begun + step for begun in starts]])


# -- going on from PyTorch -----------------------------------------------------------------------------------

PROMPTS = (1, 7, 8, 9, 31, 32, 33, 100)  # around a chunk, around what a token reads, and beyond


def handed_over(engine: Engine, name: str, read_by_pytorch: int) -> tuple[Sequence, DecodeCache]:
    """A sequence after so many tokens that PyTorch read in one pass, with its cache."""
    rows, spec = encoded(name, 90), spec_of(name)
    memory = DecodeCache.for_model(spec, 4)
    read(name, memory, tokens_of(name)[:read_by_pytorch], rows)
    source = 0 if rows is None else rows.shape[1]
    sequence = engine.sequence(COUNT, source)
    engine.import_kv(sequence, kv_states(spec, memory.layers, memory.length), source)
    assert sequence.length == read_by_pytorch
    return sequence, memory


@needs_native
@pytest.mark.parametrize("name", [name for name in MODELS if name != "cross-attention"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_what_follows_a_prompt_or_a_long_source_equals_pytorch(name: str, prompt: int) -> None:
    engine = start(packed(name), 2)
    sequence, memory = handed_over(engine, name, prompt)
    following = tokens_of(name)[prompt : prompt + 40]
    wanted = np.concatenate([read(name, memory, [token], encoded(name, 90)) for token in following])
    assert_close(np.stack([engine.step(sequence, token) for token in following]), wanted)
    sequence.truncate(prompt)
    assert_close(engine.logits(sequence, following), wanted)


@needs_native
@pytest.mark.parametrize("name", ["mean of queries and keys", "reformer", "convolved"])
def test_greedy_text_equals_that_of_transformers(name: str) -> None:
    engine, prompt = start(packed(name), 2), tokens_of(name)[:60]
    ids = torch.tensor([prompt])
    made = network(name).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, min_new_tokens=80, do_sample=False
    )
    wanted = made[0, 60:].tolist()
    sequence, _ = handed_over(engine, name, 60)
    following = engine.logits(sequence, wanted[:-1]).argmax(-1).tolist()
    assert following == wanted[1:]


@needs_native
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("name", ["convolved", "terraformer"])
def test_what_is_handed_over_is_rounded_as_what_the_engine_remembers(name: str, precision: Precision) -> None:
    model, following = packed(name, precision), tokens_of(name)[60:]
    engine = start(model, 2)
    sequence, memory = handed_over(engine, name, 60)
    reference, held = Reference(model), memory.length
    import_kv(reference, kv_states(spec_of(name), memory.layers, held), held - 60)
    wanted = np.stack([reference.step(token) for token in following])
    assert_twins(np.stack([engine.step(sequence, token) for token in following]), wanted)


# -- what can go wrong ---------------------------------------------------------------------------------------


@needs_native
def test_memories_that_do_not_fit() -> None:
    name = "convolved"
    engine, spec = start(packed(name)), spec_of(name)
    memory = DecodeCache.for_model(spec, 4)
    read(name, memory, tokens_of(name)[:12], None)
    layers = kv_states(spec, memory.layers, 12)
    with pytest.raises(Failure, match="12 positions to import, the sequence holds 11"):
        engine.import_kv(engine.sequence(11), layers)
    sequence = engine.sequence(12)
    with pytest.raises(ValueError, match="1 attention layers, expected 2"):
        engine.import_kv(sequence, layers[:1])
    with pytest.raises(ValueError, match=r"values of layer 1: not of shape \(12, 4, 12\)"):
        engine.import_kv(sequence, [layers[0], replace(layers[1], values=layers[1].values[:3])])
    with pytest.raises(ValueError, match="states of layer 0: not of shape"):
        engine.import_kv(sequence, [replace(layers[0], states=None), layers[1]])
    with pytest.raises(ValueError, match="keys of layer 0: holds a NaN"):
        engine.import_kv(sequence, [replace(layers[0], keys=layers[0].keys * np.nan), layers[1]])
    with pytest.raises(Failure, match="12 positions with a prefix of 3 are out of range"):
        engine.import_kv(sequence, layers, source=3)
    assert sequence.length == 0
    with pytest.raises(ValueError, match="another engine"):
        engine.import_kv(start(packed(name)).sequence(12), layers)


@needs_native
def test_cross_attention_reads_its_text_itself() -> None:
    name = "cross-attention"
    memory = DecodeCache.for_model(spec_of(name), 4)
    read(name, memory, [1, 2], encoded(name))
    engine = start(packed(name))
    with pytest.raises(Failure, match="cross-attention cannot import"):
        engine.import_kv(engine.sequence(9, 5), kv_states(spec_of(name), memory.layers, 2))


@needs_native
def test_axes_are_checked_at_the_door() -> None:
    engine, library, error = (
        start(packed("given buckets")),
        binding.library(),
        ctypes.create_string_buffer(256),
    )
    assert not library.sparsecli_sequence_create(engine.handle, 31, 0, error)  # 30 keys are all read
    assert error.value == b"LSH rotations for so long a text are missing"
    engine.sequence(31)
    columns = np.zeros((4, 12, 16), np.float32)

    def bind(place: int, level: int, factors: list[int], size: int) -> str:
        given = (ctypes.c_int64 * len(factors))(*factors)
        done = library.sparsecli_bind_rotations(
            engine.handle, place, level, given, len(factors), columns.ctypes.data, size, error
        )
        return "" if done == 0 else error.value.decode()

    assert bind(0, 5, [4, 6], columns.size) == ""
    for place, level in ((-1, 5), (2, 5), (0, -1), (0, 32)):
        assert bind(place, level, [4, 6], columns.size) == "LSH rotations: no such attention layer or length"
    for factors in ([3, 6], [0], [1 << 16, 1 << 16], [-2]):
        assert bind(0, 5, factors, columns.size) == "LSH rotations: the number of buckets is out of range"
    assert bind(0, 5, [], columns.size) == "LSH rotations: the number of rotations is out of range"
    assert bind(0, 5, [4, 6], 9) == "LSH rotations: 9 numbers, expected 768"


def test_a_layer_that_remembers_nothing_else_has_no_other_rows() -> None:
    memory = DecodeCache.for_model(spec_of("reformer"), 4)
    read("reformer", memory, [1, 2, 3], None)
    for layer in kv_states(spec_of("reformer"), memory.layers, 3):
        assert isinstance(layer, KVState)
        assert (layer.inputs, layer.output_inputs, layer.states) == (None, None, None)
        assert layer.keys.shape == (3, 4, 12)
