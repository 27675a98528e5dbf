"""Speculative decoding: the text and the distribution of the target alone, drafts, draft lengths, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from small_models import packed, random_weights, some_tokens, spec_of, start, stepped

from sparsecli import pack
from sparsecli.console import Failure
from sparsecli.data.tokenization import train_byte_pairs
from sparsecli.decode.engine import Engine
from sparsecli.decode.native import binding
from sparsecli.decode.packed.pack import pack as pack_weights
from sparsecli.decode.packed.precision import Precision
from sparsecli.generate.command import generate
from sparsecli.generate.decoder import DecoderOptions
from sparsecli.generate.drafts import Draft, LookupDrafter, ModelDrafter
from sparsecli.generate.native_decoder import NativeDecoder
from sparsecli.generate.sampling import distribution, make_sampler
from sparsecli.generate.speculation import LONGEST_DRAFT, Pace, speculate
from sparsecli.generate.text import Generation
from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM
from sparsecli.model.files import find_model, read_description
from sparsecli.recipe.schema import GenerateSpec
from sparsecli.spec.model import ModelSpec

pytestmark = pytest.mark.skipif(binding.available() is not None, reason=str(binding.available()))
TEXT = "def read_file(path):\n    return open(path).read()\n\nnaïve = 'žluťoučký kůň 🐎'\n"
PRECISION = {"kind": "precision", "d_ff": 64, "block_size": 8, "units_per_block": 2, "activation": "relu"}


class FixedPace(Pace):
    """Drafts of changing lengths, whatever they cost."""

    def __init__(self, *lengths: int) -> None:
        super().__init__()
        self.lengths = [*lengths]

    def length(self, kind: int) -> int:
        self.lengths = [*self.lengths[1:], self.lengths[0]]
        return self.lengths[-1]


def save_model(folder: Path, seed: int = 0, scale: float = 1.0, vocabulary: int = 300, **fields: Any) -> Path:
    """A tiny random model with a real tokenizer."""
    tokenizer = train_byte_pairs(vocabulary, [TEXT] * 3)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        **{"d_model": 32, "layers": 2, "heads": 4, "max_positions": 96},
        "feed_forward": {"kind": "sparse", "d_ff": 64, "block_size": 8, "rank": 4},
        "vocabulary": {"kind": "dense", "size": 300, "tied": True},
    }
    config = ScalingTransformerConfig(**sizes | fields, eos_token_id=tokenizer.eos_token_id)
    model = ScalingTransformerForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.mul_(scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("run") / "model", scale=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("small") / "model", 1, d_model=16, layers=1, heads=2)


@pytest.fixture
def written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """The JSON document of `generate`; drafts have lengths that change, whatever they cost."""

    def run(folder: Path, prompt: str = TEXT[:40], **options: Any) -> dict[str, Any]:
        sampling = {key: options.pop(key) for key in list(options) if key in GenerateSpec.model_fields}
        decoder = DecoderOptions(**options.pop("decoder", {"threads": 1}))
        spec = GenerateSpec(**{"max_new_tokens": 40, "temperature": 0.0, **sampling})
        monkeypatch.setattr("sparsecli.generate.speculation.Pace", lambda: FixedPace(3, 0, 7, 1))
        generate(find_model(str(folder)), prompt=prompt, options=spec, decoder=decoder, json=True, **options)
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


# -- the same text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "int8",
        pytest.param("bfloat16", marks=pytest.mark.slow),
        pytest.param("int4", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", small_models.MODELS | small_models.QUANTIZED)
def test_a_pass_over_several_tokens_is_bit_by_bit_that_of_steps(name: str, dtype: str) -> None:
    """On this, lossless speculation stands."""
    engine = start(packed(name, Precision.of(dtype)))
    tokens = some_tokens(spec_of(name).vocabulary.size, 40)
    sequence = engine.sequence(40)
    found = [engine.logits(sequence, tokens[:10])]
    engine.logits(sequence, tokens[3:9])
    sequence.truncate(10)
    found += [engine.logits(sequence, tokens[a:b]) for a, b in ((10, 15), (15, 17), (17, 40))]
    np.testing.assert_array_equal(np.concatenate(found), stepped(engine, tokens))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_so_is_a_pass_over_rows_that_are_read_in_spans(dtype: str) -> None:
    sizes = {"d_model": 2304, "layers": 1, "heads": 8, "attention": {"projection": "dense"}}
    spec = ModelSpec.model_validate(
        {**spec_of("dense").model_dump(), **sizes, "feed_forward": {"kind": "dense", "d_ff": 48}}
    )
    engine = Engine(pack_weights(spec, random_weights(spec), Precision.of(dtype)), 1)
    tokens = some_tokens(101, 17)
    found = engine.logits(engine.sequence(17), tokens)
    np.testing.assert_array_equal(found, stepped(engine, tokens))


@pytest.mark.parametrize("draft", ["lookup", "small", "itself"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt": "a"},
        {"repetition_penalty": 1.3},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"max_new_tokens": 500},
        {"decoder": {"dtype": "int8", "cache_dtype": "int8", "threads": 1}},
    ],
)
def test_greedy_text_is_that_of_the_model_alone(
    folder: Path, small: Path, written: Callable[..., dict[str, Any]], draft: str, options: dict[str, Any]
) -> None:
    """To the end of the context, too."""
    alone = written(folder, **options)
    model = {"lookup": "lookup", "small": str(small), "itself": str(folder)}[draft]
    drafted = written(folder, **options, draft=model)
    for name in ("tokens", "text", "finish"):
        assert drafted[name] == alone[name]
    figures = drafted["stats"]["speculation"]
    if draft == "itself" and figures["drafted_tokens"]:
        assert figures["acceptance"] == 1
    if options.get("max_new_tokens") == 500:
        assert drafted["finish"] in ("context", "end")
        assert figures["tokens_per_pass"] > 1 or draft == "small"


def test_a_draft_across_a_change_of_rotary_frequencies(tmp_path: Path) -> None:
    scaling = {"kind": "longrope", "original_positions": 50}
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
    model = save_model(tmp_path / "model", scale=3.0, positions="rotary", rotary_scaling=scaling | factors)
    decoder = NativeDecoder(model, read_description(model), DecoderOptions(threads=1))
    tokens = np.random.default_rng(0).integers(0, 300, 55).tolist()
    decoder.prefill(tokens[:47], capacity=55)
    stepped = [decoder.step(token) for token in tokens[47:]]
    decoder.truncate(47)
    np.testing.assert_array_equal(decoder.verify(tokens[47:]), np.stack(stepped))


@pytest.mark.parametrize("draft", ["lookup", "itself"])
def test_stop_texts_and_end_tokens_end_the_text_within_a_draft(
    folder: Path, tmp_path: Path, written: Callable[..., dict[str, Any]], draft: str
) -> None:
    model = "lookup" if draft == "lookup" else str(folder)
    alone = written(folder)
    for at in (4, 5, 6, 7):
        stop = alone["text"][at : at + 2]
        stopped = written(folder, stop=[stop])
        found = written(folder, stop=[stop], draft=model)
        assert (found["text"], found["tokens"], found["finish"]) == (
            *(stopped["text"], stopped["tokens"]),
            "stop",
        )
        copy = tmp_path / f"ends-{at}"
        copy.mkdir()
        for path in folder.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        fields = json.loads((copy / "config.json").read_text()) | {"eos_token_id": alone["tokens"][at]}
        (copy / "config.json").write_text(json.dumps(fields))
        ended, found = written(copy), written(copy, draft=model)
        assert (found["text"], found["tokens"], found["finish"]) == (ended["text"], ended["tokens"], "end")


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5, "top_p": 1.0}, {"top_k": 3, "repetition_penalty": 1.2}]
)
def test_lookup_gives_the_sampled_text_of_the_same_seed(
    folder: Path, written: Callable[..., dict[str, Any]], options: dict[str, Any]
) -> None:
    given = {"temperature": 0.7, **options}
    for seed in range(3):
        alone = written(folder, seed=seed, **given)
        assert written(folder, seed=seed, draft="lookup", **given)["tokens"] == alone["tokens"]


def test_a_packed_model_drafts_itself_without_refinement(
    tmp_path: Path, written: Callable[..., dict[str, Any]]
) -> None:
    folder = save_model(tmp_path / "model", feed_forward=PRECISION, attention={"projection": "dense"})
    alone = written(folder)
    assert written(folder, draft="self")["tokens"] == alone["tokens"]
    pack.run(model=str(folder), output=tmp_path / "packed", dtype="int8")
    alone = written(tmp_path / "packed")
    drafted = written(tmp_path / "packed", draft="self")
    assert drafted["tokens"] == alone["tokens"]
    assert drafted["stats"]["speculation"]["acceptance"] > 0.5
    assert (
        written(tmp_path / "packed", draft=str(tmp_path / "packed" / "model.spk"))["tokens"]
        == alone["tokens"]
    )


# -- the same distribution -----------------------------------------------------------------------------------


class Fixed:
    """A model of four tokens whose logits depend on the last token alone."""

    def __init__(self, seed: int) -> None:
        self.table = np.random.default_rng(seed).normal(size=(4, 4)).astype(np.float32) * 1.5
        self.tokens: list[int] = []

    def prefill(self, prompt: Sequence[int], capacity: int) -> np.ndarray:
        self.tokens, self.capacity = list(prompt), capacity
        return self.table[prompt[-1]]

    def step(self, token: int) -> np.ndarray:
        return self.verify([token])[0]

    def verify(self, tokens: Sequence[int]) -> np.ndarray:
        self.tokens += tokens
        assert len(self.tokens) <= self.capacity
        return self.table[list(tokens)]

    def truncate(self, length: int) -> None:
        assert length <= len(self.tokens)
        del self.tokens[length:]


class FixedDrafter:
    """Draws from another such model."""

    def __init__(self, seed: int, draws: int, options: GenerateSpec) -> None:
        self.table, self.options = Fixed(seed).table, options
        self.generator = np.random.default_rng(draws)

    def kind(self, tokens: Sequence[int]) -> int:
        return 0

    def catch_up(self, tokens: Sequence[int]) -> None:
        """Nothing is read."""

    def propose(self, tokens: Sequence[int], count: int) -> Draft:
        drafted: list[int] = []
        chances: list[np.ndarray] = []
        for _ in range(count):
            text = [*tokens, *drafted]
            chances.append(distribution(text, self.table[text[-1]], self.options))
            drafted.append(int(self.generator.choice(4, p=chances[-1] / chances[-1].sum())))
        return Draft(drafted, chances)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.8, "top_k": 3, "top_p": 1.0},
        {"temperature": 1.2, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.5},
    ],
)
def test_sampled_texts_are_distributed_as_the_model_s_own(given: dict[str, Any]) -> None:
    """Counts of all texts of three tokens against their exact chances: Pearson's chi-squared."""
    options, count = GenerateSpec(**given), 6000
    target, counts = Fixed(0), np.zeros((4, 4, 4))
    accepted = rejected = 0
    for seed in range(count):
        result = Generation(prompt_tokens=1)
        sampler, drafter = make_sampler(options, seed), FixedDrafter(1, 100_000 + seed, options)
        texts = speculate(target, drafter, [0], options, sampler, seed, 3, result, FixedPace(2))  # type: ignore[arg-type]
        counts[tuple(texts)] += 1
        assert result.speculation
        accepted += result.speculation.accepted
        rejected += result.speculation.drafted - result.speculation.accepted
    assert min(accepted, rejected) > count / 10
    chances = np.ones((4, 4, 4))
    for text in np.ndindex(4, 4, 4):
        for at in range(3):
            before = [0, *text[:at]]
            chances[text] *= distribution(before, target.table[before[-1]], options)[text[at]]
    assert chances.sum() == pytest.approx(1, abs=1e-5)
    assert not counts[chances == 0].any()
    expected = count * chances[chances > 0]
    rare = expected < 5
    observed = counts[chances > 0]
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
    squared = ((observed - expected) ** 2)[expected > 0] / expected[expected > 0]
    freedom = len(squared) - 1
    assert squared.sum() < freedom + 4 * np.sqrt(2 * freedom)  # four standard deviations


def test_the_check_of_the_distribution_can_fail() -> None:
    """Drafts that are accepted without a test have another distribution."""
    options = GenerateSpec(temperature=1.0, top_p=1.0)
    wanted, other = (distribution([0], Fixed(seed).table[0], options) for seed in (0, 1))
    assert 6000 * ((wanted - other) ** 2 / wanted).sum() > 100


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_model_s_drafts_are_its_own_samples(penalty: float) -> None:
    """After any rejection its sequence holds the text, and only that."""
    options = GenerateSpec(temperature=0, repetition_penalty=penalty)
    engine = start(packed("sparse"))
    drafter = ModelDrafter(engine, 101, options, 60, 0)
    text = some_tokens(101, 12)
    for count, others in ((4, [5]), (1, []), (6, [3, 3]), (3, [])):
        alone, expected = engine.sequence(60), list(text)
        logits = engine.prefill(alone, text)
        for _ in range(count):
            scores = logits.copy()
            used = list(set(expected))
            scores[used] = np.where(scores[used] < 0, scores[used] * penalty, scores[used] / penalty)
            expected.append(int(scores.argmax()))
            logits = engine.step(alone, expected[-1])
        draft = drafter.propose(text, count)
        assert draft.tokens == expected[len(text) :]
        text += [*draft.tokens[: count // 2], *others, 1]
    assert drafter.kind(list(range(61))) is None


def test_a_draft_model_may_have_more_or_fewer_tokens() -> None:
    options = GenerateSpec(temperature=1.0)
    for vocabulary in (99, 105):
        drafter = ModelDrafter(start(packed("sparse")), vocabulary, options, 30, 0)
        draft = drafter.propose([1, 2, 3], 20)
        assert draft.probabilities
        assert {len(chances) for chances in draft.probabilities} == {vocabulary}
        assert max(draft.tokens) < min(vocabulary, 101)


# -- drafts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("abcdXabc", 3, "dXa"),
        ("abcXabYab", 2, "Yab"),  # the last time
        ("abcdeYbcdeZ", None, ""),
        ("xabxabxab", 6, "xab"),
        ("aaaa", 3, "aaa"),  # the text goes on in its draft
        ("ab", None, ""),
        ("a", None, ""),
    ],
)
def test_lookup_finds_the_longest_end_of_the_text(text: str, kind: int | None, expected: str) -> None:
    whole, grown = LookupDrafter(), LookupDrafter()
    tokens = [ord(letter) for letter in text]
    for end in range(1, len(tokens)):
        grown.kind(tokens[:end])
    for drafter in (whole, grown):
        assert drafter.kind(tokens) == kind
        assert "".join(map(chr, drafter.propose(tokens, 3).tokens)) == expected


def paced(accepted: float, step: float, base: float, more: float, drafting: float = 0.0) -> Iterator[int]:
    """Draft lengths that a pace chooses where so many tokens are accepted at those times (ms)."""
    pace, generator = Pace(), np.random.default_rng(0)
    while True:
        count = pace.length(0)
        yield count
        if not count:
            pace.step.add(1, step)
            continue
        draws = generator.random(count) < accepted
        hits = count if draws.all() else int(draws.argmin())
        pace.drafting.add(count, drafting * count)
        pace.verifying.add(count + 1, base + more * (count + 1))
        pace.count(0, hits, hits < count)


@pytest.mark.parametrize(
    ("accepted", "costs", "least", "most"),
    [
        (0.97, (10.0, 10.0, 0.2), 8, LONGEST_DRAFT),
        (0.6, (10.0, 10.0, 1.0), 1, 4),
        (0.7, (10.0, 10.0, 0.5, 3.0), 1, 4),  # a draft model takes a third of the time
        (0.3, (10.0, 8.0, 5.0), 0, 0),
        (0.7, (10.0, 10.0, 0.5, 12.0), 0, 0),
        (0.9, (10.0, 0.0, 10.0), 0, 0),  # a pass costs as much as its steps
    ],
)
def test_draft_lengths_follow_acceptance_and_times(
    accepted: float, costs: tuple[float, ...], least: int, most: int
) -> None:
    lengths = [count for count, _ in zip(paced(accepted, *costs), range(1000), strict=False)]
    assert lengths[:2] == [0, 0]
    assert least <= np.median(lengths[200:]) <= most
    if not most:
        assert np.mean(np.array(lengths[200:]) > 0) < 0.03  # tried again now and then
        assert max(lengths[100:]) > 0


# -- what is shown and refused -------------------------------------------------------------------------------


def test_figures_of_drafts_are_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(
        folder,
        prompt=TEXT[:40],
        options=GenerateSpec(temperature=0, max_new_tokens=50),
        decoder=DecoderOptions(threads=1),
        stats=True,
        draft="lookup",
    )
    shown = capsys.readouterr().err
    assert "tokens per pass in" in shown or "no drafts in" in shown


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("nowhere", "nowhere: no such file or folder"),
        ("self", "--draft self: the model's feed-forward layers are sparse"),
        ("other", "has another vocabulary; a draft model needs that of the model"),
        ("lsh", "has LSH attention; choose another draft model"),
    ],
)
def test_drafts_that_do_not_fit(folder: Path, tmp_path: Path, draft: str, message: str) -> None:
    attention = {"kind": "lsh", "lsh": {"chunk_length": 8, "buckets": 4}, "projection": "dense"}
    if draft == "other":
        draft = str(save_model(tmp_path / "model", vocabulary=290))
    elif draft == "lsh":
        draft = str(save_model(tmp_path / "model", attention={**attention, "share_query_key": True}))
    with pytest.raises(Failure, match=message) as caught:
        generate(folder, prompt="a", options=GenerateSpec(), decoder=DecoderOptions(), draft=draft)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_take_back_tokens(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="--draft: needs the native engine"):
        generate(
            folder,
            prompt="a",
            options=GenerateSpec(),
            decoder=DecoderOptions(backend="torch"),
            draft="lookup",
        )
    attention = {"kind": "lsh", "lsh": {"chunk_length": 8, "buckets": 4}, "projection": "dense"}
    hashed = save_model(tmp_path / "model", attention={**attention, "share_query_key": True})
    with pytest.raises(Failure, match="has LSH attention, and cannot take back tokens"):
        generate(hashed, prompt="a", options=GenerateSpec(), decoder=DecoderOptions(), draft="lookup")
