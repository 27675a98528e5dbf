"""Foreign checkpoints in and out: the same logits, the same greedy text, and one clear line for what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sparsecli.data.tokenization import train_byte_pairs
from sparsecli.interchange import exporting, importing
from sparsecli.model.checkpoint import load_model

VOCABULARY = 270
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
NEOX = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", LLAMA),
    "llama, tied, biases, one head of keys": (
        "llama",
        {
            **LLAMA,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": 1,
        },
    ),
    "llama, llama3 positions": ("llama", {**LLAMA, "rope_parameters": LLAMA3}),
    "llama, linear positions": (
        "llama",
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama, wide heads": ("llama", {**LLAMA, "head_dim": 12, "hidden_act": "gelu"}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": None}),
    "qwen2": ("qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 16}),
    "gemma": ("gemma", {**LLAMA, "head_dim": 16}),
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied, own width": (
        "gpt2",
        {**GPT2, "n_inner": 40, "tie_word_embeddings": False, "activation_function": "relu"},
    ),
    "opt": ("opt", OPT),
    "opt, untied, no biases": ("opt", {**OPT, "enable_bias": False, "tie_word_embeddings": False}),
    "neox, parallel": ("gpt_neox", NEOX),
    "neox, one after the other": (
        "gpt_neox",
        {
            **NEOX,
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        },
    ),
}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_byte_pairs(VOCABULARY, ["a text about reading and writing text"] * 4)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def build(kind: str, **fields: object) -> PreTrainedModel:
    """A model with random weights everywhere, norms and biases too."""
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **{**special, **fields})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if parameter.ndim == 1 and name.endswith("weight") and kind != "gemma" else 0.0
            parameter.normal_(mean, 0.3 if parameter.ndim == 2 else 0.2)
    return model


@pytest.fixture
def save(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., Path]:
    def saved(model: PreTrainedModel, **options: object) -> Path:
        folder = tmp_path / "theirs"
        model.save_pretrained(folder, **options)
        shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
        return folder

    return saved


@pytest.fixture
def theirs(save: Callable[..., Path]) -> Path:
    return save(build("llama", **LLAMA))


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def prompt() -> Tensor:
    return torch.randint(1, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))


def greedy(model: PreTrainedModel, ids: Tensor) -> list[int]:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=200, min_new_tokens=200
    )[0].tolist()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_imported_model_is_the_original(name: str, save: Callable[..., Path], tmp_path: Path) -> None:
    kind, fields = MODELS[name]
    original = build(kind, **fields)
    importing.run(source=str(save(original)), output=tmp_path / "ours")
    imported, tokenizer = load_model(tmp_path / "ours")
    expected = original(prompt()).logits
    torch.testing.assert_close(imported(prompt()).logits, expected, atol=3e-5, rtol=1e-5)
    assert tokenizer.chat_template == TEMPLATE

    start = prompt()[:1, :5]
    text = greedy(original, start)
    assert greedy(imported, start) == text
    assert len(set(text)) > 10  # a model that says one thing only would prove little

    exporting.run(model=str(tmp_path / "ours"), output=tmp_path / "back")
    assert "sparsecli" not in (tmp_path / "back" / "config.json").read_text()
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(back) is type(original)
    tolerance = 1e-6 if kind == "gemma" else 0
    torch.testing.assert_close(back(prompt()).logits, expected, atol=tolerance, rtol=tolerance)
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == TEMPLATE
