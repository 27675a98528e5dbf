"""Families of foreign models: what their configuration means in ours, and under which names their tensors lie."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsecli.console import Failure
from sparsecli.interchange.forms import (
    ONE_LESS,
    POSITIONS_BEHIND,
    SAME,
    THREE_BY_HEAD,
    TRANSPOSED,
    TRANSPOSED_THREE,
    Form,
)
from sparsecli.model.architecture import ModelSpec
from sparsecli.model.tensors import Shape, tensor_shapes

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
"""Their names of activations; three of them are the same formula."""

# Tables of constants that old files carry.
BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias))$")

QUERY_KEY_VALUE = tuple(f"attention.projection.{name}" for name in ("query", "key", "value"))


@dataclass(frozen=True)
class Place:
    """The modules of ours whose tensors lie in one module of theirs."""

    ours: tuple[str, ...]
    form: Form = SAME


def _at(*ours: str, form: Form = SAME) -> Place:
    return Place(ours, form)


@dataclass(frozen=True)
class Part:
    """One tensor of theirs."""

    name: str
    ours: tuple[str, ...]
    form: Form
    shape: Shape

    @property
    def elements(self) -> int:
        """Elements of it."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Family:
    """One architecture of theirs.

    Attributes:
        architecture: the class that transformers loads.
        prefix: what the names of all tensors but the head's begin with; files of the bare model lack it.
        read: fields of a `ModelSpec` for a configuration; raises Failure for a field that ours cannot express.
        outer: modules that there are once.
        block: modules of every block, below `blocks`.
    """

    architecture: str
    prefix: str
    read: Callable[[Any], dict[str, Any]]
    outer: Mapping[str, Place]
    blocks: str
    block: Mapping[str, Place]
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Names that older files use."""

    def spec(self, config: Any) -> ModelSpec:
        """Our architecture for a transformers configuration.

        Raises:
            Failure: a field says what ours cannot express; the line begins with its name.
        """
        if getattr(config, "quantization_config", None):
            raise Failure("quantization_config: only weights that are not quantised are imported")
        tied = bool(config.tie_word_embeddings)
        vocabulary = {"kind": "dense", "size": config.vocab_size, "tied": tied}
        try:
            return ModelSpec.from_config({**self.read(config), "vocabulary": vocabulary})
        except ValueError as error:
            raise Failure(str(error)) from error

    def parts(self, spec: ModelSpec) -> list[Part]:
        """Their tensors for our architecture, in the order of the computation; a tied head is none."""
        shapes = tensor_shapes(spec)
        if spec.tied:
            del shapes["head.weight"]
        parts: list[Part] = []
        for name, place in self._places(spec):
            for kind in ("weight", "bias"):
                ours = tuple(f"{module}.{kind}" for module in place.ours)
                if ours[0] in shapes:
                    empty = [torch.empty(shapes[each], device="meta") for each in ours]
                    shape = tuple(place.form.fold(empty, spec).shape)
                    parts.append(Part(f"{name}.{kind}", ours, place.form, shape))
        assert {ours for part in parts for ours in part.ours} == shapes.keys()
        return parts

    def _places(self, spec: ModelSpec) -> Iterator[tuple[str, Place]]:
        *first, last, head = self.outer.items()
        yield from first
        for index in range(spec.layers):
            for name, place in self.block.items():
                ours = tuple(f"model.blocks.{index}.{module}" for module in place.ours)
                yield f"{self.blocks}.{index}.{name}", Place(ours, place.form)
        yield from (last, head)

    def canonical(self, names: list[str]) -> dict[str, str]:
        """The name in a file of each tensor that means something, by the name that `parts` gives it."""
        bare = not any(name.startswith(self.prefix) for name in names)
        found: dict[str, str] = {}
        for name in names:
            if BUFFERS.search(name):
                continue
            known = self.renamed.get(name, name)
            outside = known.startswith((self.prefix, "lm_head."))
            found[known if outside or not bare else self.prefix + known] = name
        return found


def family_of(kind: object) -> Family:
    """The family of a `model_type`.

    Raises:
        Failure: it is none that is imported.
    """
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise Failure(f"model_type: {kind!r} is not an architecture that is imported ({', '.join(FAMILIES)})")
    return FAMILIES[kind]


# -- what configurations mean ----------------------------------------------------------------------------------


def _activation(config: Any, name: str) -> str:
    kind = getattr(config, name)
    if kind not in ACTIVATIONS:
        raise Failure(f"{name}: {kind!r} is not an activation of ours ({', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[kind]


def _demand(config: Any, name: str, value: object) -> None:
    """Raise Failure unless the field `name` has the only value that ours can express."""
    given = getattr(config, name, value)
    if given != value:
        raise Failure(f"{name}: {given!r} is not supported, only {value!r}")


def _rotary(config: Any) -> dict[str, Any]:
    given = config.rope_parameters
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
    config: Any, *, biases: tuple[bool, bool], mlp_bias: bool = False, norms: bool = False
) -> dict[str, Any]:
    """A gated model with RMS norms; `biases` are those of queries, keys and values, and of the output."""
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1:
        raise Failure(
            "rope_parameters.partial_rotary_factor: only whole heads are turned in this architecture"
        )
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {
        "d_model": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "head_width": None if width * heads == config.hidden_size else width,
        "max_positions": min(
            config.max_position_embeddings, _window(config) or config.max_position_embeddings
        ),
        "normalization": "rms",
        "normalization_epsilon": config.rms_norm_eps,
        "attention": {
            "projection": "dense",
            "key_value_heads": None if config.num_key_value_heads == heads else config.num_key_value_heads,
            "bias": biases[0],
            "output_bias": None if biases[0] == biases[1] else biases[1],
            "query_key_norm": norms,
        },
        "feed_forward": {
            "kind": "dense",
            "d_ff": config.intermediate_size,
            "activation": _activation(config, "hidden_act"),
            "gated": True,
            "bias": mlp_bias,
        },
        **_rotary(config),
    }


def _window(config: Any) -> int | None:
    """Positions that a layer looks back, where any layer looks back less far than the whole context."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


def _read_llama(config: Any) -> dict[str, Any]:
    return _llama(config, biases=(config.attention_bias,) * 2, mlp_bias=config.mlp_bias)


def _read_mistral(config: Any) -> dict[str, Any]:
    return _llama(config, biases=(False, False))


def _read_qwen2(config: Any) -> dict[str, Any]:
    return _llama(config, biases=(True, False))


def _read_qwen3(config: Any) -> dict[str, Any]:
    return _llama(config, biases=(config.attention_bias,) * 2, norms=True)


def _read_gemma(config: Any) -> dict[str, Any]:
    if config.use_bidirectional_attention:
        raise Failure("use_bidirectional_attention: only causal attention is supported")
    fields = _llama(config, biases=(config.attention_bias,) * 2)
    return {**fields, "embedding_scale": config.hidden_size**0.5}


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


def _read_gpt2(config: Any) -> dict[str, Any]:
    _demand(config, "scale_attn_weights", True)
    _demand(config, "scale_attn_by_inverse_layer_idx", False)
    _demand(config, "add_cross_attention", False)
    fields = _two_matrices(config, config.n_inner or 4 * config.n_embd, "activation_function")
    return {**fields, "normalization_epsilon": config.layer_norm_epsilon}


def _read_opt(config: Any) -> dict[str, Any]:
    _demand(config, "do_layer_norm_before", True)
    _demand(config, "_remove_final_layer_norm", False)
    _demand(config, "layer_norm_elementwise_affine", True)
    _demand(config, "word_embed_proj_dim", config.hidden_size)
    fields = _two_matrices(config, config.ffn_dim, "activation_function", config.enable_bias)
    return {**fields, "normalization_epsilon": 1e-5}


def _read_gpt_neox(config: Any) -> dict[str, Any]:
    fields = _two_matrices(config, config.intermediate_size, "hidden_act")
    fields["attention"]["bias"] = config.attention_bias
    return {
        **fields,
        **_rotary(config),
        "rotary_fraction": float(config.rope_parameters.get("partial_rotary_factor", 1.0)),
        "parallel": config.use_parallel_residual,
        "normalization_epsilon": config.layer_norm_eps,
    }


# -- where tensors lie -----------------------------------------------------------------------------------------


def _llama_like(architecture: str, read: Callable[[Any], dict[str, Any]], norm: Form = SAME) -> Family:
    return Family(
        architecture,
        prefix="model.",
        read=read,
        outer={
            "model.embed_tokens": _at("model.embedding"),
            "model.norm": _at("model.norm", form=norm),
            "lm_head": _at("head"),
        },
        blocks="model.layers",
        block={
            "input_layernorm": _at("attention_norm", form=norm),
            "self_attn.q_proj": _at("attention.projection.query"),
            "self_attn.k_proj": _at("attention.projection.key"),
            "self_attn.v_proj": _at("attention.projection.value"),
            "self_attn.q_norm": _at("attention.projection.query_norm"),
            "self_attn.k_norm": _at("attention.projection.key_norm"),
            "self_attn.o_proj": _at("attention.output"),
            "post_attention_layernorm": _at("feed_forward_norm", form=norm),
            "mlp.gate_proj": _at("feed_forward.gate"),
            "mlp.up_proj": _at("feed_forward.up"),
            "mlp.down_proj": _at("feed_forward.down"),
        },
    )


FAMILIES = {
    "llama": _llama_like("LlamaForCausalLM", _read_llama),
    "mistral": _llama_like("MistralForCausalLM", _read_mistral),
    "qwen2": _llama_like("Qwen2ForCausalLM", _read_qwen2),
    "qwen3": _llama_like("Qwen3ForCausalLM", _read_qwen3),
    "gemma": _llama_like("GemmaForCausalLM", _read_gemma, norm=ONE_LESS),
    "gpt2": Family(
        "GPT2LMHeadModel",
        prefix="transformer.",
        read=_read_gpt2,
        outer={
            "transformer.wte": _at("model.embedding"),
            "transformer.wpe": _at("model.position_embedding"),
            "transformer.ln_f": _at("model.norm"),
            "lm_head": _at("head"),
        },
        blocks="transformer.h",
        block={
            "ln_1": _at("attention_norm"),
            "attn.c_attn": _at(*QUERY_KEY_VALUE, form=TRANSPOSED_THREE),
            "attn.c_proj": _at("attention.output", form=TRANSPOSED),
            "ln_2": _at("feed_forward_norm"),
            "mlp.c_fc": _at("feed_forward.up", form=TRANSPOSED),
            "mlp.c_proj": _at("feed_forward.down", form=TRANSPOSED),
        },
    ),
    "opt": Family(
        "OPTForCausalLM",
        prefix="model.",
        read=_read_opt,
        outer={
            "model.decoder.embed_tokens": _at("model.embedding"),
            "model.decoder.embed_positions": _at("model.position_embedding", form=POSITIONS_BEHIND),
            "model.decoder.final_layer_norm": _at("model.norm"),
            "lm_head": _at("head"),
        },
        blocks="model.decoder.layers",
        block={
            "self_attn_layer_norm": _at("attention_norm"),
            "self_attn.q_proj": _at("attention.projection.query"),
            "self_attn.k_proj": _at("attention.projection.key"),
            "self_attn.v_proj": _at("attention.projection.value"),
            "self_attn.out_proj": _at("attention.output"),
            "final_layer_norm": _at("feed_forward_norm"),
            "fc1": _at("feed_forward.up"),
            "fc2": _at("feed_forward.down"),
        },
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        prefix="gpt_neox.",
        read=_read_gpt_neox,
        outer={
            "gpt_neox.embed_in": _at("model.embedding"),
            "gpt_neox.final_layer_norm": _at("model.norm"),
            "lm_head": _at("head"),
        },
        blocks="gpt_neox.layers",
        block={
            "input_layernorm": _at("attention_norm"),
            "attention.query_key_value": _at(*QUERY_KEY_VALUE, form=THREE_BY_HEAD),
            "attention.dense": _at("attention.output"),
            "post_attention_layernorm": _at("feed_forward_norm"),
            "mlp.dense_h_to_4h": _at("feed_forward.up"),
            "mlp.dense_4h_to_h": _at("feed_forward.down"),
        },
        renamed={"embed_out.weight": "lm_head.weight"},
    ),
}
"""By `model_type` of a config.json."""
