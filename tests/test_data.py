"""Corpora and packed streams."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from pydantic import TypeAdapter

from sparsecli.console import Failure
from sparsecli.data import corpus, packing
from sparsecli.data.cache import cache_folder, write_folder
from sparsecli.data.corpus import read_documents
from sparsecli.data.packing import pack
from sparsecli.data.tokenization import END_OF_TEXT, encode, train_byte_pairs
from sparsecli.recipe.data import DataSpec, FilesCorpus

BPE = {"kind": "bpe", "vocabulary_size": 300}
_sink = pyarrow.BufferOutputStream()
pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), _sink)
EMPTY_PARQUET = _sink.getvalue().to_pybytes()


def spec(source: str = "files", **fields: object) -> DataSpec:
    return TypeAdapter(DataSpec).validate_python({"source": source, "tokenizer": BPE, **fields})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty short text files, with the cache beside them."""
    monkeypatch.setenv("SPARSECLI_CACHE", str(tmp_path / "cache"))
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(
            f"Document {number}: {'the cat sat on the mat. ' * (number + 3)}\n"
        )
    return texts


# -- corpus --------------------------------------------------------------------------------------------------


def test_split_depends_on_content_alone(folder: Path) -> None:
    data = spec(paths=[f"{folder}/*.txt"], held_out_fraction=0.3)
    first = read_documents(data)
    assert len(first.train) + len(first.held_out) == 40
    assert 4 <= len(first.held_out) <= 20
    for path in list(folder.iterdir()):
        path.rename(folder / f"renamed-{99 - int(path.stem)}.txt")
    again = read_documents(data)
    assert set(again.held_out) == set(first.held_out)
    assert set(again.train) == set(first.train)


def test_repetitions_and_empty_documents_are_dropped(folder: Path) -> None:
    (folder / "copy.txt").write_bytes((folder / "3.txt").read_bytes())
    (folder / "empty.txt").write_text(" \n")
    splits = read_documents(spec(paths=[f"{folder}/*.txt"]))
    assert len(splits.train) + len(splits.held_out) == 40


def test_a_few_documents_still_leave_one_held_out(folder: Path) -> None:
    splits = read_documents(spec(paths=[f"{folder}/1.txt", f"{folder}/2.txt"], held_out_fraction=1e-9))
    assert (len(splits.train), len(splits.held_out)) == (1, 1)


def test_a_lone_document_is_cut_at_a_line(tmp_path: Path) -> None:
    text = "".join(f"line {number}\r\n" for number in range(100))
    (tmp_path / "book.txt").write_bytes(text.encode())
    splits = read_documents(spec(paths=[str(tmp_path / "book.txt")], held_out_fraction=0.2))
    assert splits.train[0] + splits.held_out[0] == text
    assert splits.train[0].endswith("\n")
    assert len(splits.held_out[0]) == pytest.approx(0.2 * len(text), rel=0.1)


def test_held_out_paths_never_meet_the_training_text(folder: Path) -> None:
    splits = read_documents(spec(paths=[f"{folder}/**"], held_out_paths=[f"{folder}/7.txt"]))
    assert splits.held_out == [(folder / "7.txt").read_text()]
    assert len(splits.train) == 39


def test_everything_held_out_is_a_failure(folder: Path) -> None:
    with pytest.raises(Failure, match="the training split has no text"):
        read_documents(spec(paths=[f"{folder}/7.txt"], held_out_paths=[f"{folder}/*.txt"]))


@pytest.mark.parametrize(
    "suffix", ["jsonl", "ndjson", "json", "parquet", "arrow", "csv", "tsv", "jsonl.gz", "csv.bz2", "TSV.xz"]
)
def test_rows_are_documents(tmp_path: Path, suffix: str) -> None:
    import pandas

    texts = [f"row {number}\nwith 'quotes', commas and ünïcode" for number in range(30)]
    frame = pandas.DataFrame({"body": [*texts, None], "id": range(31)})
    path = tmp_path / f"rows.{suffix}"
    kind = suffix.lower().split(".")[0]
    if kind in ("jsonl", "ndjson", "json"):
        frame.to_json(path, orient="records", lines=kind != "json")
    elif kind == "parquet":
        frame.to_parquet(path)
    elif kind == "arrow":
        table = pyarrow.Table.from_pandas(frame)
        with pyarrow.ipc.new_stream(path, table.schema) as file:
            file.write_table(table)
    else:
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    splits = read_documents(spec(paths=[str(path)], text_field="body", held_out_fraction=0.3))
    assert sorted(splits.train + splits.held_out) == sorted(texts)
    with pytest.raises(Failure, match=r"no column 'text'; it has body, id"):
        read_documents(spec(paths=[str(path)]))
    with pytest.raises(Failure, match="column 'id' holds int, not text"):
        read_documents(spec(paths=[str(path)], text_field="id"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", b"caf\xe9", r"latin\.txt: not UTF-8 text \(byte 3\)"),
        (
            "broken.jsonl",
            b'{"text": "a"}\n{"text": ',
            r"broken\.jsonl:2: is not JSON: .*; every line must be an obj",
        ),
        ("lists.jsonl", b'{"text": "a"}\n\n["b"]\n', r"lists\.jsonl:3: is a list, not an object such as "),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', r"latin\.jsonl:1: byte 13 of the line is not UTF-8 text"),
        (
            "blank.jsonl",
            b'{"text": " "}\n{"text": null}\n',
            r"no row has text in column 'text' \(set data.text_f",
        ),
        ("broken.parquet", b"PAR1 no", r"broken\.parquet: cannot be read"),
        ("empty.txt", b"", "data: the source holds no text"),
        ("empty.jsonl", b"", r"empty\.jsonl: holds no rows"),
        ("empty.json", b"[]", r"empty\.json: holds no rows"),
        ("empty.csv", b"", r"empty\.csv: holds no rows"),
        ("header.tsv", b"text\tid\n", r"header\.tsv: holds no rows"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), r"empty\.jsonl\.gz: holds no rows"),
        ("empty.parquet", EMPTY_PARQUET, r"empty\.parquet: holds no rows"),
        (
            "broken.ndjson.gz",
            gzip.compress(b'{"text": "a"}\n{"text": ', mtime=0),
            r"broken\.ndjson\.gz:2: is not JSON: .*; every line must be an obj",
        ),
        ("noise.txt.gz", b"noise", r"noise\.txt\.gz: Not a gzipped file"),
        ("cut.txt.gz", gzip.compress(b"text", mtime=0)[:-9], r"cut\.txt\.gz: Compressed file ended before"),
        ("noise.jsonl.gz", b"noise", r"noise\.jsonl\.gz: cannot be read: Not a gzipped file"),
        ("latin.txt.xz", lzma.compress(b"caf\xe9"), r"latin\.txt\.xz: not UTF-8 text \(byte 3\)"),
        (
            "rows.xlsx",
            b"PK",
            r"rows\.xlsx: \.xlsx files are not supported; convert it, or leave it out \(supported:",
        ),
        ("texts.tar.gz", b"", r"texts\.tar\.gz: \.tar\.gz files are not supported"),
        ("rows.parquet.gz", b"", r"rows\.parquet\.gz: \.parquet\.gz files are not supported"),
    ],
)
def test_bad_files_are_named_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Failure, match=message) as caught:
        read_documents(spec(paths=[str(tmp_path / name)]))
    assert "\n" not in str(caught.value)
    assert "rror" not in capfd.readouterr().err  # nor does a library say it in its words


def test_zst_files_need_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is there, it opens them as the others' modules do."""
    monkeypatch.setattr(corpus, "find_spec", lambda name: None)
    for name in ("a.txt.zst", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(Failure, match=r"\.zst files need the package zstandard: pip install zstandard"):
            read_documents(spec(paths=[str(tmp_path / name)]))


def test_plain_text_is_read_without_its_mark_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marked = b"\xef\xbb\xbfone\n"
    (tmp_path / "a.txt").write_bytes(marked)
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(marked.replace(b"one", b"two")))
    splits = read_documents(spec(paths=[f"{tmp_path}/*"]))
    assert sorted(splits.train + splits.held_out) == ["one\n", "two\n"]
    assert capsys.readouterr().err == ""
    for name in ("c.log", "d.LOG", "e"):
        (tmp_path / name).write_bytes(name.encode())
    splits = read_documents(spec(paths=[f"{tmp_path}/*"]))
    assert len(splits.train + splits.held_out) == 5
    told = "data.paths: reading as plain text, one document per file: .log (2), no ending (1)\n"
    assert capsys.readouterr().err == told


def test_patterns_that_match_nothing(folder: Path) -> None:
    with pytest.raises(Failure, match=r"data\.paths: no file matches .*\.rst"):
        read_documents(spec(paths=[f"{folder}/*.rst"]))
    with pytest.raises(Failure, match=r"data\.held_out_paths: .*for the files of this folder write .*/\*\*"):
        read_documents(spec(paths=[f"{folder}/*.txt"], held_out_paths=[str(folder)]))


def test_standard_library_leaves_installed_packages_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("os.py", "json/decoder.py", "site-packages/torch.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    splits = read_documents(spec("stdlib"))
    assert sorted(splits.train + splits.held_out) == ["# json/decoder.py\n", "# os.py\n"]


def test_packages_are_trained_on_and_never_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, packages = tmp_path / "library", tmp_path / "site-packages"
    for name in [*(f"library/{number}.py" for number in range(20)), "site-packages/more/sub/a.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(library))
    alone = read_documents(spec("stdlib", held_out_fraction=0.3))
    assert alone.held_out
    (packages / "more" / "__init__.py").write_text(alone.held_out[0])
    monkeypatch.syspath_prepend(packages)
    both = read_documents(spec("stdlib", held_out_fraction=0.3, packages=["more"]))
    assert both.held_out == alone.held_out
    assert both.train == [*alone.train, "# site-packages/more/sub/a.py\n"]
    with pytest.raises(
        Failure, match=r"data.packages: json is part of the standard library, which is always read"
    ):
        read_documents(spec("stdlib", packages=["json"]))
    for name in ("less", "no.name", "json.decoder", "__main__"):
        with pytest.raises(Failure, match=f"data.packages: no package {name} is installed"):
            read_documents(spec("stdlib", packages=[name]))


def test_hub_reads_only_so_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, object] = {}

    def load_dataset(path: str, **arguments: object) -> list[dict[str, str]]:
        asked.update(arguments, path=path)
        return [{"content": f"row {number}"} for number in range(1000)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    fields = {"name": "some/set", "subset": "en", "revision": "abc", "split": "test", "text_field": "content"}
    splits = read_documents(spec("hub", streaming=True, max_documents=50, **fields))
    assert len(splits.train) + len(splits.held_out) == 50
    assert asked == {
        "path": "some/set", "name": "en", "revision": "abc", "split": "test", "streaming": True
    }  # fmt: skip


def test_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(path: str, **arguments: object) -> None:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub\nlong explanation")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        Failure, match=r"^dataset no/such: cannot be read: Couldn't reach 'no/such' on the Hub$"
    ):
        read_documents(spec("hub", name="no/such"))


# -- packing -------------------------------------------------------------------------------------------------

TOKENIZER = train_byte_pairs(300, ["the cat sat on the mat, the cat sat on the mat"] * 4)


def test_streams_hold_every_document_and_its_end(folder: Path) -> None:
    data = spec(paths=[f"{folder}/*.txt"], held_out_fraction=0.2)
    packed, splits = pack(data), read_documents(data)
    for stream, documents in ((packed.train, splits.train), (packed.held_out, splits.held_out)):
        assert stream.tokens.dtype == np.uint16
        assert packed.tokenizer.decode(stream.tokens.tolist()) == "".join(
            f"{text}{END_OF_TEXT}" for text in documents
        )


def test_second_call_maps_what_the_first_packed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = spec(paths=[f"{folder}/*.txt"])
    first = pack(data)
    monkeypatch.setattr(packing, "encode", lambda *_: pytest.fail("packed again"))
    assert pack(data).fingerprint == first.fingerprint
    monkeypatch.undo()


def test_changed_text_or_vocabulary_changes_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "elsewhere"
    prints = {pack(spec(paths=[f"{folder}/*.txt"]), cache).fingerprint}
    prints.add(pack(spec(paths=[f"{folder}/*.txt"], held_out_fraction=0.5), cache).fingerprint)
    prints.add(
        pack(spec(paths=[f"{folder}/*.txt"], tokenizer={**BPE, "vocabulary_size": 260}), cache).fingerprint
    )
    (folder / "3.txt").write_text("something else")
    prints.add(pack(spec(paths=[f"{folder}/*.txt"]), cache).fingerprint)
    assert len(prints) == 4
    assert not list(cache.glob("*.tmp"))


@pytest.mark.parametrize("file", ["train.bin", "held_out.bin", "index.json"])
def test_truncated_cache_is_rebuilt(
    folder: Path, tmp_path: Path, file: str, capsys: pytest.CaptureFixture
) -> None:
    data = spec(paths=[f"{folder}/*.txt"])
    whole = pack(data)
    expected = whole.train.tokens.tolist()
    path = next((tmp_path / "cache").glob(f"packed-*/{file}"))
    path.write_bytes(path.read_bytes()[:-1])
    again = pack(data)
    assert again.train.tokens.tolist() == expected
    assert "packing again" in capsys.readouterr().err
    assert json.loads((path.parent / "index.json").read_text())["train"]["length"] == len(expected)


def test_damaged_tokenizer_in_the_cache_is_trained_again(folder: Path, tmp_path: Path) -> None:
    data = spec(paths=[f"{folder}/*.txt"])
    expected = pack(data).tokenizer.get_vocab()
    path = next((tmp_path / "cache").glob("tokenizer-*/tokenizer.json"))
    path.write_bytes(path.read_bytes()[:100])
    assert pack(data).tokenizer.get_vocab() == expected


def test_unwritable_cache_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSECLI_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(Failure, match=r"the cache cannot be written .*set SPARSECLI_CACHE"):
        pack(spec(paths=[f"{folder}/*.txt"]))


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def fill(beside: Path) -> None:
        (beside / "part").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(Failure, match="cannot be written: No space left on device"):
        write_folder(cache_folder(tmp_path) / "key", fill)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["tokenizers", "safetensors", "torch"])
def test_a_disk_that_fills_up_is_one_line_whatever_writes(tmp_path: Path, library: str) -> None:
    import resource

    from safetensors.torch import save_file

    writers = {
        "tokenizers": lambda beside: TOKENIZER.save_pretrained(beside),
        "safetensors": lambda beside: save_file({"a": torch.zeros(4096)}, beside / "a.safetensors"),
        "torch": lambda beside: torch.save(torch.zeros(4096), beside / "a.pt"),
    }
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        with pytest.raises(Failure, match=r"key: cannot be written: (File too large|not all data)") as caught:
            write_folder(tmp_path / "key", writers[library])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in caught.value.message
    assert not list(tmp_path.iterdir())


def test_windows_cover_the_stream_in_order() -> None:
    stream = packing.TokenStream(np.arange(103, dtype=np.uint16))
    windows = stream.windows(10)
    assert len(windows) == 10
    assert torch.cat([windows[index]["input_ids"] for index in range(10)]).tolist() == list(range(100))
    assert torch.equal(windows[3]["labels"], windows[3]["input_ids"])
    assert windows[0]["input_ids"].dtype == torch.int64
    with pytest.raises(IndexError):
        windows[10]
    assert len(stream.windows(10, limit_tokens=35)) == 3
    assert len(stream.windows(10, limit_tokens=1)) == 1
    with pytest.raises(Failure, match="103 tokens does not fill one window of 200"):
        stream.windows(200)


def test_windows_without_some() -> None:
    ids = np.arange(1, 41, dtype=np.uint16)
    windows = packing.TokenStream(ids).windows(10, beginning=[7])
    rest = windows.without([1, 3])
    assert (len(windows), len(rest)) == (4, 2)
    assert [rest[index]["input_ids"].tolist() for index in range(2)] == [
        [7, *range(1, 10)],
        [7, *range(19, 28)],
    ]
    [last] = [window["input_ids"].tolist() for window in rest.without([0])]
    assert last == [7, *range(19, 28)]


@pytest.mark.parametrize("limit_tokens", [None, 40, 160, 161])
def test_bytes_per_token_are_those_of_the_windows(limit_tokens: int | None) -> None:
    """Documents that differ in bytes per token: the rate of the whole stream is not that of its first part."""
    documents = ["", "the cat sat on the mat, " * 9, "Ωμέγα " * 12, "", "the cat", "xyzzy XYZZY " * 20]
    ids, sizes = [], []  # and the bytes of each token: a character of the byte-level alphabet stands for one
    for document in encode(TOKENIZER, documents):
        ids += [*document, TOKENIZER.eos_token_id]
        sizes += [*map(len, TOKENIZER.convert_ids_to_tokens(document)), 0]
    assert sum(sizes) == sum(len(text.encode()) for text in documents)
    windows = packing.TokenStream(np.array(ids, dtype=np.uint16)).windows(8, limit_tokens)
    tokens = len(windows) * 8
    cut = TOKENIZER.decode(ids[:tokens]).endswith("\N{REPLACEMENT CHARACTER}")
    error = (windows.bytes_per_token(TOKENIZER) - sum(sizes[:tokens]) / tokens) * tokens
    assert error == pytest.approx(1 if cut else 0, abs=1e-9)  # a cut Greek letter: three bytes, not one
    if limit_tokens:
        assert abs(windows.bytes_per_token(TOKENIZER) - sum(sizes) / len(sizes)) > 0.05


def test_large_vocabularies_need_wider_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(TOKENIZER), "__len__", lambda self: 70_000)
    packed = pack(spec(paths=[f"{folder}/*.txt"]))
    assert packed.train.tokens.dtype == np.uint32


def test_spec_helper_builds_the_right_union() -> None:
    assert isinstance(spec(paths=["-"]), FilesCorpus)
