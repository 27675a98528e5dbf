"""Sources and targets: docstrings, columns, corrupted text; packing and batches."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_texts import spec

from sparsecli.console import Failure
from sparsecli.data import packing
from sparsecli.data.corruption import corrupt
from sparsecli.data.ordering import SimilarLengths
from sparsecli.data.pairs import docstring_pairs
from sparsecli.data.preparation import prepare
from sparsecli.data.tokenization import sentinel
from sparsecli.recipe.data import CorruptedPairs

pytestmark = pytest.mark.usefixtures("own_cache")


# -- docstrings ----------------------------------------------------------------------------------------------

MODULE = '''
class Stack:
    """A class is no function."""

    @property
    def top(self):
        """Return the last item put in.

        Raises IndexError when empty.
        """
        # the newest one
        return self.items[-1]

    async def wait(self): \n        "Wait for an item."
        text = """
at the margin
        """
        return text

def outer(path,
          mode="r"):
    \'\'\'Open a file twice.\'\'\'
    def inner(file):
        """Read what there is."""
        return file.read()
    return inner

def one_line(): "Say that it is one line."; return 1
def abstract(self):
    """Do nothing at all here."""
    pass
def example():
    """>>> import this and that
    """
    return 1
def terse():
    """Too short."""
    return 1
def undocumented():
    return 1
'''


def test_functions_and_the_first_lines_of_their_docstrings() -> None:
    pairs = {pair.target: pair.source for pair in docstring_pairs(MODULE)}
    assert pairs == {
        "Return the last item put in.": "def top(self):\n    # the newest one\n    return self.items[-1]",
        "Wait for an item.": (
            'async def wait(self): \n    text = """\nat the margin\n    """\n    return text'
        ),
        "Open a file twice.": (
            'def outer(path,\n          mode="r"):\n    def inner(file):\n        """Read what there is."""\n'
            "        return file.read()\n    return inner"
        ),
        "Read what there is.": "def inner(file):\n    return file.read()",
    }


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_of_other_systems_change_nothing(end: str) -> None:
    assert list(docstring_pairs(MODULE.replace("\n", end))) == list(docstring_pairs(MODULE))


def test_a_docstring_that_is_cut_out_was_all_that_told_the_target() -> None:
    for pair in docstring_pairs(MODULE):
        assert pair.target not in pair.source


@pytest.mark.parametrize("text", ["def broken(:", "no python at all", "\0", "(" * 500, ""])
def test_text_that_is_no_python_has_no_pairs(text: str) -> None:
    assert list(docstring_pairs(text)) == []


def module(number: int) -> str:
    return dedent(f'''
        def shared():
            """Return the same everywhere."""
            return None

        def number_{number}(value):
            """Return the value plus {number}."""
            return value + {number}
    ''')


def test_functions_of_a_file_are_in_one_split_and_no_source_in_both(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.py").write_text(module(number))
    data = spec("files", {"kind": "docstrings"}, paths=[f"{tmp_path}/*.py"], held_out_fraction=0.4)
    prepared = prepare(data)
    split = {
        name: [prepared.tokenizer.decode(part.pair(i)[0], skip_special_tokens=True) for i in range(len(part))]
        for name, part in (("train", prepared.train), ("held_out", prepared.held_out))
    }
    assert len(split["train"]) + len(split["held_out"]) == 31
    assert sum("shared" in source for source in split["train"]) == 1
    assert not any("shared" in source for source in split["held_out"])
    order = [source.partition("(")[0] for source in split["held_out"]]
    assert order != sorted(order)


def test_text_without_functions_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain words\nand more of them\n")
    with pytest.raises(
        Failure, match=r"data\.pairs: the text to train on contains no pair of kind docstrings"
    ):
        prepare(spec("files", {"kind": "docstrings"}, paths=[f"{tmp_path}/*.txt"]))


# -- columns -------------------------------------------------------------------------------------------------


def rows(path: Path, count: int, **more: object) -> None:
    written = [{"article": f"long text {n} " * 9, "abstract": f"summary {n}", **more} for n in range(count)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in written))


FIELDS = {"kind": "fields", "input": "article", "target": "abstract", "source_length": 12, "target_length": 9}


def test_columns_are_cut_to_their_lengths_and_ended(tmp_path: Path) -> None:
    rows(tmp_path / "rows.jsonl", 20)
    prepared = prepare(spec("files", FIELDS, paths=[str(tmp_path / "rows.jsonl")], held_out_fraction=0.3))
    assert len(prepared.train) + len(prepared.held_out) == 20
    example = prepared.train[0]
    assert len(example["input_ids"]) == 12
    assert example["input_ids"][-1] == example["labels"][-1] == 1
    assert prepared.tokenizer.decode(example["labels"]).startswith("summary")


def test_rows_without_both_texts_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    rows(path, 9)
    with path.open("a") as file:
        file.write('{"article": "a", "abstract": null}\n{"article": " ", "abstract": "b"}\n')
        file.write('{"article": "no abstract"}\n')
    prepared = prepare(spec("files", FIELDS, paths=[str(path)], held_out_fraction=0.3))
    assert len(prepared.train) + len(prepared.held_out) == 9
    told = f"{path}: 3 of 12 rows are left out: they have no text in 'abstract' (2), 'article' (1)"
    assert capsys.readouterr().err.splitlines().count(told) == 1


def test_a_column_without_any_text_is_named(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", 3, abstract="")
    rows(tmp_path / "b.jsonl", 2, abstract=" ")
    message = r"a\.jsonl and 1 more: no row has text in column 'abstract' \(set data\.pairs\.target\)$"
    with pytest.raises(Failure, match=message):
        prepare(spec("files", FIELDS, paths=[f"{tmp_path}/*.jsonl"]))


def test_held_out_files_never_meet_the_training_pairs(tmp_path: Path) -> None:
    rows(tmp_path / "train.jsonl", 20)
    rows(tmp_path / "test.jsonl", 3)
    paths = {"paths": [str(tmp_path / "train.jsonl")], "held_out_paths": [str(tmp_path / "test.jsonl")]}
    prepared = prepare(spec("files", FIELDS, **paths))
    assert (len(prepared.train), len(prepared.held_out)) == (17, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"input": "text"},
            r"no column 'text'; it has abstract, article, size \(set data\.pairs\.input\)",
        ),
        ({"target": "summary"}, r"no column 'summary'; .* \(set data\.pairs\.target\)"),
        ({"target": "size"}, "column 'size' holds int, not text"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, change: dict[str, str], message: str) -> None:
    rows(tmp_path / "rows.jsonl", 3, size=1)
    with pytest.raises(Failure, match=message) as caught:
        prepare(spec("files", {**FIELDS, **change}, paths=[str(tmp_path / "rows.jsonl")]))
    assert "\n" not in caught.value.message


def test_text_files_have_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(Failure, match=r"a\.txt: has no columns; pairs need \.jsonl"):
        prepare(spec("files", FIELDS, paths=[f"{tmp_path}/*.txt"]))


def test_hub_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(path: str, **arguments: object) -> list[dict[str, str]]:
        first = {"train": 0, "validation": 15}[str(arguments["split"])]
        return [{"article": f"text {n}", "abstract": f"summary {n}"} for n in range(first, first + 20)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    fields = {"name": "some/set", "held_out_split": "validation", "max_documents": 18}
    prepared = prepare(spec("hub", FIELDS, **fields))
    assert (len(prepared.train), len(prepared.held_out)) == (
        15,
        18,
    )  # three of the training split are held out


def test_second_call_maps_what_the_first_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(tmp_path / "rows.jsonl", 20)
    data = spec("files", FIELDS, paths=[str(tmp_path / "rows.jsonl")])
    first = prepare(data)
    monkeypatch.setattr(packing, "make_pairs", lambda *_: pytest.fail("packed again"))
    again = prepare(data)
    assert again.fingerprint == first.fingerprint
    assert torch.equal(again.train[3]["input_ids"], first.train[3]["input_ids"])
    monkeypatch.undo()
    shorter = prepare(spec("files", {**FIELDS, "source_length": 8}, paths=[str(tmp_path / "rows.jsonl")]))
    assert shorter.fingerprint != first.fingerprint


def test_held_out_tokens_are_those_of_targets(tmp_path: Path) -> None:
    rows(tmp_path / "rows.jsonl", 40)
    fields = {"paths": [str(tmp_path / "rows.jsonl")], "held_out_fraction": 0.5}
    whole = prepare(spec("files", FIELDS, **fields)).held_out
    for limit in (1, 30):
        some = prepare(spec("files", FIELDS, held_out_tokens=limit, **fields)).held_out
        tokens = sum(len(some[index]["labels"]) for index in range(len(some)))
        assert len(some) == 1 or tokens <= limit < tokens + len(whole[len(some)]["labels"])
        assert torch.equal(some[0]["labels"], whole[0]["labels"])


# -- corruption ----------------------------------------------------------------------------------------------


def test_counts_are_those_of_t5() -> None:
    counts = CorruptedPairs(kind="corrupted", source_length=512, target_length=114).counts()
    assert counts == (568, 85, 28)  # 512 tokens of source; 114 of target


@settings(deadline=None, max_examples=100)
@given(st.integers(4, 300), st.floats(0.01, 0.99), st.floats(1, 9), st.integers(0, 2**31), st.integers(0, 99))
def test_corrupted_text_has_exact_counts_and_loses_nothing(
    length: int, noise: float, mean_span: float, seed: int, first: int
) -> None:
    pairs = CorruptedPairs(
        kind="corrupted", source_length=length, target_length=10**6, noise=noise, mean_span=mean_span
    )
    window, hidden, spans = counts = pairs.counts()
    tokens = np.arange(1000 + first, 1000 + first + window)
    sentinels = range(2, 2 + spans)
    source, target = corrupt(tokens, counts, sentinels, np.random.default_rng(seed))
    assert len(source) == window - hidden + spans + 1 <= length
    assert len(target) == hidden + spans + 1
    assert source[-1] == target[-1] == 1
    assert source[0] == tokens[0]
    assert [token for token in source if token < 1000] == [*sentinels, 1]
    assert [token for token in target if token < 1000] == [*sentinels, 1]
    # Putting each span in the place of its sentinel gives the text again.
    texts = np.split(target[:-1], np.flatnonzero(target[:-1] < 1000))[1:]
    assert all(len(text) > 1 for text in texts)
    places = {int(text[0]): text[1:] for text in texts}
    restored = [places.get(int(token), np.array([token])) for token in source[:-1]]
    assert np.array_equal(np.concatenate(restored), tokens)


def test_every_cut_is_equally_likely() -> None:
    counts = CorruptedPairs(kind="corrupted", source_length=10, noise=0.45, mean_span=2.5).counts()
    assert counts == (13, 6, 2)
    tokens = np.arange(100, 113)
    targets = [corrupt(tokens, counts, [2, 3], np.random.default_rng(seed))[1] for seed in range(800)]
    lengths = [int(np.flatnonzero(target == 3)[0]) - 1 for target in targets]  # of the first span, 1 to 5
    assert [lengths.count(length) for length in range(1, 6)] == pytest.approx([160] * 5, abs=40)


def test_windows_are_corrupted_the_same_way_every_time(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"the cat {number} sat on the mat. " * 40)
    data = spec("files", {"kind": "corrupted", "source_length": 40}, paths=[f"{tmp_path}/*.txt"])
    one, two = prepare(data), prepare(data)
    assert torch.equal(one.train[1]["input_ids"], two.train[1]["input_ids"])
    kinds = [
        (example["input_ids"] == 2).nonzero()[0].item() for example in map(one.train.__getitem__, range(9))
    ]
    assert len(set(kinds)) > 2  # not all windows in the same places
    known = {sentinel(index) for index in range(data.pairs.counts().spans)}
    assert known <= set(one.tokenizer.all_special_tokens)
    few = prepare(data.model_copy(update={"held_out_tokens": 1})).held_out
    assert len(few) == 1
    with pytest.raises(Failure, match="tokens held out do not fill one window of 9999"):
        prepare(spec("files", {"kind": "corrupted", "source_length": 9000, "target_length": 9000},
                     paths=[f"{tmp_path}/*.txt"]))  # fmt: skip


# -- batches -------------------------------------------------------------------------------------------------


def test_batches_are_padded_on_the_right_and_padding_is_not_predicted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = [("a", "a b c d"), ("a b c d e f", "b"), ("c c c", "c c")]
    path.write_text(
        "".join(f"{json.dumps({'input': source, 'target': target})}\n" for source, target in texts * 9)
    )
    examples = prepare(spec("files", {"kind": "fields"}, paths=[str(path)], held_out_fraction=0.01)).train
    batch = examples.collate([examples[0], examples[1]])
    lengths = [len(examples[index]["input_ids"]) for index in (0, 1)]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert torch.equal(batch["input_ids"] == 0, batch["attention_mask"] == 0)
    targets = [len(examples[index]["labels"]) for index in (0, 1)]
    assert (batch["labels"] == -100).sum().item() == 2 * max(targets) - sum(targets)
    assert examples.predicted(batch) == sum(targets)
    with pytest.raises(IndexError):
        examples[2]


def test_bytes_per_token_are_those_of_the_targets(tmp_path: Path) -> None:
    rows(tmp_path / "rows.jsonl", 20)
    prepared = prepare(spec("files", {**FIELDS, "target_length": 99}, paths=[str(tmp_path / "rows.jsonl")]))
    texts = [
        prepared.tokenizer.decode(prepared.train[i]["labels"], skip_special_tokens=True) for i in range(9)
    ]
    assert all(text.startswith("summary ") for text in texts)
    tokens = sum(len(prepared.train[index]["labels"]) for index in range(len(prepared.train)))
    size = sum(
        len(prepared.tokenizer.decode(prepared.train[index]["labels"][:-1]).encode())
        for index in range(len(prepared.train))
    )
    assert prepared.train.bytes_per_token(prepared.tokenizer) == pytest.approx(size / tokens)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=900), st.integers(1, 9), st.integers(0, 99))
def test_similar_lengths_are_together_and_every_example_comes_once(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    order = SimilarLengths(np.array(lengths), batch_size, seed)
    assert sorted(order) == list(range(len(lengths)))
    assert list(order) == list(SimilarLengths(np.array(lengths), batch_size, seed))


def test_batches_of_similar_lengths_pad_little_and_change_with_the_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 2000)
    order = SimilarLengths(lengths, 8, seed=3)
    first = np.array(list(order))
    order.set_epoch(1)
    second = np.array(list(order))
    assert not np.array_equal(first, second)
    for indices in (first, second):
        batches = lengths[indices].reshape(-1, 8)
        assert batches.max(1).sum() * 8 < 1.1 * lengths.sum()
        assert (
            np.corrcoef(batches[:-1].max(1), batches[1:].max(1))[0, 1] < 0.3
        )  # long ones are not all at the end
