"""What a benchmark counts and times: bytes, turns, prompts, parts."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
from small_benches import MODEL, SPARSE, engine, loaded, torch_model
from small_models import ALONE, FAMILIES, spec_of

from sparsecli import console
from sparsecli.bench import bytes_read, cases, command, figures, render, timing, variants
from sparsecli.bench.decoders import PromptReader, others
from sparsecli.bench.decoders.native import NativeDecoder
from sparsecli.bench.decoders.torch import TorchDecoder
from sparsecli.decode.native import binding
from sparsecli.decode.packed.precision import Precision
from sparsecli.model.sizes import count_parameters
from sparsecli.recipe.loader import load
from sparsecli.spec.model import ModelSpec

pytestmark = pytest.mark.usefixtures("quick_probe")


# -- bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bench-800m", "bench-17b"])
def test_bytes_of_one_type_are_those_of_the_active_parameters(name: str) -> None:
    recipe = load(name).recipe
    for variant in variants.from_recipe(recipe.model, recipe.bench):
        counted = bytes_read.bytes_per_token(variant.spec, Precision.of("bfloat16"), 64, vectors="bfloat16")
        assert counted == variant.sizes.bytes_per_token("bfloat16", 64)


@pytest.mark.parametrize("name", FAMILIES | ALONE)
def test_bytes_of_foreign_models(name: str) -> None:
    spec = spec_of(name)
    context = 1  # within every window
    counted = bytes_read.bytes_per_token(spec, Precision.of("bfloat16"), context, vectors="bfloat16")
    again = spec.tied * spec.d_model * 2  # the token's row of a table that the logits read whole
    again += (
        spec.shared_norm * spec.layers * 2 * spec.d_model * 2
    )  # a norm of two layers is packed for each of them
    assert counted == count_parameters(spec).bytes_per_token("bfloat16", context) + again


def test_bytes_of_windows() -> None:
    """A layer with a window reads keys and values of at most so many positions."""
    spec = spec_of("a window in every layer")
    window = spec.window(0)
    assert window
    short, long = (
        bytes_read.bytes_per_token(spec, Precision.of("bfloat16"), context)
        for context in (window, 4 * window)
    )
    assert short == long


def test_bytes_follow_the_packed_types() -> None:
    spec = ModelSpec.model_validate({**MODEL, "feed_forward": SPARSE, "positions": "rotary"})
    d, units = 32, 64
    shared = {
        "norms": 2 * (2 * 2 * d) * 4 + 2 * d * 4,
        "attention": 2 * 4 * (d * d + d) * 4,
        "controller": 2 * ((4 * d + 4 * 4) + (units * 4 + units * 4) + units * 4),  # int8 rows, scales, bias
        "feed-forward bias": 2 * d * 4,
        "embedding": d * 4,
        "head": 50 * (d + 4),
        "cache": 10 * 2 * 2 * 4 * (8 + 4),
    }
    row = d + 4
    precision = Precision.of("float32", units="int8", controller="int8", head="int8", cache="int8")
    assert bytes_read.bytes_per_token(spec, precision, 10) == sum(shared.values()) + 2 * 2 * units / 8 * row
    chosen = 2 * 2 * units * (1 - (7 / 8) ** 3) * row
    fixed = sum(shared.values()) + 2 * shared["embedding"] + 2 * shared["cache"]
    assert bytes_read.bytes_per_token(spec, precision, 10, batch=3) == round((fixed + chosen) / 3)


MATRIX = 64 * 64


@pytest.mark.parametrize(
    ("layer", "bits", "weights"),
    [
        ({"kind": "dense", "bias": False}, 2 * 8.5, 2),
        # All units in 4 bits, a quarter of them in 4 more.
        ({"kind": "precision", "units_per_block": 4}, 2 * (4 + 3 / 8) + 2 / 4 * (4 + 2 / 8), 2),
        # A sketch of the first matrix, and a quarter of the units; of these, only the second matrix is new.
        ({"kind": "selector", "units_per_block": 4}, (3 + 3 / 8) + 2 / 4 * 8.5, 1 + 1 / 4),
    ],
)
def test_bits_of_a_weight(layer: dict[str, object], bits: float, weights: float) -> None:
    """By hand, in matrices: int8 units, all else in float32."""
    spec = ModelSpec.model_validate(
        {
            **MODEL,
            "d_model": 64,
            "layers": 1,
            "positions": "rotary",
            "normalization": "rms",
            "attention": {"bias": False},
            "feed_forward": {"d_ff": 64, **layer},
        }
    )
    vectors = 3 * 64 + (2 * 64 if "units_per_block" in layer else 0)  # norms; importance and bias
    others = 4 + (50 * 64 + vectors) / MATRIX
    found = bytes_read.bits_per_weight(spec, Precision.of("float32", units="int8"))
    assert found == pytest.approx((32 * others + bits) / (others + weights))


def test_looked_up_rows_do_not_count_among_the_bits() -> None:
    for tied in (False, True):
        spec = ModelSpec.model_validate({**MODEL, "vocabulary": {"kind": "dense", "size": 50, "tied": tied}})
        for dtype, bits in (("float32", 32), ("bfloat16", 16)):
            assert bytes_read.bits_per_weight(spec, Precision.of(dtype), vectors=dtype) == bits


# -- measuring -----------------------------------------------------------------------------------------------


def test_turns_interleave_and_start_from_the_same_context() -> None:
    log: list[tuple[str, str]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def prefill(self, tokens: list[int]) -> None:
            log.append((self.name, f"prefill {len(tokens)}"))

        def rewind(self) -> None:
            log.append((self.name, "rewind"))

        def step(self, token: int) -> tuple[int, int]:
            log.append((self.name, "step"))
            return 1, 10

    timings = [timing.Timing(Recorder(name), 50, 2, 2, context=5, warmup=1) for name in "ab"]
    with console.progress("test", None) as progress:
        timing.measure(timings, 2, 0, progress)
    turn = ["rewind", "step", "step"]
    expected = [("a", "prefill 5"), ("b", "prefill 5")]
    expected += [(name, what) for _ in range(2) for name in "ab" for what in turn]
    assert log == expected
    assert [len(each.token_ns) for each in timings] == [2, 2]


CONV = {**MODEL, "attention": {"projection": "multiplicative_conv"}}


def decoders(batch: int = 1) -> list[object]:
    spec = ModelSpec.model_validate(CONV)
    found: list[object] = [TorchDecoder(torch_model(spec, profile=True), 1, 16, batch)]
    if binding.available() is None:
        found.append(NativeDecoder(engine(spec, profile=True), 16, batch))
    return found


@pytest.mark.parametrize("batch", [1, 3])
def test_a_rewound_decoder_repeats_itself(batch: int) -> None:
    for decoder in decoders(batch):
        decoder.prefill([1, 2, 3, 4])

        def three() -> list[int]:
            tokens = [7]
            for _ in range(3):
                token, nanoseconds = decoder.step(tokens[-1])  # noqa: B023
                assert nanoseconds > 0
                tokens.append(token)
            return tokens

        first = three()
        decoder.rewind()
        assert three() == first


def test_a_batch_decodes_different_texts() -> None:
    for alone, together in zip(decoders(), decoders(3), strict=True):
        together.prefill([1, 2, 3, 4])
        together.step(7)
        expected = []
        for index in range(3):
            alone.prefill([others(token, index, 50) for token in [1, 2, 3, 4]])
            expected.append(alone.step(others(7, index, 50))[0])
        assert together.next == expected


def test_a_profile_accounts_for_the_time() -> None:
    for decoder in decoders():
        timed = timing.Timing(decoder, 50, 2, 2, context=4, steps=3, profiled=decoder)
        with console.progress("test", None) as progress:
            timing.measure([timed], 2, 0, progress)
        assert sum(timed.parts.values()) == pytest.approx(timed.token_ms.mean(), rel=0.01)
        assert {"attention", "head", "rest"} <= set(timed.parts)
        assert set(timed.parts) & set(figures.FEED_FORWARD_PARTS)


def test_both_attention_layers_of_a_block_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec.model_validate({**MODEL, "residual": "reversible", "attention_layers": 2})
    model = torch_model(spec, profile=True)
    clock = SimpleNamespace(perf_counter_ns=itertools.count().__next__)
    monkeypatch.setattr("sparsecli.bench.decoders.torch.time", clock)
    TorchDecoder(model, 1, 16).prefill([1, 2, 3])
    assert model.parts["attention"].read() == 2 * spec.layers


def test_a_prompt_is_read_anew_at_every_step() -> None:
    read: list[list[int]] = []
    reader = PromptReader(SimpleNamespace(prefill=read.append), vocabulary=10)
    reader.prefill([1, 2, 9])
    assert reader.step(3) == (0, None)
    assert reader.step(0) == (0, None)
    assert read == [[4, 5, 2], [1, 2, 9]]


def test_prompts_are_rows_of_their_own_beside_torch_as_bfloat16() -> None:
    measured = command.run(loaded(prefill=24, dtypes=["float32"]), format="json")
    prompts = [row for row in measured.rows if row.prefill]
    assert [(row.variant, row.dtype) for row in prompts] == [
        ("dense", "float32"),
        ("both", "float32"),
        ("dense", "bfloat16"),
    ]
    for row in prompts:
        assert (row.context, row.ms_per_block, row.bandwidth_fraction, row.paper) == (0, None, None, None)
        assert len(row.ms_per_token.samples) == 2
    assert prompts[1].speedup == pytest.approx(
        prompts[0].ms_per_token.p50 / prompts[1].ms_per_token.p50, rel=0.05
    )


def test_part_of_a_model_reads_no_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    measured = command.run(loaded(measured_layers=1, dtypes=["float32"], prefill=24), format="json")
    assert [row.prefill for row in measured.rows] == [None, None]
    assert "the prefill is measured only for whole models" in capsys.readouterr().err


def test_every_combination_is_a_row_with_a_key_of_its_own() -> None:
    measured = command.run(
        loaded(dtypes=["float32"], threads=[1], context=[4, 40], batch=[1, 2]), format="json"
    )
    assert len({row.key for row in measured.rows}) == len(measured.rows) == 2 * 2 * 2
    assert {(row.context, row.batch) for row in measured.rows} == set(itertools.product([4, 40], [1, 2]))
    assert all(row.parameters == measured.rows[0].parameters for row in measured.rows[::2])
    shown = render.as_markdown(measured)
    assert "| context | batch |" in shown
    assert "| threads |" not in shown
    assert "divided by its sequences" in shown


def test_threads_are_a_case_each() -> None:
    recipe = loaded(dtypes=["float32"], threads=[1, 2], context=[4], prefill=9).recipe
    found = cases.plan(variants.from_recipe(recipe.model, recipe.bench), recipe.bench).cases
    names = ["dense", "both"]
    described = [(case.variant.name, case.threads, case.prefill) for case in found]
    assert described[:4] == [(name, 1, prefill) for prefill in (0, 9) for name in names]
    assert described[4:8] == [(name, 2, prefill) for prefill in (0, 9) for name in names]
    assert (found[-1].dtype, found[-1].prefill) == ("bfloat16", 9)


def test_a_value_that_is_named_twice_is_one_case() -> None:
    recipe = loaded(dtypes=["float32"] * 2, backends=["torch"] * 2, threads=[1, 1], context=[4, 4]).recipe
    found = cases.plan(variants.from_recipe(recipe.model, recipe.bench), recipe.bench).cases
    assert [case.variant.name for case in found] == ["dense", "both"]
