"""Evaluation on pairs: the loss over targets, what is written greedily, ROUGE, exact copies, the lead."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

from sparsecli.data.copying import symbol_tokenizer
from sparsecli.data.examples import PairExamples
from sparsecli.model.auto import build_network
from sparsecli.spec.model import ModelSpec
from sparsecli.train.evaluation import evaluate
from sparsecli.train.samples import Samples, rouge, sentences, write_greedily

SYMBOLS = 30
TOKENIZER = symbol_tokenizer(SYMBOLS)


class Listed(PairExamples):
    """Pairs of token ids as they are given."""

    def __init__(self, *pairs: tuple[list[int], list[int]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        source, target = self.pairs[index]
        return np.array(source), np.array(target)


PAIRS = Listed(
    ([5, 6, 7, 1], [5, 6, 1]), ([9, 1], [9, 8, 7, 6, 1]), ([4, 4, 4, 4, 4, 1], [3, 1]), ([8, 7, 1], [8, 1])
)


@pytest.fixture(scope="module")
def model() -> T5ForConditionalGeneration:
    """Any model of transformers that reads and writes; T5 has the same special tokens."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=SYMBOLS + 2,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.3,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).train()


def test_loss_is_the_mean_over_the_tokens_of_all_targets(model: T5ForConditionalGeneration) -> None:
    before = torch.get_rng_state()
    figures = evaluate(model, PAIRS, bytes_per_token=2.0, batch_size=3)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert figures.tokens == 3 + 5 + 2 + 2
    nats = 0.0
    with torch.no_grad():
        for source, target in PAIRS.pairs:
            shifted = torch.tensor([[0, *target[:-1]]])
            logits = model.eval()(input_ids=torch.tensor([source]), decoder_input_ids=shifted).logits
            nats += F.cross_entropy(logits[0], torch.tensor(target), reduction="sum").item()
    model.train()
    assert figures.nats_per_token == pytest.approx(nats / 12, rel=1e-5)
    assert figures.bits_per_byte == pytest.approx(nats / 12 / np.log(2) / 2, rel=1e-5)


def test_evaluation_splits_over_processes(model: T5ForConditionalGeneration) -> None:
    whole = evaluate(model, PAIRS, 1.0, batch_size=1)
    shares: list[torch.Tensor] = []

    def collect(sums: torch.Tensor) -> torch.Tensor:
        shares.append(sums)
        return sums

    for rank in (0, 1):
        evaluate(model, PAIRS, 1.0, batch_size=1, rank=rank, ranks=2, add_up=collect)
    nats, tokens, *_ = sum(shares).tolist()
    assert (nats / tokens, tokens) == (pytest.approx(whole.nats_per_token), whole.tokens)


def test_greedy_writing_ends_with_the_end_token_and_padding_changes_nothing(
    model: T5ForConditionalGeneration,
) -> None:
    batch = PAIRS.collate([PAIRS[index] for index in range(4)])
    model.eval()
    together = write_greedily(model, batch["input_ids"], batch["attention_mask"], 9)
    for index, ids in enumerate(together):
        source = PAIRS[index]["input_ids"][None]
        (alone,) = write_greedily(model, source, torch.ones_like(source), 9)
        assert torch.equal(ids, alone)
        assert len(ids) <= 9
        assert 1 not in ids[:-1]
    model.train()


def test_a_penalty_keeps_what_was_written_from_being_written_again(
    model: T5ForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = PAIRS[0]["input_ids"][None]
    model.eval()
    (plain,) = write_greedily(model, source, torch.ones_like(source), 9)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 100.0)
    (penalized,) = write_greedily(model, source, torch.ones_like(source), 9)
    assert len(set(plain.tolist())) < len(plain)
    assert len(set(penalized.tolist())) == len(penalized)
    model.train()


def written_as(monkeypatch: pytest.MonkeyPatch, texts: list[list[int]]) -> None:
    """What the model writes, in place of a model's own."""
    waiting = [torch.tensor(ids) for ids in texts]
    monkeypatch.setattr(
        "sparsecli.train.samples.write_greedily",
        lambda model, sources, mask, longest: [waiting.pop(0) for _ in sources],
    )


def samples(judge: str, folder: Path | None = None, count: int = 9) -> Samples:
    return Samples(PAIRS, TOKENIZER, count, judge=judge, longest=9, batch_size=3, folder=folder)


def test_exact_matches_count_whole_targets(
    model: T5ForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # right; too short; a token too many; right
    written_as(monkeypatch, [[5, 6, 1], [9, 8, 7, 1], [3, 3, 1], [8, 1]])
    assert samples("exact", tmp_path).figures(model) == {"exact_match": 0.5}
    assert model.training
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert lines[1] == {"source": "7", "target": "7 6 5 4", "written": "7 6 5"}


def test_only_so_many_are_sampled(model: T5ForConditionalGeneration, monkeypatch: pytest.MonkeyPatch) -> None:
    written_as(monkeypatch, [[5, 6, 1], [2, 1]])
    assert samples("exact", count=2).figures(model) == {"exact_match": 0.5}


def test_a_signal_cuts_it_short(model: T5ForConditionalGeneration, monkeypatch: pytest.MonkeyPatch) -> None:
    written_as(monkeypatch, [[2, 1]] * 4)
    asked: list[int] = []
    assert samples("exact").figures(model, stopped=lambda: bool(asked) or asked.append(1)) is None
    assert model.training


def test_rouge_of_samples_and_of_the_lead(
    model: T5ForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_as(monkeypatch, [[5, 6, 1], [9, 8, 7, 6, 1], [3, 1], [20, 1]])
    figures = samples("rouge").figures(model)
    assert figures["rouge_1"] == pytest.approx(75)  # the last of four is wrong
    assert figures["rouge_2"] == pytest.approx(50)  # two targets have a single word
    # Targets have two tokens in the mean: "3 4" for "3 4", "7" for "7 6 5 4", "2 2" for "1", "6 5" for "6".
    lead = samples("rouge").lead()
    assert lead["rouge_1"] == pytest.approx(100 * (1 + 0.4 + 0 + 2 / 3) / 4)


def test_rouge_of_known_texts() -> None:
    same = rouge(["The cat sat. It slept."], ["The cat sat. It slept."])
    assert same == {"rouge_1": 100, "rouge_2": 100, "rouge_lsum": 100}
    figures = rouge(["the cats sat", ""], ["the cat lay", "nothing"])
    assert figures["rouge_1"] == pytest.approx(100 * 2 / 3 / 2)  # stemmed: the, cat
    assert figures["rouge_2"] == pytest.approx(100 * 1 / 2 / 2)
    # Of two sentences in another order Lsum keeps more than one longest common subsequence does.
    swapped = rouge(["Dogs run fast. Cats sleep long."], ["Cats sleep long. Dogs run fast."])
    assert swapped["rouge_lsum"] == pytest.approx(100)
    assert sentences("One. Two? Three") == "One.\nTwo?\nThree"


CHOOSING = {
    "d_model": 16,
    "layers": 2,
    "heads": 2,
    "max_positions": 16,
    "feed_forward": {"kind": "sparse", "d_ff": 32, "block_size": 8, "rank": 4},
    "vocabulary": {"kind": "dense", "size": SYMBOLS + 2},
    "encoder": {"layers": 1, "max_positions": 16},
}
PREFIX = {
    "residual": "reversible",
    "attention": {"projection": "multiplicative_conv"},
    "sru": {"width": 4},
    "encoder": {**CHOOSING["encoder"], "read_by": {"kind": "prefix"}},
}


@pytest.mark.parametrize("change", [{}, PREFIX, {**PREFIX, "feed_forward_chunk": 5}])
def test_choices_at_padding_do_not_count(change: dict) -> None:
    torch.manual_seed(0)
    network = build_network(ModelSpec.model_validate({**CHOOSING, **change}), eos_token_id=1, pad_token_id=0)
    alone = evaluate(network, PAIRS, 1.0, batch_size=1)
    together = evaluate(network, PAIRS, 1.0, batch_size=4)
    assert 0 < together.never_chosen < 1
    assert together.never_chosen == alone.never_chosen
    assert together.balance == pytest.approx(alone.balance, rel=1e-12)
    assert together.nats_per_token == pytest.approx(alone.nats_per_token, rel=1e-5)
