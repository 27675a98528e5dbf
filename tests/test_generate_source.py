"""What `generate` writes with decoders that read a source: natively as in PyTorch and as transformers does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparsecli import pack
from sparsecli.console import Failure
from sparsecli.decode.native import binding
from sparsecli.generate.backend import open_decoder
from sparsecli.generate.command import generate
from sparsecli.generate.decoder import DecoderOptions
from sparsecli.model.auto import build_network
from sparsecli.model.files import read_description
from sparsecli.model.loading import load_model
from sparsecli.recipe.schema import GenerateSpec
from sparsecli.spec.model import ModelSpec

needs_native = pytest.mark.skipif(binding.available() is not None, reason=str(binding.available()))
ENCODER = {"layers": 1, "max_positions": 20}
TERRAFORMER = {
    "residual": "reversible",
    "attention_layers": 2,
    "sru": {"width": 6},
    "encoder": {**ENCODER, "read_by": {"kind": "prefix"}},
}
HASHED = {"kind": "lsh", "lsh": {"rounds": 2, "chunk_length": 2}}  # 8 keys
MODELS = {
    "encoder-decoder": {"encoder": ENCODER},
    "terraformer": TERRAFORMER,
    "hashed terraformer": {**TERRAFORMER, "attention": {**HASHED, "projection": "multiplicative_conv"}},
}
SOURCE = "f c b a e d"


def saved(place: Path, fields: dict) -> Path:
    """A tiny random model whose words are letters, with a tokenizer that ends a source with 1."""
    words = {"<pad>": 0, "</s>": 1, **{letter: 2 + index for index, letter in enumerate("abcdefghijkl")}}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    spec = ModelSpec.model_validate(
        {
            "d_model": 32,
            "layers": 2,
            "heads": 4,
            "max_positions": 16,
            "feed_forward": {"kind": "sparse", "d_ff": 64, "block_size": 8, "rank": 4},
            "attention": {"projection": "multiplicative_conv"},
            "vocabulary": {"kind": "dense", "size": 14},
            **fields,
        }
    )
    torch.manual_seed(1)
    build_network(spec).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_native), "torch", "auto"])
def test_greedy_text_equals_that_of_transformers(
    name: str, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "model", MODELS[name])
    options = GenerateSpec(temperature=0, max_new_tokens=12)
    generate(folder, prompt=SOURCE, options=options, decoder=DecoderOptions(backend, threads=1), json=True)
    written = json.loads(capsys.readouterr().out)
    model, tokenizer = load_model(folder)
    given = tokenizer(SOURCE, return_tensors="pt")
    wanted = model.generate(**given, max_new_tokens=12, do_sample=False)[0, 1:].tolist()
    assert written["tokens"] == (wanted[: wanted.index(1)] if 1 in wanted else wanted)
    assert written["stats"]["prompt_tokens"] == 7
    assert written["backend"] == (
        backend if backend != "auto" else "torch" if binding.available() else "native"
    )


def test_models_with_an_encoder_are_not_packed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", MODELS["terraformer"])
    with pytest.raises(Failure, match="a model with an encoder cannot be packed"):
        pack.run(model=str(folder), output=None, dtype="int8")


@needs_native
@pytest.mark.parametrize("length", [2, 3, 8, 20], ids=lambda length: f"{length} tokens")
def test_hashed_attention_goes_on_from_a_prompt_as_in_pytorch(length: int, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", {"attention": HASHED, "max_positions": 60})
    described = read_description(folder)
    ours, theirs = (
        open_decoder(folder, described, DecoderOptions(backend, threads=1)) for backend in ("native", "torch")
    )
    prompt = [2 + index * index % 11 for index in range(length)]
    rows = [(backend.prefill(prompt, capacity=50), backend) for backend in (ours, theirs)]
    for _ in range(30):
        np.testing.assert_allclose(rows[0][0], rows[1][0], atol=1e-5, rtol=1e-5)
        token = int(rows[1][0].argmax())
        rows = [(backend.step(token), backend) for _, backend in rows]


@needs_native
def test_a_packed_model_reads_a_long_prompt_of_hashed_attention_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "model", {"attention": HASHED, "max_positions": 60})
    pack.run(model=str(folder), output=tmp_path / "packed", dtype="float32")
    ids = list(range(2, 12))
    alone = open_decoder(tmp_path / "packed", read_description(tmp_path / "packed"), DecoderOptions())
    after = alone.prefill(ids, capacity=11)
    assert "the prompt is read token by token" in capsys.readouterr().err
    whole = open_decoder(folder, read_description(folder), DecoderOptions())
    whole.prefill(ids[:2], capacity=11)
    for token in ids[2:]:
        wanted = whole.step(token)
    np.testing.assert_allclose(after, wanted, atol=1e-5, rtol=1e-5)


def test_words_outside_of_the_vocabulary_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", MODELS["encoder-decoder"])
    with pytest.raises(Failure, match=r"words that the tokenizer does not know: \? !; leave"):
        generate(folder, prompt="a ? b !", options=GenerateSpec(), decoder=DecoderOptions())
