"""Decoders that read a source, carry two streams, remember in recurrent units or share queries and keys: the engine
against its readable twin, and both against the original implementation."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from golden_decoders import FIRST_DECODER_WEIGHT, terraformer
from small_models import DEFAULTS, assert_close, assert_twins, random_weights, some_tokens, start, weights_of
from test_golden import load
from test_golden_terraformer import encoder_decoder, tokens

from sparsecli.console import Failure
from sparsecli.decode.engine import Engine, Sequence, source_streams
from sparsecli.decode.native import binding
from sparsecli.decode.packed.pack import PackedModel, pack
from sparsecli.decode.packed.precision import Precision
from sparsecli.decode.reference.step import Reference
from sparsecli.model.auto import build_network
from sparsecli.spec.model import ModelSpec

needs_native = pytest.mark.skipif(
    binding.available() is not None, reason=f"native engine: {binding.available()}"
)
COUNT, SOURCE = 20, 19  # tokens and rows of a source: more than a block of keys
EXACT = Precision.of("float32")

ENCODER = {"layers": 1, "max_positions": 600, "feed_forward": {"kind": "dense", "d_ff": 32}}
CROSS = {"encoder": ENCODER, "positions": "learned"}
PREFIX = {
    "residual": "reversible",
    "encoder": {**ENCODER, "read_by": {"kind": "prefix"}},
    "sru": {"layers": 2, "width": 18},
    "positions": "digits",
}
REFORMER = {
    "residual": "reversible",
    "attention": {"projection": "dense", "share_query_key": True, "bias": False},
    "feed_forward": {"kind": "dense", "d_ff": 100},
}
MODELS: dict[str, dict] = {
    "cross": CROSS,
    "cross, dense": {
        **CROSS,
        "feed_forward": {"kind": "dense", "d_ff": 100},
        "attention": {"projection": "dense", "key_value_heads": 2},
        "positions": "sinusoidal",
    },
    "cross, convolved queries": {
        **CROSS,
        "d_model": 60,
        "heads": 6,
        "attention": {"projection": "multiplicative_conv", "modules": 3, "kernel": 2},
        "encoder": {**ENCODER, "read_by": {"kind": "cross_attention", "query_modules": 5}},
        "sru": {"width": 7},
        "parallel": True,
    },
    "cross, side by side": {**CROSS, "parallel": True, "attention": {"projection": "dense"}},
    "terraformer": {
        **PREFIX,
        "attention_layers": 2,
        "vocabulary": {"kind": "multiplicative", "size": 102, "modules": 3},
    },
    "prefix, one stream, one attention": {
        **PREFIX,
        "encoder": {**ENCODER, "read_by": {"kind": "prefix", "streams": 1}},
        "feed_forward": {"kind": "dense", "d_ff": 100},
        "attention": {"projection": "dense_conv", "output_projection": "multiplicative_conv"},
        "normalization": "rms",
        "positions": "rotary",
    },
    "prefix, mixture": {
        **PREFIX,
        "feed_forward": {"kind": "mixture", "d_ff": 99, "experts": 3},
        "attention": {"projection": "multiplicative"},
        "merge": "concatenate",
    },
    "reformer": {
        **REFORMER,
        "merge": "concatenate",
        "positions": "axial",
        "axial": {"shape": [7, 100], "widths": [18, 30]},
        "max_positions": 700,
    },
    "mean of queries and keys": {
        **REFORMER,
        "attention": {"kind": "lsh", "projection": "dense", "lsh": {"chunk_length": 300}},
        "positions": "rotary",
    },
    "shared and convolved": {"attention": {"projection": "multiplicative_conv", "share_query_key": True}},
}
PRECISIONS = {name: Precision.of(name) for name in ("bfloat16", "int8")}
PRECISIONS["int8 cache"] = Precision.of("bfloat16", cache="int8")

every_model = pytest.mark.parametrize("name", MODELS)


def spec_of(name: str) -> ModelSpec:
    return ModelSpec.model_validate({**DEFAULTS, **MODELS[name]})


@cache
def packed(name: str, precision: Precision = EXACT) -> PackedModel:
    spec = spec_of(name)
    return pack(spec, random_weights(spec), precision)


def source_of(spec: ModelSpec, length: int = SOURCE, seed: int = 0) -> np.ndarray | None:
    """What an encoder might make of a source (streams, length, d)."""
    if spec.encoder is None:
        return None
    shape = (source_streams(spec), length, spec.d_model)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def begin(engine: Engine, source: np.ndarray | None, capacity: int = COUNT) -> Sequence:
    sequence = engine.sequence(capacity, 0 if source is None else source.shape[1])
    if source is not None:
        engine.read_source(sequence, source)
    return sequence


@cache
def twin(name: str, precision: Precision, length: int = SOURCE, seed: int = 0) -> np.ndarray:
    return Reference(packed(name, precision)).logits(tokens_of(name), source_of(spec_of(name), length, seed))


def tokens_of(name: str, count: int = COUNT) -> list[int]:
    return some_tokens(spec_of(name).vocabulary.size, count)


# -- values --------------------------------------------------------------------------------------------------


def golden_text(name: str, row: int) -> tuple[np.ndarray, list[int], np.ndarray]:
    """The streams of prefix and target without padding, the decoder's input, and its logits."""
    g = {key: value.numpy() for key, value in load(name).items()}
    length = int((g["tok_e"][row] != 0).sum())
    streams = [g[key][row, :length] for key in ("stage6_0", "stage6_1") if key in g]
    return np.stack(streams), [0, *g["tok_d"][row, :-1].tolist()], g["logits"][row]


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("name", FIRST_DECODER_WEIGHT)
def test_the_twin_equals_the_original_terraformer(name: str, row: int) -> None:
    streams, tokens, logits = golden_text(name, row)
    assert_close(Reference(pack(*terraformer(name), EXACT)).logits(tokens, streams), logits)


@needs_native
@pytest.mark.parametrize("name", FIRST_DECODER_WEIGHT)
def test_the_engine_equals_the_original_terraformer(name: str) -> None:
    engine = start(pack(*terraformer(name), EXACT), 2)
    for row in (0, 1):
        streams, tokens, logits = golden_text(name, row)
        assert_close(engine.logits(begin(engine, streams), tokens), logits)


@needs_native
@every_model
def test_every_way_of_calling_equals_the_twin(name: str) -> None:
    engine, tokens, wanted = start(packed(name), 2), tokens_of(name), twin(name, EXACT)
    sequence = begin(engine, source_of(spec_of(name)))
    assert_close(np.stack([engine.step(sequence, token) for token in tokens]), wanted)
    sequence.truncate(7)
    assert_close(engine.logits(sequence, tokens[7:]), wanted[7:])
    assert sequence.length == COUNT
    assert_close(engine.logits(begin(engine, source_of(spec_of(name))), tokens), wanted)


@needs_native
@every_model
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_rounded_weights_equal_the_twin(name: str, precision: Precision) -> None:
    engine = start(packed(name, precision), 2)
    sequence = begin(engine, source_of(spec_of(name)))
    rows = np.stack([engine.step(sequence, token) for token in tokens_of(name)])
    assert_twins(rows, twin(name, precision))


@needs_native
@every_model
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    """Bit by bit."""
    runs = []
    for threads in (1, 2, 3):
        engine = start(packed(name, PRECISIONS["int8"]), threads)
        sequence = begin(engine, source_of(spec_of(name)))
        stepped = np.stack([engine.step(sequence, token) for token in tokens_of(name)])
        sequence.truncate(0)
        runs.append((stepped, engine.logits(sequence, tokens_of(name))))
    for run in runs[1:]:
        for ours, theirs in zip(run, runs[0], strict=True):
            np.testing.assert_array_equal(ours, theirs)


@needs_native
@pytest.mark.parametrize("name", ["cross", "terraformer", "prefix, mixture"])
def test_sources_of_different_lengths_side_by_side(name: str) -> None:
    engine, lengths = start(packed(name), 2), (1, SOURCE, 4)
    sources = [source_of(spec_of(name), length, seed) for seed, length in enumerate(lengths)]
    sequences = [begin(engine, source) for source in sources]
    rows = [engine.step_batch(sequences, [token] * len(lengths)) for token in tokens_of(name)]
    wanted = [twin(name, EXACT, length, seed) for seed, length in enumerate(lengths)]
    assert_close(np.stack(rows, axis=1), np.stack(wanted))


@needs_native
@pytest.mark.parametrize("name", ["cross", "terraformer"])
def test_a_source_of_several_passes(name: str) -> None:
    engine, source = start(packed(name), 2), source_of(spec_of(name), 530)
    wanted = Reference(packed(name)).logits(tokens_of(name, 3), source)
    assert_close(engine.logits(begin(engine, source), tokens_of(name, 3)), wanted)


@needs_native
def test_a_sequence_begins_anew_with_another_source() -> None:
    engine = start(packed("terraformer"), 2)
    sequence = engine.sequence(COUNT, SOURCE)
    for seed, length in ((1, 5), (0, SOURCE)):
        engine.read_source(sequence, source_of(spec_of("terraformer"), length, seed))
        assert sequence.length == 0
        wanted = twin("terraformer", EXACT, length, seed)
        assert_close(engine.logits(sequence, tokens_of("terraformer")), wanted)


@needs_native
@pytest.mark.parametrize(("name", "rows"), [("cross", 0), ("terraformer", SOURCE)])
def test_rows_of_a_prefix_are_counted_like_tokens(name: str, rows: int) -> None:
    engine = start(packed(name), 2)
    engine.prefill(begin(engine, source_of(spec_of(name))), tokens_of(name))
    assert engine.counts() == [(16 * (rows + COUNT), rows + COUNT)] * 2  # 8 blocks, of each 2 units


# -- against the models that transformers runs ---------------------------------------------------------------


def encoded(network: torch.nn.Module, source: list[int]) -> np.ndarray:
    """What the encoder makes of a source (streams, length, d)."""
    with torch.no_grad():
        rows = network.model.encode(torch.tensor([source])).last_hidden_state[0]  # (length, streams * d)
    return np.stack([part.numpy() for part in rows.split(network.config.d_model, dim=-1)])


@needs_native
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_engine_equals_the_original_encoder_decoder(kind: str) -> None:
    g = load(f"transformer_encdec_{kind}")
    network, given = encoder_decoder(kind, g), tokens(g)
    engine = start(pack(network.config.spec, weights_of(network), EXACT), 2)
    for row, source in enumerate(g["tok_e"].long().tolist()):
        sequence = begin(engine, encoded(network, [token for token in source if token]))
        logits = engine.logits(sequence, given["decoder_input_ids"][row].tolist())
        assert_close(logits, g["logits"][row].numpy())


@needs_native
@pytest.mark.parametrize("name", [name for name in MODELS if "encoder" in MODELS[name]])
def test_the_engine_equals_transformers(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(spec_of(name)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    source, target = some_tokens(101, SOURCE), tokens_of(name)
    with torch.no_grad():
        wanted = network(torch.tensor([source]), decoder_input_ids=torch.tensor([target])).logits[0].numpy()
    engine = start(pack(spec_of(name), weights_of(network), EXACT), 2)
    sequence = begin(engine, encoded(network, source))
    assert_close(np.stack([engine.step(sequence, token) for token in target]), wanted)


# -- what can go wrong ---------------------------------------------------------------------------------------


@needs_native
def test_sources_that_do_not_fit() -> None:
    engine = start(packed("terraformer"))
    sequence, source = engine.sequence(4, 3), source_of(spec_of("terraformer"), 4)
    assert source is not None
    with pytest.raises(Failure, match="no encoder output yet"):
        engine.step(sequence, 1)
    with pytest.raises(Failure, match="the encoder's output has 4 rows, the sequence has room for 3"):
        engine.read_source(sequence, source)
    with pytest.raises(Failure, match="the encoder's output is empty"):
        engine.read_source(sequence, source[:, :0])
    with pytest.raises(ValueError, match="expected 2 x length x 48"):
        engine.read_source(sequence, source[0])
    with pytest.raises(ValueError, match="NaN"):
        engine.read_source(sequence, source * np.nan)
    with pytest.raises(ValueError, match="source: 0 is not between 1"):
        engine.sequence(4)
    engine.read_source(sequence, source[:, :3])
    engine.prefill(sequence, [1, 2, 3, 4])
    with pytest.raises(Failure, match="full"):
        engine.step(sequence, 5)


@needs_native
def test_a_model_without_an_encoder_takes_no_source() -> None:
    engine = start(packed("reformer"))
    with pytest.raises(ValueError, match="source: 3 is not between 0 and 0"):
        engine.sequence(4, 3)
    with pytest.raises(Failure, match="no encoder"):
        engine.read_source(engine.sequence(4), np.zeros((3, 48), np.float32))
