"""Tokenizers that are trained or loaded: any text comes back, and pairs have their padding and ends."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from tokenizers.processors import TemplateProcessing

from sparsecli.console import Failure
from sparsecli.data import tokenization
from sparsecli.data.copying import symbol_tokenizer
from sparsecli.data.tokenization import (
    END_OF_TEXT,
    PAIR_TOKENS,
    beginning,
    encode,
    load_or_train,
    sentinel,
    train_byte_pairs,
)
from sparsecli.recipe.data import DataSpec

BPE = {"kind": "bpe", "vocabulary_size": 300}


def spec(source: str = "files", **fields: object) -> DataSpec:
    return TypeAdapter(DataSpec).validate_python({"source": source, "tokenizer": BPE, **fields})


TOKENIZER = train_byte_pairs(300, ["the cat sat on the mat, the cat sat on the mat"] * 4)


@settings(deadline=None, max_examples=150)
@given(st.text())
def test_any_text_comes_back_exactly(text: str) -> None:
    assert TOKENIZER.decode(next(encode(TOKENIZER, [text]))) == text
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_long_documents_are_encoded_in_pieces_that_end_with_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(f"line {number} of the mat\n" for number in range(40))
    documents = ["the cat", "sat", lines, "on", "", "the mat"]
    whole = list(encode(TOKENIZER, documents))
    read: list[str] = []
    read_at_once = tokenization._encode

    def note(tokenizer: object, texts: list[str]) -> list[list[int]]:
        read.extend(texts)
        assert sum(map(len, texts)) <= 100
        return read_at_once(tokenizer, texts)

    monkeypatch.setattr(tokenization, "PIECE", 100)
    monkeypatch.setattr(tokenization, "_encode", note)
    assert list(encode(TOKENIZER, documents)) == whole  # no token crosses the end of these lines
    assert "".join(read) == "".join(documents)
    assert all(piece.endswith("\n") for piece in read[2:-3])
    unbroken = "the cat sat on the mat, " * 9
    assert TOKENIZER.decode(next(encode(TOKENIZER, [unbroken]))) == unbroken
    assert list(encode(TOKENIZER, [])) == []


def test_control_text_in_a_document_stays_text() -> None:
    ids = next(encode(TOKENIZER, [f"a{END_OF_TEXT}b"]))
    assert TOKENIZER.eos_token_id not in ids
    assert TOKENIZER.decode(ids) == f"a{END_OF_TEXT}b"


def test_what_a_tokenizer_puts_before_a_text_is_found(tmp_path: Path) -> None:
    assert beginning(TOKENIZER) == []
    assert beginning(PAIRED) == []  # its end token comes behind
    llama = copy.deepcopy(PAIRED)
    llama.backend_tokenizer.post_processor = TemplateProcessing(
        single="<extra_id_0> $A </s>", special_tokens=[("<extra_id_0>", 2), ("</s>", 1)]
    )
    assert beginning(llama) == [2]


def test_split_names_have_the_words_of_a_sentence() -> None:
    documents = ["def read_text(self): Read the text, readText, READ"] * 4
    tokenizer = train_byte_pairs(300, documents, split_names=True)
    assert tokenizer.tokenize("read_text") == ["read", "_", "text"]
    assert tokenizer.tokenize("read the text") == ["read", "Ġ", "the", "Ġ", "text"]
    assert tokenizer.tokenize("readText42") == ["read", "Text", "4", "2"]
    for text in (*documents, "naïve Größe\t\n  x+=1\r\n日本語 ՙ\u0301🙂"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_byte_pairs_are_learned_and_the_same_every_time() -> None:
    documents = [f"{number} the cat sat on the mat" for number in range(50)]
    one, two = (train_byte_pairs(290, documents).backend_tokenizer.to_str() for _ in range(2))
    assert one == two
    assert len(TOKENIZER) > 257
    assert len(next(encode(TOKENIZER, ["the cat sat"]))) < 11
    assert TOKENIZER.bos_token_id == TOKENIZER.eos_token_id == TOKENIZER.pad_token_id


def test_each_way_to_split_words_has_a_place_of_its_own_in_the_cache(tmp_path: Path) -> None:
    documents = ["read the text"] * 4
    split = spec(paths=["-"], tokenizer={**BPE, "split_names": True})
    plain, apart = (load_or_train(data, documents, tmp_path) for data in (spec(paths=["-"]), split))
    assert plain.tokenize("read the") == ["read", "Ġthe"]
    assert apart.tokenize("read the") == ["read", "Ġ", "the"]


def test_a_tokenizer_that_knows_nothing_of_the_text(tmp_path: Path) -> None:
    symbol_tokenizer(10).save_pretrained(tmp_path)
    data = spec("stdlib", pairs={"kind": "docstrings"}, tokenizer={"kind": "saved", "path": str(tmp_path)})
    with pytest.raises(
        Failure, match=r"data\.tokenizer\.path: the tokenizer knows 2 of the first 6 words of the"
    ):
        load_or_train(data, ["def f(1):", "return 1 + 1"])
    load_or_train(data, ["1 2 3", "4 5 six"])


def test_saved_tokenizer_of_a_folder_or_a_run(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path / "run" / "model")
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        data = spec(paths=["-"], tokenizer={"kind": "saved", "path": str(path)})
        loaded = load_or_train(data, [])
        assert loaded.get_vocab() == TOKENIZER.get_vocab()
        assert loaded.eos_token == END_OF_TEXT


def test_tokenizers_that_cannot_be_loaded(tmp_path: Path) -> None:
    data = spec(paths=["-"], tokenizer={"kind": "saved", "path": str(tmp_path / "none")})
    with pytest.raises(Failure, match=r"data\.tokenizer\.path: .*none is not a folder"):
        load_or_train(data, [])
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "tokenizer.json").write_text('{"version": ')
    (tmp_path / "torn" / "tokenizer_config.json").write_text("{}")
    data = spec(paths=["-"], tokenizer={"kind": "saved", "path": str(tmp_path / "torn")})
    with pytest.raises(Failure, match=r"data\.tokenizer\.path: no tokenizer can be loaded from .*torn"):
        load_or_train(data, [])


def test_code_beside_a_tokenizer_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "tokenizer"
    TOKENIZER.save_pretrained(place)
    (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((place / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with contextlib.suppress(Failure):
        load_or_train(spec(paths=["-"], tokenizer={"kind": "saved", "path": str(place)}), [])
    assert not (tmp_path / "ran").exists()


# -- for pairs -----------------------------------------------------------------------------------------------

SENTINELS = [sentinel(index) for index in range(3)]
PAIRED = train_byte_pairs(320, ["the cat sat on the mat"] * 4, [*PAIR_TOKENS, *SENTINELS])


def test_tokenizers_for_pairs_pad_with_0_and_end_with_1(tmp_path: Path) -> None:
    PAIRED.save_pretrained(tmp_path)
    loaded = load_or_train(
        spec("stdlib", pairs={"kind": "docstrings"}, tokenizer={"kind": "saved", "path": str(tmp_path)}), []
    )
    for tokenizer in (PAIRED, loaded):
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)
        assert tokenizer.convert_tokens_to_ids(SENTINELS) == [2, 3, 4]
        batch = tokenizer(["the cat sat", "the"], padding=True)
        assert batch["input_ids"][0][-1] == 1
        assert batch["input_ids"][1][-1] == 0
        assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "the cat sat"


def test_other_tokenizers_are_not_for_pairs(tmp_path: Path) -> None:
    train_byte_pairs(300, ["text"]).save_pretrained(tmp_path / "plain")
    PAIRED.save_pretrained(tmp_path / "few")
    plain, few = ({"kind": "saved", "path": str(tmp_path / name)} for name in ("plain", "few"))
    with pytest.raises(Failure, match=r"data\.tokenizer\.path: pairs need padding 0 and end of text 1"):
        load_or_train(spec("stdlib", pairs={"kind": "docstrings"}, tokenizer=plain), [])
    with pytest.raises(Failure, match=r"has no token <extra_id_3>; span corruption needs 28 sentinels"):
        load_or_train(spec("stdlib", pairs={"kind": "corrupted"}, tokenizer=few), [])
