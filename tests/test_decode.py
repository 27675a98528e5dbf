"""The engine and its step: by value against transformers and against the reference, in every way of calling it."""

from __future__ import annotations

import ctypes
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import (
    INSTRUCTION_SETS,
    MODELS,
    assert_close,
    assert_twins,
    batched,
    expected,
    network,
    packed,
    random_weights,
    some_tokens,
    spec_of,
    start,
    stepped,
    twin,
    weights_of,
)
from test_golden import LANGUAGE_MODELS, golden_language_model, load

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.data.packing import pack as pack_corpus
from sparsecli.decode.engine import MAX_THREADS, Engine
from sparsecli.decode.native import binding
from sparsecli.decode.native.shape import shape_of
from sparsecli.decode.packed.folder import read_weights
from sparsecli.decode.packed.pack import PackedModel, pack
from sparsecli.decode.packed.precision import Precision
from sparsecli.decode.reference.step import Reference
from sparsecli.model.auto import build_network
from sparsecli.model.files import read_description
from sparsecli.recipe.loader import load as load_recipe
from sparsecli.spec.model import ModelSpec
from sparsecli.train import command

pytestmark = pytest.mark.skipif(
    binding.available() is not None, reason=f"native engine: {binding.available()}"
)

COUNT = 24  # tokens: more than one block of keys
EXACT = Precision.of("float32")
ROUNDED = {
    "bfloat16": Precision.of("bfloat16"),
    "int8": Precision.of("int8"),
    "int8 cache": Precision.of("bfloat16", cache="int8"),
    "int8 tables and cache, head rescored": Precision.of(
        "int8", cache="int8", embedding="int8", head_rescoring=True
    ),
}

every_model = pytest.mark.parametrize("name", MODELS)
some_models = pytest.mark.parametrize("name", list(MODELS)[::4])
every_rounding = pytest.mark.parametrize("precision", ROUNDED.values(), ids=ROUNDED)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Engines made in the test use it."""
    monkeypatch.setenv("SPARSECLI_ISA", request.param)
    assert binding.isa() == request.param
    return request.param


def tokens_of(name: str, count: int = COUNT) -> list[int]:
    return some_tokens(spec_of(name).vocabulary.size, count)


# -- values --------------------------------------------------------------------------------------------------


@every_model
def test_float32_equals_transformers(name: str, instruction_set: str) -> None:
    engine = start(packed(name))
    tokens, wanted = tokens_of(name), expected(name, COUNT)
    assert_close(stepped(engine, tokens), wanted)
    assert_close(engine.logits(engine.sequence(COUNT), tokens), wanted)


@every_model
def test_the_reference_equals_transformers(name: str) -> None:
    assert_close(twin(name, EXACT, COUNT), expected(name, COUNT))


@every_model
@every_rounding
def test_rounded_weights_equal_the_reference(name: str, precision: Precision, instruction_set: str) -> None:
    engine = start(packed(name, precision))
    tokens, wanted = tokens_of(name), twin(name, precision, COUNT)
    assert_twins(stepped(engine, tokens), wanted)
    assert_twins(engine.logits(engine.sequence(COUNT), tokens), wanted)


@every_rounding
def test_rounded_weights_are_not_exact_ones(precision: Precision) -> None:
    """The comparisons above can fail: rounding shows."""
    with pytest.raises(AssertionError, match="error by token"):
        assert_twins(
            twin("dense, gated, grouped queries", precision, COUNT),
            expected("dense, gated, grouped queries", COUNT),
        )


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_golden_files(name: str, instruction_set: str) -> None:
    g = load(name)
    model = golden_language_model(name, g)
    engine = start(pack(model.config.spec, weights_of(model), EXACT))
    texts = torch.nn.functional.pad(g["tokens"].long(), (1, 0))[:, :-1].tolist()
    assert_close(batched(engine, texts), g["logits"].numpy())


# -- ways of calling -----------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("precision", [EXACT, ROUNDED["int8"]], ids=["float32", "int8"])
def test_results_do_not_depend_on_the_number_of_threads(name: str, precision: Precision) -> None:
    """Bit by bit."""
    tokens = tokens_of(name)
    texts = [tokens[:8], tokens[8:16], tokens[16:]]
    runs = []
    for threads in (1, 2, 3):
        engine = start(packed(name, precision), threads)
        prompt = engine.logits(engine.sequence(COUNT), tokens)
        runs.append((stepped(engine, tokens), prompt, batched(engine, texts)))
    for run, other in pairwise(runs):
        for ours, theirs in zip(run, other, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_wide_multiplicative_layers_do_not_depend_on_the_number_of_threads() -> None:
    """Their inputs are summed chunk by chunk; a thread's share of the modules must not decide how large a chunk is."""
    attention = {"projection": "multiplicative_conv", "modules": 64}
    spec = ModelSpec.model_validate(
        {**spec_of("sparse").model_dump(), "d_model": 640, "heads": 4, "attention": attention}
    )
    model, tokens = pack(spec, random_weights(spec), EXACT), some_tokens(spec.vocabulary.size, 4)
    first, second = (start(model, threads) for threads in (1, 2))
    np.testing.assert_array_equal(stepped(first, tokens), stepped(second, tokens))


def test_tokens_of_a_table_s_column() -> None:
    """An array whose numbers do not lie one after the other."""
    engine = start(packed("sparse"))
    tokens = np.array(tokens_of("sparse"))[:16]
    apart = engine.logits(engine.sequence(16), tokens[::2])
    np.testing.assert_array_equal(apart, engine.logits(engine.sequence(16), tokens[::2].tolist()))


@every_model
def test_texts_side_by_side_equal_each_alone(name: str) -> None:
    """Bit by bit."""
    engine = start(packed(name), 2)
    texts = [tokens_of(name)[i : i + 12] for i in range(7)]
    np.testing.assert_array_equal(batched(engine, texts), np.stack([stepped(engine, text) for text in texts]))


@every_model
def test_a_prompt_in_pieces_equals_the_whole(name: str) -> None:
    """Pieces that end anywhere, and one that takes more than one pass."""
    ends = (1, 18, 19, 130, 690, 700)
    tokens = tokens_of(name, 700)
    engine = start(packed(name), 2)
    sequence = engine.sequence(700)
    pieces = [engine.prefill(sequence, tokens[a:b]) for a, b in pairwise((0, *ends))]
    assert sequence.length == 700
    assert_close(np.stack(pieces), expected(name, 700)[[end - 1 for end in ends]])


def test_texts_of_different_lengths_side_by_side() -> None:
    engine = start(packed("sparse"), 2)
    tokens = tokens_of("sparse")
    starts = (0, 3, 17)
    sequences = [engine.sequence(COUNT) for _ in starts]
    for sequence, begun in zip(sequences, starts, strict=True):
        if begun:
            engine.prefill(sequence, tokens[:begun])
    rows = engine.step_batch(sequences, [tokens[begun] for begun in starts])
    assert_close(rows, expected("sparse", COUNT)[list(starts)])
    assert [sequence.length for sequence in sequences] == [1, 4, 18]


@every_model
def test_truncated_sequences_go_on_as_if_nothing_had_been(name: str) -> None:
    engine = start(packed(name), 2)
    tokens = tokens_of(name)
    sequence = engine.sequence(COUNT)
    engine.prefill(sequence, tokens[:7] + tokens[::-1][:17])
    sequence.truncate(7)
    assert sequence.length == 7
    assert_close(engine.logits(sequence, tokens[7:]), expected(name, COUNT)[7:])
    sequence.truncate(0)
    assert_close(engine.prefill(sequence, tokens), expected(name, COUNT)[-1])


@some_models
def test_copied_tokens_go_on_as_if_they_had_been_read(name: str) -> None:
    engine = start(packed(name), 2)
    tokens = tokens_of(name)
    first, second = engine.sequence(COUNT), engine.sequence(COUNT)
    engine.prefill(first, tokens[:7] + tokens[::-1][:10])
    engine.prefill(second, tokens[::-1][:12])  # what it held before is gone
    second.copy_from(first, 7)
    assert (first.length, second.length) == (17, 7)
    assert_close(engine.logits(second, tokens[7:]), expected(name, COUNT)[7:])
    second.copy_from(first, 0)
    assert_close(engine.prefill(second, tokens), expected(name, COUNT)[-1])


def test_only_sequences_alike_are_copied() -> None:
    engine, other = start(packed("sparse"), 2), start(packed("sparse"), 2)
    sequence = engine.sequence(COUNT)
    engine.prefill(sequence, tokens_of("sparse")[:5])
    for wrong in (sequence, engine.sequence(COUNT + 1), other.sequence(COUNT)):
        with pytest.raises(ValueError, match="one engine and one capacity"):
            wrong.copy_from(sequence, 3)
    with pytest.raises(ValueError, match="6 is not between 0 and 5"):
        engine.sequence(COUNT).copy_from(sequence, 6)


@some_models
def test_a_pass_takes_pieces_of_prompts_beside_single_tokens(name: str) -> None:
    engine = start(packed(name), 2)
    tokens = tokens_of(name)
    begun, pieces = (0, 3, 9), (10, 1, 4)
    sequences = [engine.sequence(COUNT) for _ in begun]
    for sequence, length in zip(sequences, begun, strict=True):
        if length:
            engine.prefill(sequence, tokens[:length])
    ends = [length + piece for length, piece in zip(begun, pieces, strict=True)]
    rows = engine.advance(sequences, [tokens[a:b] for a, b in zip(begun, ends, strict=True)])
    assert_close(rows, expected(name, COUNT)[[end - 1 for end in ends]])
    assert [sequence.length for sequence in sequences] == ends
    with pytest.raises(ValueError, match="a piece of at least one token"):
        engine.advance(sequences[:2], [[1], []])


def test_engines_of_different_sizes_live_side_by_side() -> None:
    first, second = start(packed("sparse"), 2), start(packed("mixture of two"), 3)
    one, other = first.sequence(COUNT), second.sequence(COUNT)
    pairs = zip(tokens_of("sparse"), tokens_of("mixture of two"), strict=True)
    rows = [(first.step(one, a), second.step(other, b)) for a, b in pairs]
    assert_close(np.stack([row for row, _ in rows]), expected("sparse", COUNT))
    assert_close(np.stack([row for _, row in rows]), expected("mixture of two", COUNT))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no threads")
def test_pinned_threads_compute_the_same() -> None:
    before = os.sched_getaffinity(0)
    try:
        rows = stepped(Engine(packed("sparse"), 2, pin=True), tokens_of("sparse"))
    finally:  # the calling thread was pinned, too
        os.sched_setaffinity(0, before)
    assert_close(rows, expected("sparse", COUNT))


def test_the_profile_names_what_took_time() -> None:
    engine = Engine(packed("sparse"), 2, profile=True)
    stepped(engine, tokens_of("sparse"))
    seconds = engine.profile()
    assert {part for part, spent in seconds.items() if spent > 0} >= {"controller", "convolution", "head"}
    assert seconds["dense feed-forward"] == 0
    assert sum(engine.profile().values()) == 0
    assert engine.block_stack_ns > 0


# -- long texts ----------------------------------------------------------------------------------------------


def greedy(engine: Engine, prompt: list[int], count: int) -> list[int]:
    sequence = engine.sequence(len(prompt) + count)
    found = [int(engine.prefill(sequence, prompt).argmax())]
    while len(found) < count:
        found.append(int(engine.step(sequence, found[-1]).argmax()))
    return found


def assert_same_text(name: str, count: int) -> None:
    prompt = tokens_of(name, 5)
    made = network(name).generate(
        torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    assert greedy(start(packed(name), 2), prompt, count) == made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["sparse", "dense", "mixture of two", "convolved output"])
def test_greedy_text_equals_that_of_transformers(name: str) -> None:
    assert_same_text(name, 300)


@pytest.mark.slow
@every_model
def test_long_greedy_text_equals_that_of_transformers(name: str) -> None:
    assert_same_text(name, 2000)


# -- texts that grow beyond the short rotary frequencies --------------------------------------------------------

SWITCH = 10


def by_length(count: int, window: int | None = None) -> tuple[PackedModel, list[int], np.ndarray]:
    """A model whose frequencies change beyond `SWITCH` tokens, some tokens, and the logits after each by the model that
    transformers runs, which reads every text anew."""
    fields = spec_of("phi 3").model_dump()
    fields["rotary_scaling"] = {**fields["rotary_scaling"], "original_positions": SWITCH}
    fields["attention"]["window"] = window
    torch.manual_seed(0)
    model = build_network(ModelSpec.model_validate(fields)).eval()
    tokens = tokens_of("phi 3", count)
    with torch.no_grad():
        rows = [model(torch.tensor([tokens[: end + 1]])).logits[0, -1].numpy() for end in range(count)]
    return pack(model.config.spec, weights_of(model), EXACT), tokens, np.stack(rows)


@pytest.mark.parametrize("window", [None, 4])
def test_rotary_frequencies_depend_on_the_length_of_a_text(window: int | None) -> None:
    model, tokens, wanted = by_length(COUNT, window)
    assert_close(Reference(model).logits(tokens), wanted)
    engine = start(model, 2)
    assert_close(stepped(engine, tokens), wanted)
    for begun in (1, SWITCH, SWITCH + 1):  # prompts on either side
        sequence = engine.sequence(COUNT)
        assert_close(engine.prefill(sequence, tokens[:begun]), wanted[begun - 1])
        assert_close(engine.prefill(sequence, tokens[begun:]), wanted[-1])
        sequence.truncate(5)
        assert_close(engine.step(sequence, tokens[5]), wanted[5])
        assert_close(engine.prefill(sequence, tokens[6 : SWITCH + 2]), wanted[SWITCH + 1])


def test_texts_on_both_sides_go_together() -> None:
    model, tokens, wanted = by_length(COUNT)
    engine = start(model, 2)
    begun = (3, SWITCH - 1, SWITCH, 17)
    sequences = [engine.sequence(COUNT) for _ in begun]
    for sequence, length in zip(sequences, begun, strict=True):
        engine.prefill(sequence, tokens[:length])
    for after in range(3):
        rows = engine.step_batch(sequences, [tokens[length + after] for length in begun])
        assert_close(rows, wanted[[length + after for length in begun]])


# -- quality -------------------------------------------------------------------------------------------------

QUALITY = {  # of each precision, the largest share by which the perplexity may rise
    "bfloat16": (ROUNDED["bfloat16"], 0.001),
    "int8": (ROUNDED["int8"], 0.005),
    "int8, cache too": (Precision.of("int8", cache="int8"), 0.005),
    "int8, head rescored": (Precision.of("int8", head_rescoring=True), 0.005),
}


@pytest.mark.slow
def test_perplexity_with_fewer_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that has learned something, on held-out text; about five minutes."""
    loaded = load_recipe("quickstart", ["train.max_steps=400", "train.eval_steps=400"])
    command.run(loaded, output=tmp_path / "run")
    assert loaded.recipe.data
    held_out = pack_corpus(loaded.recipe.data).held_out.windows(256, 32_768)
    texts = [window["input_ids"].tolist() for window in held_out]
    folder = tmp_path / "run" / "model"
    spec = read_description(folder).spec

    def perplexity(precision: Precision) -> float:
        engine = Engine(pack(spec, read_weights(folder), precision))
        sequence, nats = engine.sequence(256), []
        for text in texts:
            sequence.truncate(0)
            logits = torch.from_numpy(engine.logits(sequence, text)[:-1])
            nats.append(torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:])).item())
        return float(np.exp(np.mean(nats)))

    exact = perplexity(EXACT)
    found = {name: perplexity(precision) for name, (precision, _) in QUALITY.items()}
    with capsys.disabled():
        console.print_table(
            ("precision", "perplexity", "against float32"),
            [("float32", f"{exact:.3f}", None)]
            + [(name, f"{value:.3f}", f"{value / exact - 1:+.3%}") for name, value in found.items()],
            title="held-out text",
        )
    for name, (_, limit) in QUALITY.items():
        assert found[name] < exact * (1 + limit), name


# -- the head ------------------------------------------------------------------------------------------------


def large_vocabulary(**head: object) -> PackedModel:
    """A model whose likeliest tokens lie close together."""
    spec = spec_of("sparse")
    spec = spec.model_copy(update={"vocabulary": spec.vocabulary.model_copy(update={"size": 3001})})
    generator = np.random.default_rng(1)
    weights = weights_of(network("sparse")) | {
        name: generator.normal(0, 0.1, (3001, spec.d_model)).astype(np.float32)
        for name in ("model.embedding.weight", "head.weight")
    }
    return pack(spec, weights, Precision.of("float32", **head))


@pytest.mark.parametrize(("coarse", "fine"), [("int8", "bfloat16"), ("int4", "int8")])
def test_a_rescored_head_chooses_as_the_finer_one(coarse: str, fine: str) -> None:
    tokens = some_tokens(3001, 400)
    exact, rescored, plain = (
        np.concatenate([engine.logits(engine.sequence(100), tokens[i : i + 100]) for i in range(0, 400, 100)])
        for engine in (
            Engine(large_vocabulary(head=fine), 1),
            Engine(large_vocabulary(head=coarse, head_rescoring=True), 2),
            Engine(large_vocabulary(head=coarse), 1),
        )
    )
    best = exact.argmax(-1)
    np.testing.assert_array_equal(rescored.argmax(-1), best)
    np.testing.assert_allclose(rescored.max(-1), exact.max(-1), atol=1e-5)
    assert (plain.argmax(-1) != best).any(), f"{coarse} alone would have done"


# -- what can go wrong ---------------------------------------------------------------------------------------


@pytest.fixture
def engine() -> Engine:
    return start(packed("sparse"), 2)


def test_a_full_sequence_takes_nothing(engine: Engine) -> None:
    tokens = tokens_of("sparse")
    sequence = engine.sequence(10)
    engine.prefill(sequence, tokens[:8])
    with pytest.raises(Failure, match="holds 10 positions"):
        engine.prefill(sequence, tokens[8:11])
    assert sequence.length == 8
    assert_close(engine.logits(sequence, tokens[8:10]), expected("sparse", COUNT)[8:10])
    with pytest.raises(Failure, match="holds 10 positions"):
        engine.step(sequence, 0)


def test_one_full_sequence_of_a_batch_leaves_all_as_they_were(engine: Engine) -> None:
    sequences = [engine.sequence(3), engine.sequence(2)]
    engine.step_batch(sequences, [1, 2])
    engine.step_batch(sequences, [3, 4])
    with pytest.raises(Failure, match="holds 2 positions"):
        engine.step_batch(sequences, [5, 6])
    assert [sequence.length for sequence in sequences] == [2, 2]


def test_learned_positions_end() -> None:
    spec = spec_of("dense").model_copy(update={"max_positions": 6})
    weights = weights_of(network("dense"))
    table = "model.position_embedding.weight"
    short = start(pack(spec, weights | {table: weights[table][:6]}, EXACT))
    sequence = short.sequence(20)
    short.prefill(sequence, [1] * 6)
    with pytest.raises(Failure, match="max_positions 6"):
        short.step(sequence, 1)
    assert sequence.length == 6


@pytest.mark.parametrize("token", [-1, 101, 2**31, -(2**40)])
@pytest.mark.parametrize("before", [0, 3, 70])
def test_tokens_outside_of_the_vocabulary(engine: Engine, token: int, before: int) -> None:
    sequence = engine.sequence(100)
    with pytest.raises(ValueError, match=f"{token} is not in the vocabulary of 101"):
        engine.prefill(sequence, [1] * before + [token])
    assert sequence.length == 0


def test_calls_that_make_no_sense(engine: Engine) -> None:
    sequence, other = engine.sequence(5), start(packed("dense")).sequence(5)
    with pytest.raises(ValueError, match="no tokens"):
        engine.prefill(sequence, [])
    with pytest.raises(ValueError, match="another engine"):
        engine.step(other, 1)
    with pytest.raises(ValueError, match="different sequences"):
        engine.step_batch([sequence, sequence], [1, 2])
    with pytest.raises(ValueError, match="one token for each"):
        engine.step_batch([sequence], [1, 2])
    for length in (-1, 1):
        with pytest.raises(ValueError, match=f"length: {length} is not between 0 and 0"):
            sequence.truncate(length)
    for capacity in (0, -5, 2**31):
        with pytest.raises(ValueError, match="capacity"):
            engine.sequence(capacity)


def test_sequences_out_of_range_are_refused_at_the_door(engine: Engine) -> None:
    library, error = binding.library(), ctypes.create_string_buffer(binding.ERROR_BYTES)
    for capacity, source in ((0, 0), (-1, 0), (2**30 + 1, 0), (2**62, 0), (1, -1), (1, 2**31)):
        assert not library.sparsecli_sequence_create(engine.handle, capacity, source, error)
        assert error.value == b"a sequence cannot be so long"
        assert library.sparsecli_sequence_bytes(engine.handle, capacity, source) == 2**63 - 1
    assert library.sparsecli_sequence_bytes(engine.handle, 2**30, 0) < 2**63 - 1


def test_bytes_past_counting_are_refused_at_the_door() -> None:
    """Of a model whose convolutions reach so far that they cannot be counted at the greatest capacity."""
    library, error = binding.library(), ctypes.create_string_buffer(binding.ERROR_BYTES)
    shape = shape_of(packed("sparse"), poison=False)
    units = (ctypes.c_int64 * 400)(*[2] * 400)
    windows, tables = (ctypes.c_int64 * 400)(), (ctypes.c_int64 * 400)()
    shape.layers, shape.kernel, shape.units_per_block = 400, 1 << 16, ctypes.addressof(units)
    shape.windows, shape.rotary_tables = ctypes.addressof(windows), ctypes.addressof(tables)
    handle = library.sparsecli_create(ctypes.byref(shape), 1, False, error)
    assert handle, error.value
    try:
        assert library.sparsecli_sequence_bytes(handle, 1, 0) < 2**36
        assert library.sparsecli_sequence_bytes(handle, 2**30, 0) == 2**63 - 1
        assert not library.sparsecli_sequence_create(handle, 2**30, 0, error)
        assert error.value == b"a sequence cannot be so long"
    finally:
        library.sparsecli_destroy(handle)


def test_what_is_closed_says_so(engine: Engine) -> None:
    sequence, kept = engine.sequence(5), engine.sequence(5)
    engine.step(sequence, 1)
    sequence.close()
    for call in (lambda: engine.step(sequence, 1), lambda: sequence.length, lambda: sequence.truncate(0)):
        with pytest.raises(ValueError, match="closed"):
            call()
    engine.close()
    engine.close()
    for call in (lambda: engine.step(kept, 1), lambda: engine.sequence(5), engine.profile):
        with pytest.raises(ValueError, match="closed"):
            call()


@pytest.mark.parametrize("threads", [0, -1, MAX_THREADS + 1, 10_000])
def test_impossible_numbers_of_threads(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads: {threads} is not between 1 and {MAX_THREADS}"):
        Engine(packed("sparse"), threads)


def test_more_threads_than_work() -> None:
    assert_close(stepped(start(packed("sparse"), 40), tokens_of("sparse")), expected("sparse", COUNT))


def test_too_little_memory_for_a_sequence(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.sequence(1000)
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100_000}))
    with pytest.raises(Failure, match=r"1000 positions need .* GB of cache"):
        engine.sequence(1000)


@pytest.mark.parametrize("change", ["short", "long", "type", "scales", "missing", "head"])
def test_tensors_that_do_not_fit_the_architecture(change: str) -> None:
    model = packed("sparse", ROUNDED["int8"])
    tensors = dict(model.tensors)
    if change == "short":
        tensors["blocks.1.units"] = tensors["blocks.1.units"][:-64]
    elif change == "long":
        tensors["blocks.1.units"] = np.concatenate([tensors["blocks.1.units"]] * 2)
    elif change == "type":
        tensors["blocks.1.units"] = tensors["blocks.1.units"].astype(np.float32)
    elif change == "scales":
        tensors["blocks.1.units.scale"] = tensors["blocks.1.units.scale"].astype(np.float16)
    elif change == "missing":
        del tensors["blocks.1.units"]
    else:
        del tensors["head.weight.scale"]
    with pytest.raises(ValueError, match=r"head.weight" if change == "head" else r"units"):
        Engine(PackedModel(model.spec, model.precision, tensors))


@pytest.mark.parametrize(
    ("field", "value"), [("d_model", 1 << 21), ("rank", 5000), ("block_size", 8000), ("heads", 1)]
)
def test_sizes_that_the_engine_cannot_do(field: str, value: int) -> None:
    """Refused before any memory is asked for."""
    spec = spec_of("sparse")
    changes = {"d_ff": 16000, "block_size": 8000} if field == "block_size" else {field: value}
    if field in ("rank", "block_size"):
        spec = spec.model_copy(update={"feed_forward": spec.feed_forward.model_copy(update=changes)})
    elif field == "heads":
        spec = spec.model_copy(update={"d_model": 2048, "heads": 1})
    else:
        spec = spec.model_copy(update=changes)
    words = "rank or the number of experts" if field == "rank" else field
    with pytest.raises(Failure, match=f"{words}.* out of range"):
        Engine(PackedModel(spec, EXACT, {}))


@pytest.mark.parametrize(
    ("variable", "value"),
    [("SPARSECLI_ISA", "avx1024"), ("SPARSECLI_ISA", "AVX2"), ("SPARSECLI_KERNELS", "fast")],
)
def test_environment_variables_that_name_nothing(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(Failure, match=f"{variable}={value}: expected one of ") as raised:
        Engine(packed("sparse"))
    assert raised.value.exit_code == 2


def test_an_instruction_set_that_this_processor_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = set(binding.INSTRUCTION_SETS) - set(binding.instruction_sets())
    if not lacking:
        pytest.skip("this processor has all of them")
    monkeypatch.setenv("SPARSECLI_ISA", lacking.pop())
    with pytest.raises(Failure, match="this processor or this build does not have"):
        Engine(packed("sparse"))


def test_the_reference_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECLI_KERNELS", "reference")
    with pytest.raises(Failure, match="SPARSECLI_KERNELS=reference"):
        Engine(packed("sparse"))
