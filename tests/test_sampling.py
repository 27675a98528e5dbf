"""The next token: what transformers would leave in the choice, and how often each is chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sparsecli.console import Failure
from sparsecli.generate.sampling import distribution, make_sampler
from sparsecli.recipe.schema import GenerateSpec

OPTIONS = st.builds(
    GenerateSpec,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 5, 1000]),
    top_p=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.3]),
)


def by_transformers(tokens: list[int], logits: np.ndarray, options: GenerateSpec) -> np.ndarray:
    """Probabilities (V,) as `transformers.generate` makes them."""
    processors = LogitsProcessorList()
    if options.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    processors.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        processors.append(MinPLogitsWarper(options.min_p))
    scores = processors(torch.tensor([tokens]), torch.from_numpy(logits)[None].double())
    return scores.softmax(-1)[0].numpy()


@settings(deadline=None, derandomize=True, max_examples=150)
@given(options=OPTIONS, seed=st.integers(0, 99), size=st.sampled_from([2, 50, 700]))
def test_the_distribution_is_that_of_transformers(options: GenerateSpec, seed: int, size: int) -> None:
    generator = np.random.default_rng(seed)
    logits = (3 * generator.normal(size=size)).astype(np.float32)
    tokens = generator.integers(0, size, 8).tolist()
    expected = by_transformers(tokens, logits, options)
    found = distribution(tokens, logits, options)
    least = 1e-30  # far below, float32 ends
    assert np.array_equal(found > least, expected > least)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(penalty=st.sampled_from([0.8, 1.0, 1.3]), seed=st.integers(0, 99))
def test_greedy_takes_the_largest_after_the_penalty(penalty: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=20).astype(np.float32)
    tokens = generator.integers(0, 20, 8).tolist()
    sampler = make_sampler(GenerateSpec(temperature=0, repetition_penalty=penalty), seed=0)
    scores = torch.from_numpy(logits.copy())[None]
    if penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), scores)
    before = logits.copy()
    assert sampler(tokens, logits) == int(scores.argmax())
    assert np.array_equal(logits, before)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.685, 0.247, 0.062, 0.007]),
        ({"temperature": 1e-300}, [1, 0, 0, 0]),
        ({"temperature": 1e300}, [0.25, 0.25, 0.25, 0.25]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.75}, [0.625, 0.375, 0, 0]),
        ({"top_p": 1e-300}, [1, 0, 0, 0]),
        ({"min_p": 0.25}, [0.526, 0.316, 0.158, 0]),
        ({"repetition_penalty": 2.0}, [0.525, 0.315, 0.158, 0.0026]),
    ],
)
def test_tokens_are_as_frequent_as_likely(options: dict[str, object], expected: list[float]) -> None:
    sampler = make_sampler(GenerateSpec(**{"temperature": 1.0, "top_p": 1.0, **options}), seed=0)
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    counts = np.bincount([sampler([3], logits) for _ in range(4000)], minlength=4)
    np.testing.assert_allclose(counts / 4000, expected, atol=0.025)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 3}, {"min_p": 0.1}])
def test_logits_that_are_no_numbers_get_one_clear_line(value: float, options: dict[str, object]) -> None:
    logits = np.array([0, value, 1], np.float32)
    with pytest.raises(Failure, match="NaN or infinite"):
        make_sampler(GenerateSpec(**options), seed=0)([1], logits)
