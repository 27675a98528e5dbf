"""Readers of Hugging Face configurations: each gives the fields of our `ModelSpec` for one architecture."""

from __future__ import annotations

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


def _rotary(config: Any, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fields of rotary positions; `given` are their parameters, by default those of the whole model."""
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
    elif kind != "default":
        raise Failure(f"rope_parameters.rope_type: {kind!r} is not supported (default, linear, llama3)")
    return {"positions": "rotary", "rotary_base": _number(given, "rope_theta"), "rotary_scaling": scaling}


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
) -> dict[str, Any]:
    """A gated model with RMS norms; `biases` are those of queries, keys and values, and of the output.

    `activation` is the name of its field; `rope` are the rotary parameters, by default those of the whole model.
    """
    rope = config.rope_parameters if rope is None else rope
    if rope.get("partial_rotary_factor", 1.0) != 1:
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
        **_rotary(config, rope),
    }


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
