"""Small foreign models of every architecture that is imported, built and saved by transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparsecli.data.tokenization import train_byte_pairs
from sparsecli.interchange.hub import fetch

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
WINDOW = {**LLAMA, "num_hidden_layers": 3, "sliding_window": 16}
GEMMA2 = {
    **WINDOW,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": False,
    "attn_logit_softcapping": 5.0,
}
GEMMA3 = {**GEMMA2, "attn_logit_softcapping": None}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.05, 1.2],
    "long_factor": [1.0, 2.5, 6.0],
    "partial_rotary_factor": 0.75,
}
EXPERTS = {**LLAMA, "num_experts": 6, "num_experts_per_tok": 2}
STABLELM = {
    **LLAMA,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}
FALCON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "ffn_hidden_size": 48,
}
GPTJ = {**GPT2, "rotary_dim": 6}
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
    "mistral, sliding": ("mistral", WINDOW),
    "qwen2, sliding": ("qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3, sliding": ("qwen3", {**WINDOW, "head_dim": 8, "use_sliding_window": True, "layer_types": MIXED}),
    "gemma2": ("gemma2", {**GEMMA2, "final_logit_softcapping": 3.0}),
    "gemma2, no limits": (
        "gemma2",
        {
            **GEMMA2,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": 16,
            "layer_types": ["full_attention"] * 3,
        },
    ),
    "gemma3": ("gemma3_text", {**GEMMA3, "sliding_window_pattern": 2}),
    "gemma3, scaled positions": (
        "gemma3_text",
        {
            **GEMMA3,
            "layer_types": MIXED,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
            },
        },
    ),
    "olmo2": ("olmo2", LLAMA),
    "smollm3": ("smollm3", {**LLAMA, "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}),
    "smollm3, sliding": (
        "smollm3",
        {**WINDOW, "use_sliding_window": True, "no_rope_layer_interval": 2, "tie_word_embeddings": False},
    ),
    "granite": (
        "granite",
        {
            **LLAMA,
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
        },
    ),
    "llama, yarn": ("llama", {**LLAMA, "rope_parameters": YARN}),
    "qwen2, yarn with all its fields": (
        "qwen2",
        {
            **LLAMA,
            "rope_parameters": {
                **YARN,
                "beta_fast": 8.0,
                "beta_slow": 2.0,
                "mscale": 1.2,
                "mscale_all_dim": 0.7,
                "truncate": False,
            },
        },
    ),
    "phi3": ("phi3", LLAMA),
    "phi3, longrope": (
        "phi3",
        {**LLAMA, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
    ),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {**EXPERTS, "moe_intermediate_size": 24, "num_experts_per_tok": 3, "head_dim": 16},
    ),
    "qwen3_moe, normalized": (
        "qwen3_moe",
        {**EXPERTS, "moe_intermediate_size": 20, "norm_topk_prob": True, "head_dim": 16},
    ),
    "olmoe": ("olmoe", {**EXPERTS, "intermediate_size": 20}),
    "stablelm": ("stablelm", STABLELM),
    "stablelm, parallel, biases": (
        "stablelm",
        {**STABLELM, "use_parallel_residual": True, "use_qkv_bias": True, "tie_word_embeddings": True},
    ),
    "falcon": ("falcon", FALCON),
    "falcon, new": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, new, one norm": (
        "falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon, all heads of keys, one after the other": (
        "falcon",
        {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True, "tie_word_embeddings": False},
    ),
    "gptj": ("gptj", GPTJ),
    "gptj, tied, whole heads": (
        "gptj",
        {**GPTJ, "rotary_dim": 8, "tie_word_embeddings": True, "n_inner": 40},
    ),
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


def save(model: PreTrainedModel, folder: Path, **options: object) -> Path:
    """Write `model` as a Hugging Face folder, with a tokenizer that has a chat template."""
    model.save_pretrained(folder, **options)
    tokenizer = train_byte_pairs(VOCABULARY, ["a text about reading and writing text"] * 4)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def fetched(model: Path, name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put the folder `model` into a cache of the hub under `name`, without a network. Returns its commit."""
    folder = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(model, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    fetch.cache_clear()
    return commit


def build(kind: str, **fields: object) -> PreTrainedModel:
    """A model with random weights everywhere, norms and biases too."""
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **{**special, **fields})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if parameter.ndim == 1 and name.endswith("weight") and "gemma" not in kind else 0.0
            parameter.normal_(mean, 0.3 if parameter.ndim == 2 else 0.2)
    return model


def prompt() -> Tensor:
    """Token ids (2, 40)."""
    return torch.randint(1, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))


def greedy(model: PreTrainedModel, ids: Tensor, tokens: int = 200) -> list[int]:
    """What `model` writes after `ids` (1, T), with them in front; no token ends it."""
    model.generation_config.eos_token_id = None
    text = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0
    )
    return text[0].tolist()
