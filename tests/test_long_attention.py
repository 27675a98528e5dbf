"""The benchmark of hashed attention: what it counts, and that it runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from sparsecli.bench.studies import long_attention
from sparsecli.bench.studies.long_attention import brought_together, mass_found, mass_of_model
from sparsecli.console import Failure
from sparsecli.data.tokenization import train_byte_pairs
from sparsecli.decode.native import binding
from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM
from sparsecli.model.configuration import TerraformerConfig
from sparsecli.model.layers.lsh import LshAttention
from sparsecli.spec.attention import LshSpec


def test_windows_of_all_rounds_are_brought_together() -> None:
    order = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]])
    together = brought_together(order, LshSpec(rounds=2, chunk_length=2))
    # 2 has 3 and, a chunk before, 0 and 1 in the first round; 3, and 4 and 5 in the second.
    assert together[2].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    # 7 begins the second round, behind the chunk that ends the first.
    assert together[7].nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_mass_grows_with_rounds_up_to_all() -> None:
    q = 3 * torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0))
    shares = [
        float(mass_found(q, LshAttention(LshSpec(rounds=rounds, chunk_length=8)).eval()).mean())
        for rounds in (1, 2, 4, 8)
    ]
    assert shares == sorted(shares)
    assert 0.2 < shares[0] < shares[-1] < 1
    everything = LshAttention(LshSpec(rounds=1, chunk_length=8, chunks_before=7)).eval()
    torch.testing.assert_close(mass_found(q, everything), torch.ones(1, 2))


def test_mass_of_a_model_with_full_attention(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{number} and {number % 13}" for number in range(200)))
    config = ScalingTransformerConfig(
        d_model=16, layers=1, heads=2, vocabulary={"kind": "dense", "size": 300}, max_positions=512
    )
    ScalingTransformerForCausalLM(config).save_pretrained(tmp_path / "model")
    train_byte_pairs(280, [text.read_text()]).save_pretrained(tmp_path / "model")
    shares = mass_of_model(tmp_path / "model", text, 300, rounds=[1, 4])
    assert 0 < shares[0] < shares[1] <= 1
    with pytest.raises(Failure, match=r"text\.txt: has \d+ tokens; give a longer text or --length"):
        mass_of_model(tmp_path / "model", text, 5000, rounds=[1])


@pytest.mark.parametrize(("what", "tables"), [("time", 2), ("decode", 1)])
def test_a_row_for_every_length(
    what: str, tables: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--lengths", "48", "96", "--heads", "1", "--chunk-length", "8", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["long_attention", what, *arguments])
    long_attention.main()
    printed = capsys.readouterr().out
    assert [int(row) for row in re.findall(r"^ +(48|96) ", printed, re.MULTILINE)] == [48, 96] * tables


MODEL = """
model: {d_model: 32, layers: 2, heads: 2, max_positions: 16, feed_forward: {kind: dense, d_ff: 64},
        attention: {kind: lsh, lsh: {chunk_length: 8}, projection: multiplicative_conv, value_concat: whole},
        residual: reversible, vocabulary: {kind: dense, size: 40}, sru: {width: 4}}
"""
PREFIX = ["model.encoder={layers: 1, max_positions: 16, read_by: {kind: prefix}}", "model.attention_layers=2"]


@pytest.mark.skipif(binding.available() is not None, reason=str(binding.available()))
@pytest.mark.parametrize("overrides", [[], PREFIX], ids=["alone", "prefix"])
def test_whole_models_decode_after_long_texts(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MODEL)
    arguments = [str(recipe), *overrides, "--lengths", "20", "100", "--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["long_attention", "model", *arguments])
    long_attention.main()
    printed = capsys.readouterr().out
    assert re.findall(r"^ *(20|100) +(full|hashed) ", printed, re.MULTILINE) == [
        (length, attention) for length in ("20", "100") for attention in ("full", "hashed")
    ]


def test_full_attention_has_nothing_to_compare_itself_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["long_attention", "model", "quickstart"])
    with pytest.raises(SystemExit):
        long_attention.main()
    assert "needs attention.kind: lsh" in " ".join(capsys.readouterr().err.split())


def test_a_model_with_an_encoder_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    TerraformerConfig(d_model=16, layers=1, heads=2).save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["long_attention", "mass", str(tmp_path), "text.txt"])
    with pytest.raises(SystemExit) as ended:
        long_attention.main()
    assert ended.value.code == 1
    assert "has an encoder; give a model that is a decoder alone" in " ".join(capsys.readouterr().err.split())
