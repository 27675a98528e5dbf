"""Random symbols and tokens, to be written again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from small_texts import spec

from sparsecli.data.copying import prepare_copies
from sparsecli.data.preparation import prepare
from sparsecli.recipe.data import CopiedPairs, CopyTask

pytestmark = pytest.mark.usefixtures("own_cache")


def test_copies_are_the_same_every_time_and_different_everywhere() -> None:
    task = CopyTask(source="copy", symbols=50, length=20, examples=100, held_out=40)
    prepared = prepare_copies(task)
    assert (len(prepared.train), len(prepared.held_out)) == (100, 40)
    examples = [part[index] for part in (prepared.train, prepared.held_out) for index in range(40)]
    assert len({tuple(example["input_ids"].tolist()) for example in examples}) == 80
    for example in examples:
        assert torch.equal(example["input_ids"], example["labels"])
        assert len(example["input_ids"]) == 21
        assert example["input_ids"][-1] == 1
        assert example["input_ids"][:-1].min() >= 2
        assert example["input_ids"].max() < 52
    assert torch.equal(prepared.train[7]["labels"], prepare_copies(task).train[7]["labels"])
    assert prepared.train.bytes_per_token(prepared.tokenizer) > 2


def test_copied_tokens_are_all_but_special_ones_in_all_lengths(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"the {number} cats sat on {number} mats\n" * 20)
    pairs = {"kind": "copied", "shortest": 3, "source_length": 9, "target_length": 9}
    data = spec("files", pairs, paths=[str(tmp_path / "*.txt")], held_out_tokens=100)
    prepared = prepare(data)
    examples = [prepared.train[index] for index in range(400)]
    assert {len(example["input_ids"]) for example in examples} == set(range(4, 10))
    assert all(torch.equal(example["input_ids"], example["labels"]) for example in examples)
    assert all(example["labels"][-1] == 1 for example in examples)
    drawn = torch.cat([example["labels"][:-1] for example in examples])
    assert set(drawn.tolist()) == set(range(2, len(prepared.tokenizer)))
    assert len(prepared.held_out) == 11
    assert all(
        not torch.equal(prepared.held_out[n]["labels"], prepared.train[n]["labels"]) for n in range(11)
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shortest": 9, "source_length": 9}, "9 tokens and the end token are more than source_length 9"),
        ({"source_length": 9, "target_length": 8}, "8 is less than source_length 9"),
    ],
)
def test_copied_tokens_that_do_not_fit(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CopiedPairs(kind="copied", **fields)


def test_too_few_different_sequences_to_hold_some_out() -> None:
    with pytest.raises(
        ValidationError, match="2 symbols make 1,024 sequences of 10, too few for a held-out split"
    ):
        CopyTask(source="copy", symbols=2, length=10, examples=100, held_out=4)
    assert CopyTask(source="copy", symbols=2, length=10, examples=1, held_out=1)


def test_symbols_are_numbers() -> None:
    tokenizer = prepare_copies(CopyTask(source="copy", symbols=50)).tokenizer
    assert tokenizer("0 49 7")["input_ids"] == [2, 51, 9, 1]
    assert tokenizer.decode([2, 51, 9, 1], skip_special_tokens=True) == "0 49 7"
