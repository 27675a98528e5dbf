"""Readers of Hugging Face configurations: each gives the fields of our `ModelSpec` for one architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sparsecli.console import Failure

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
"""Our activations by their names; three of the names are the same formula."""


def _activation(config: Any, name: str) -> str:
    kind = getattr(config, name)
    if kind not in ACTIVATIONS:
        raise Failure(f"{name}: {kind!r} is not a supported activation ({', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[kind]


def _require(config: Any, name: str, value: object) -> None:
    """Raise Failure unless the field `name` has the only supported value."""
    given = getattr(config, name, value)
    if given != value:
        raise Failure(f"{name}: {given!r} is not supported, only {value!r}")


def _rotary(config: Any, given: Mapping[str, Any] | None = None, longrope: bool = False) -> dict[str, Any]:
    """Fields of rotary positions.

    Args:
        given: their parameters, by default those of the whole model.
        longrope: whether these frequencies may be; other classes than Phi-3's mix them in a text.
    """
    given = config.rope_parameters if given is None else given
    kind = given.get("rope_type", "default")
    scaling: dict[str, Any] | None = None
    if kind == "linear":
        scaling = {"kind": "linear", "factor": _number(given, "factor")}
    elif kind == "llama3":
        scaling = {
            "kind": "llama3",
            "factor": _number(given, "factor"),
            "low_frequency_factor": _number(given, "low_freq_factor"),
            "high_frequency_factor": _number(given, "high_freq_factor"),
            "original_positions": int(_number(given, "original_max_position_embeddings")),
        }
    elif kind == "yarn":
        scaling = _yarn(config, given)
    elif kind == "longrope" and longrope:
        scaling = _longrope(config, given)
    elif kind != "default":
        kinds = "default, linear, llama3, yarn" + ", longrope" * longrope
        raise Failure(f"rope_parameters.rope_type: {kind!r} is not supported ({kinds})")
    return {"positions": "rotary", "rotary_base": _number(given, "rope_theta"), "rotary_scaling": scaling}


def _yarn(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    original = int(_number(given, "original_max_position_embeddings"))
    factor = config.max_position_embeddings / original
    if given.get("factor") is not None:
        factor = _number(given, "factor")

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    attention_factor = magnitude(1.0)
    if given.get("mscale") and given.get("mscale_all_dim"):
        attention_factor = magnitude(_number(given, "mscale")) / magnitude(_number(given, "mscale_all_dim"))
    if given.get("attention_factor") is not None:
        attention_factor = _number(given, "attention_factor")
    return {
        "kind": "yarn",
        "factor": factor,
        "original_positions": original,
        "attention_factor": attention_factor,
        "beta_fast": _number(given, "beta_fast") if given.get("beta_fast") else 32.0,
        "beta_slow": _number(given, "beta_slow") if given.get("beta_slow") else 1.0,
        "truncate": bool(given.get("truncate", True)),
    }


def _longrope(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    original = int(_number(given, "original_max_position_embeddings"))
    factor = config.max_position_embeddings / original
    if given.get("factor") is not None:
        factor = _number(given, "factor")
    attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    if given.get("attention_factor") is not None:
        attention_factor = _number(given, "attention_factor")
    return {
        "kind": "longrope",
        "original_positions": original,
        "short_factor": _numbers(given, "short_factor"),
        "long_factor": _numbers(given, "long_factor"),
        "attention_factor": attention_factor,
    }


def _numbers(given: Mapping[str, Any], name: str) -> list[float]:
    values = given.get(name)
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        raise Failure(f"rope_parameters.{name}: {values!r} is not a list of numbers")
    return [float(value) for value in values]


def _number(given: Mapping[str, Any], name: str) -> float:
    value = given.get(name)
    if not isinstance(value, int | float):
        raise Failure(f"rope_parameters.{name}: {value!r} is not a number")
    return float(value)


def _llama(
    config: Any,
    *,
    biases: tuple[bool, bool],
    mlp_bias: bool = False,
    norms: bool = False,
    activation: str = "hidden_act",
    rope: Mapping[str, Any] | None = None,
    longrope: bool = False,
    partial_rotary: bool = False,
) -> dict[str, Any]:
    """A gated model with RMS norms.

    Args:
        biases: of queries, keys and values, and of the output.
        norms: of queries and keys.
        activation: the name of its field.
        rope: the rotary parameters, by default those of the whole model.
        longrope, partial_rotary: whether the class has such rotary positions.
    """
    rope = config.rope_parameters if rope is None else rope
    fraction = float(rope.get("partial_rotary_factor", 1.0))
    if fraction != 1 and not partial_rotary:
        raise Failure(
            "rope_parameters.partial_rotary_factor: only rotary positions over whole heads are supported"
        )
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {
        "d_model": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "head_width": None if width * heads == config.hidden_size else width,
        "max_positions": config.max_position_embeddings,
        "normalization": "rms",
        "normalization_epsilon": config.rms_norm_eps,
        "attention": {
            "projection": "dense",
            "key_value_heads": None if config.num_key_value_heads == heads else config.num_key_value_heads,
            "bias": biases[0],
            "output_bias": None if biases[0] == biases[1] else biases[1],
            "query_key_norm": norms,
            **_window(config),
        },
        "feed_forward": {
            "kind": "dense",
            "d_ff": config.intermediate_size,
            "activation": _activation(config, activation),
            "gated": True,
            "bias": mlp_bias,
        },
        **_rotary(config, rope, longrope),
        "rotary_fraction": fraction,
    }


def _mixture(
    config: Any, fields: dict[str, Any], *, experts: int, units: int, normalize: bool
) -> dict[str, Any]:
    """`fields` with gated experts of so many `units` in place of the feed-forward layers."""
    feed_forward = {
        "kind": "mixture",
        "d_ff": experts * units,
        "experts": experts,
        "experts_per_token": config.num_experts_per_tok,
        "activation": _activation(config, "hidden_act"),
        "gated": True,
        "bias": False,
        "gate": "output_probability",
        "normalize_probabilities": normalize,
    }
    return {**fields, "feed_forward": feed_forward}


def _window(config: Any) -> dict[str, Any]:
    """Fields of sliding windows; none where they are as long as the context."""
    sliding = _sliding_layers(config)
    if not any(sliding):
        return {}
    window = config.sliding_window
    if not isinstance(window, int) or window < 1:
        raise Failure(f"sliding_window: {window!r} is not a number of positions")
    if window >= config.max_position_embeddings:
        return {}
    return {"window": window, "sliding_layers": None if all(sliding) else sliding}


def _sliding_layers(config: Any) -> list[bool]:
    """Which layers have a sliding window, whatever its length."""
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [getattr(config, "sliding_window", None) is not None] * layers
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise Failure(f"layer_types: {kind!r} is not supported (full_attention, sliding_attention)")
    return [kind == "sliding_attention" for kind in kinds[:layers]]


def read_llama(config: Any) -> dict[str, Any]:
    return _llama(config, biases=(config.attention_bias,) * 2, mlp_bias=config.mlp_bias)


def read_mistral(config: Any) -> dict[str, Any]:
    return _llama(config, biases=(False, False))


def read_qwen2(config: Any) -> dict[str, Any]:
    return _llama(config, biases=(True, False))


def read_qwen3(config: Any) -> dict[str, Any]:
    return _llama(config, biases=(config.attention_bias,) * 2, norms=True)


def read_phi3(config: Any) -> dict[str, Any]:
    return _llama(config, biases=(False, False), longrope=True, partial_rotary=True)


def read_mixtral(config: Any) -> dict[str, Any]:
    fields = _llama(config, biases=(False, False))
    experts, units = config.num_local_experts, config.intermediate_size
    return _mixture(config, fields, experts=experts, units=units, normalize=True)


def read_qwen3_moe(config: Any) -> dict[str, Any]:
    _require(config, "decoder_sparse_step", 1)
    _require(config, "mlp_only_layers", [])
    fields = _llama(config, biases=(config.attention_bias,) * 2, norms=True)
    experts, units = config.num_experts, config.moe_intermediate_size
    return _mixture(config, fields, experts=experts, units=units, normalize=config.norm_topk_prob)


def read_olmoe(config: Any) -> dict[str, Any]:
    _require(config, "clip_qkv", None)
    fields = _llama(config, biases=(config.attention_bias,) * 2, norms=True)
    fields["attention"]["query_key_norm_over"] = "projection"
    experts, units = config.num_experts, config.intermediate_size
    return _mixture(config, fields, experts=experts, units=units, normalize=config.norm_topk_prob)


def read_stablelm(config: Any) -> dict[str, Any]:
    _require(config, "qk_layernorm", False)
    heads = config.num_attention_heads
    return {
        **_two_matrices(config, config.intermediate_size, "hidden_act"),
        **_rotary(config),
        "rotary_fraction": float(config.rope_parameters.get("partial_rotary_factor", 1.0)),
        "attention": {
            "projection": "dense",
            "key_value_heads": None if config.num_key_value_heads == heads else config.num_key_value_heads,
            "bias": config.use_qkv_bias,
            "output_bias": False if config.use_qkv_bias else None,
        },
        "feed_forward": {
            "kind": "dense",
            "d_ff": config.intermediate_size,
            "activation": _activation(config, "hidden_act"),
            "gated": True,
            "bias": False,
        },
        "parallel": config.use_parallel_residual,
        "shared_norm": config.use_parallel_residual,
        "normalization_epsilon": config.layer_norm_eps,
    }


def read_falcon(config: Any) -> dict[str, Any]:
    if config.alibi:
        raise Failure("alibi: only rotary positions are supported")
    heads = config.num_attention_heads
    if config.new_decoder_architecture:
        _require(config, "parallel_attn", True)
        key_value_heads, norms = config.num_kv_heads, config.num_ln_in_parallel_attn or 2
        if norms not in (1, 2):
            raise Failure(f"num_ln_in_parallel_attn: {norms!r} is not supported (1, 2)")
    else:
        _require(config, "num_ln_in_parallel_attn", config.num_ln_in_parallel_attn and 1)
        key_value_heads, norms = 1 if config.multi_query else heads, 1
    fields = _two_matrices(config, config.ffn_hidden_size, "activation", bool(config.bias))
    fields["attention"]["key_value_heads"] = None if key_value_heads == heads else key_value_heads
    return {
        **fields,
        **_rotary(config),
        "parallel": bool(config.parallel_attn),
        "shared_norm": bool(config.parallel_attn) and norms == 1,
        "normalization_epsilon": config.layer_norm_epsilon,
    }


def read_gptj(config: Any) -> dict[str, Any]:
    width = config.n_embd // config.n_head
    if not isinstance(config.rotary_dim, int) or not 0 < config.rotary_dim <= width:
        raise Failure(f"rotary_dim: {config.rotary_dim!r} is not a part of a head of {width}")
    fraction = config.rotary_dim / width
    if int(width * fraction) < config.rotary_dim:  # a quotient that was rounded down
        fraction = math.nextafter(fraction, 1)
    fields = _two_matrices(config, config.n_inner or 4 * config.n_embd, "activation_function")
    fields["attention"]["bias"] = False
    return {
        **fields,
        "positions": "rotary",
        "rotary_fraction": fraction,
        "parallel": True,
        "shared_norm": True,
        "normalization_epsilon": config.layer_norm_epsilon,
        "head_bias": True,
    }


def read_gemma(config: Any) -> dict[str, Any]:
    if config.use_bidirectional_attention:
        raise Failure("use_bidirectional_attention: only causal attention is supported")
    fields = _llama(config, biases=(config.attention_bias,) * 2)
    return {**fields, "embedding_scale": config.hidden_size**0.5}


def read_gemma2(config: Any) -> dict[str, Any]:
    return _gemma_around(config, config.rope_parameters)


def read_gemma3(config: Any) -> dict[str, Any]:
    _require(config, "attn_logit_softcapping", None)  # transformers does not apply it
    rope = config.rope_parameters
    fields = _gemma_around(config, rope["full_attention"], norms=True)
    if not any(_sliding_layers(config)):
        return fields
    local = _rotary(config, rope["sliding_attention"])
    if fields["attention"].get("window") is None:
        if any(local[name] != fields[name] for name in local):
            raise Failure(
                f"sliding_window: {config.sliding_window} is not shorter than max_position_embeddings, "
                "which is not supported with other rotary positions in sliding layers"
            )
        return fields
    if local["rotary_scaling"] is not None:
        kind = rope["sliding_attention"]["rope_type"]
        raise Failure(
            f"rope_parameters.sliding_attention.rope_type: {kind!r} is not supported, only 'default'"
        )
    return {**fields, "sliding_rotary_base": local["rotary_base"]}


def _gemma_around(config: Any, rope: Mapping[str, Any], norms: bool = False) -> dict[str, Any]:
    """Gemma with norms around attention and feed-forward layers, and limits of scores and logits."""
    if config.use_bidirectional_attention:
        raise Failure("use_bidirectional_attention: only causal attention is supported")
    fields = _llama(
        config, biases=(config.attention_bias,) * 2, norms=norms, activation="hidden_activation", rope=rope
    )
    fields["attention"] |= {
        "scale": _attention_scale(config, config.query_pre_attn_scalar**-0.5),
        "logit_softcap": config.attn_logit_softcapping,
    }
    return {
        **fields,
        "norm_placement": "around",
        "embedding_scale": config.hidden_size**0.5,
        "logit_softcap": config.final_logit_softcapping,
    }


def _attention_scale(config: Any, scale: float) -> float | None:
    """`scale`, None where it is the usual one."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return None if scale == width**-0.5 else float(scale)


def read_olmo2(config: Any) -> dict[str, Any]:
    fields = _llama(config, biases=(config.attention_bias,) * 2, norms=True)
    fields["attention"]["query_key_norm_over"] = "projection"
    return {**fields, "norm_placement": "after"}


def read_smollm3(config: Any) -> dict[str, Any]:
    fields = _llama(config, biases=(config.attention_bias,) * 2, mlp_bias=config.mlp_bias)
    if any(_sliding_layers(config)):
        _require(config, "use_sliding_window", True)
    rotary = [bool(kept) for kept in config.no_rope_layers[: config.num_hidden_layers]]
    return {**fields, "rotary_layers": None if all(rotary) else rotary}


def read_granite(config: Any) -> dict[str, Any]:
    fields = _llama(config, biases=(config.attention_bias,) * 2, mlp_bias=config.mlp_bias)
    fields["attention"]["scale"] = _attention_scale(config, config.attention_multiplier)
    return {
        **fields,
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": 1 / config.logits_scaling,
    }


def _two_matrices(config: Any, d_ff: int, activation: str, bias: bool = True) -> dict[str, Any]:
    """A model with layer norms and an ungated feed-forward layer."""
    return {
        "d_model": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "max_positions": config.max_position_embeddings,
        "normalization": "layer",
        "attention": {"projection": "dense", "bias": bias},
        "feed_forward": {
            "kind": "dense",
            "d_ff": d_ff,
            "activation": _activation(config, activation),
            "bias": bias,
        },
        "positions": "learned",
    }


def read_gpt2(config: Any) -> dict[str, Any]:
    _require(config, "scale_attn_weights", True)
    _require(config, "scale_attn_by_inverse_layer_idx", False)
    _require(config, "add_cross_attention", False)
    fields = _two_matrices(config, config.n_inner or 4 * config.n_embd, "activation_function")
    return {**fields, "normalization_epsilon": config.layer_norm_epsilon}


def read_opt(config: Any) -> dict[str, Any]:
    _require(config, "do_layer_norm_before", True)
    _require(config, "_remove_final_layer_norm", False)
    _require(config, "layer_norm_elementwise_affine", True)
    _require(config, "word_embed_proj_dim", config.hidden_size)
    fields = _two_matrices(config, config.ffn_dim, "activation_function", config.enable_bias)
    return {**fields, "normalization_epsilon": 1e-5}


def read_gpt_neox(config: Any) -> dict[str, Any]:
    fields = _two_matrices(config, config.intermediate_size, "hidden_act")
    fields["attention"]["bias"] = config.attention_bias
    return {
        **fields,
        **_rotary(config),
        "rotary_fraction": float(config.rope_parameters.get("partial_rotary_factor", 1.0)),
        "parallel": config.use_parallel_residual,
        "normalization_epsilon": config.layer_norm_eps,
    }
