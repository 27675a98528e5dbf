"""The table of foreign architectures: the names of their tensors, and the readers of their configurations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsecli.console import Failure
from sparsecli.interchange.huggingface_configs import (
    read_falcon,
    read_gemma,
    read_gemma2,
    read_gemma3,
    read_gpt2,
    read_gpt_neox,
    read_gptj,
    read_granite,
    read_llama,
    read_mistral,
    read_mixtral,
    read_olmo2,
    read_olmoe,
    read_opt,
    read_phi3,
    read_qwen2,
    read_qwen3,
    read_qwen3_moe,
    read_smollm3,
    read_stablelm,
)
from sparsecli.interchange.tensor_layouts import (
    EXPERTS,
    EXPERTS_TRANSPOSED,
    HALVES,
    NORM_MINUS_ONE,
    POSITIONS_AFTER_PADDING,
    QKV_BY_GROUP,
    QKV_BY_ROWS,
    ROTARY_PAIRS,
    TRANSPOSED,
    TRANSPOSED_QKV,
    UNCHANGED,
    TensorLayout,
)
from sparsecli.model.tensors import Shape, tensor_shapes
from sparsecli.spec.model import ModelSpec

# Constant tensors in old files.
BUFFERS = re.compile(r"\.((rotary_emb|rotary|maybe_rotary)\.inv_freq|(attn|attention)\.(bias|masked_bias))$")

NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
"""Configuration fields that no architecture depends on; old files name tokens that do not exist."""

QUERY_KEY_VALUE = tuple(f"attention.projection.{name}" for name in ("query", "key", "value"))


@dataclass(frozen=True)
class ModuleMapping:
    """The modules of ours whose tensors one foreign module holds."""

    ours: tuple[str, ...]
    layout: TensorLayout = UNCHANGED


def _modules(*ours: str, layout: TensorLayout = UNCHANGED) -> ModuleMapping:
    return ModuleMapping(ours, layout)


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor of a foreign checkpoint, and the tensors of ours that it holds."""

    name: str
    ours: tuple[str, ...]
    layout: TensorLayout
    shape: Shape

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ForeignArchitecture:
    """A foreign architecture.

    Attributes:
        class_name: the class in transformers.
        prefix: of all tensor names but the head's; files of the model without a head lack it.
        read_config: fields of a `ModelSpec` for a configuration, and `head_bias` for a bias on the logits; raises
            Failure for a field that ours cannot express.
        outer: modules outside the layers.
        layers: the list of layers.
        layer: modules of every layer; a `*` stands for the numbers of experts, see `StackedReader`.
        renamed: current names of tensors by their names in older files.
        two_norms: other names of modules in layers that are parallel and have two norms.
    """

    class_name: str
    prefix: str
    read_config: Callable[[Any], dict[str, Any]]
    outer: Mapping[str, ModuleMapping]
    layers: str
    layer: Mapping[str, ModuleMapping]
    renamed: Mapping[str, str] = field(default_factory=dict)
    two_norms: Mapping[str, str] = field(default_factory=dict)

    def spec(self, config: Any) -> ModelSpec:
        """Our architecture for a transformers configuration.

        Raises:
            Failure: a field has a value that ours cannot express; the message begins with its name.
        """
        if getattr(config, "quantization_config", None):
            raise Failure("quantization_config: only weights that are not quantized can be imported")
        tied = bool(config.tie_word_embeddings)
        fields = self.read_config(config)
        bias = fields.pop("head_bias", False)
        vocabulary = {"kind": "dense", "size": config.vocab_size, "tied": tied, "bias": bias}
        try:
            return ModelSpec.from_config({**fields, "vocabulary": vocabulary})
        except ValueError as error:
            raise Failure(str(error)) from error

    def foreign_tensors(self, spec: ModelSpec) -> list[ForeignTensor]:
        """The tensors of a checkpoint of this architecture, in the order of the computation, without a tied head."""
        shapes = tensor_shapes(spec)
        if spec.tied:
            del shapes["head.weight"]
        found: list[ForeignTensor] = []
        for name, mapping in self._mappings(spec):
            for kind in ("weight", "bias"):
                ours = tuple(f"{module}.{kind}" for module in mapping.ours)
                if (
                    kind == "weight" and mapping.ours[0] in shapes
                ):  # units of experts are tensors, not modules
                    ours = mapping.ours
                if ours[0] in shapes:
                    empty = [torch.empty(shapes[each], device="meta") for each in ours]
                    shape = tuple(mapping.layout.to_foreign(empty, spec).shape)
                    found.append(ForeignTensor(f"{name}.{kind}", ours, mapping.layout, shape))
        assert {ours for tensor in found for ours in tensor.ours} == shapes.keys()
        return found

    def _mappings(self, spec: ModelSpec) -> Iterator[tuple[str, ModuleMapping]]:
        *first, last, head = self.outer.items()
        yield from first
        for index in range(spec.layers):
            for name, mapping in self.layer.items():
                if spec.parallel and not spec.shared_norm:
                    name = self.two_norms.get(name, name)
                ours = tuple(f"model.layers.{index}.{module}" for module in mapping.ours)
                yield f"{self.layers}.{index}.{name}", ModuleMapping(ours, mapping.layout)
        yield from (last, head)

    def canonical_names(self, names: list[str]) -> dict[str, str]:
        """Names in a file by the names of `foreign_tensors`, without constant tensors."""
        bare = not any(name.startswith(self.prefix) for name in names)
        found: dict[str, str] = {}
        for name in names:
            if BUFFERS.search(name):
                continue
            known = self.renamed.get(name, name)
            outside = known.startswith((self.prefix, "lm_head."))
            found[known if outside or not bare else self.prefix + known] = name
        return found


def architecture_of(kind: object) -> ForeignArchitecture:
    """The architecture of a `model_type`.

    Raises:
        Failure: it is not one that can be imported.
    """
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise Failure(
            f"model_type: {kind!r} is not an architecture that can be imported ({', '.join(ARCHITECTURES)})"
        )
    return ARCHITECTURES[kind]


# -- tensor names ---------------------------------------------------------------------------------------------


NORMS_BEFORE = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm"}
NORMS_AFTER = {
    "post_attention_layernorm": "attention_post_norm",
    "post_feedforward_layernorm": "feed_forward_post_norm",
}
NORMS_AROUND = {
    "input_layernorm": "attention_norm",
    "pre_feedforward_layernorm": "feed_forward_norm",
    **NORMS_AFTER,
}
"""Norms of a layer by their foreign names."""


OUTER = {
    "model.embed_tokens": _modules("model.embedding"),
    "model.norm": _modules("model.norm"),
    "lm_head": _modules("head"),
}
GATED = {
    "mlp.gate_proj": _modules("feed_forward.gate"),
    "mlp.up_proj": _modules("feed_forward.up"),
    "mlp.down_proj": _modules("feed_forward.down"),
}


def _experts(prefix: str, gate: str, up: str, down: str) -> dict[str, ModuleMapping]:
    """A router and its experts, by the names of an expert's matrices."""
    return {
        f"{prefix}.gate": _modules("feed_forward.router"),
        f"{prefix}.experts.*.{gate}": _modules("feed_forward.gate", layout=EXPERTS),
        f"{prefix}.experts.*.{up}": _modules("feed_forward.up", layout=EXPERTS),
        f"{prefix}.experts.*.{down}": _modules("feed_forward.down", layout=EXPERTS_TRANSPOSED),
    }


def _llama_like(
    class_name: str,
    read_config: Callable[[Any], dict[str, Any]],
    norm: TensorLayout = UNCHANGED,
    norms: Mapping[str, str] = NORMS_BEFORE,
    feed_forward: Mapping[str, ModuleMapping] = GATED,
) -> ForeignArchitecture:
    return ForeignArchitecture(
        class_name,
        prefix="model.",
        read_config=read_config,
        outer={**OUTER, "model.norm": _modules("model.norm", layout=norm)},
        layers="model.layers",
        layer={
            **{name: _modules(ours, layout=norm) for name, ours in norms.items()},
            "self_attn.q_proj": _modules("attention.projection.query"),
            "self_attn.k_proj": _modules("attention.projection.key"),
            "self_attn.v_proj": _modules("attention.projection.value"),
            "self_attn.q_norm": _modules("attention.projection.query_norm", layout=norm),
            "self_attn.k_norm": _modules("attention.projection.key_norm", layout=norm),
            "self_attn.o_proj": _modules("attention.output"),
            **feed_forward,
        },
    )


ARCHITECTURES = {
    "llama": _llama_like("LlamaForCausalLM", read_llama),
    "mistral": _llama_like("MistralForCausalLM", read_mistral),
    "qwen2": _llama_like("Qwen2ForCausalLM", read_qwen2),
    "qwen3": _llama_like("Qwen3ForCausalLM", read_qwen3),
    "gemma": _llama_like("GemmaForCausalLM", read_gemma, norm=NORM_MINUS_ONE),
    "gemma2": _llama_like("Gemma2ForCausalLM", read_gemma2, norm=NORM_MINUS_ONE, norms=NORMS_AROUND),
    "gemma3_text": _llama_like("Gemma3ForCausalLM", read_gemma3, norm=NORM_MINUS_ONE, norms=NORMS_AROUND),
    "olmo2": _llama_like("Olmo2ForCausalLM", read_olmo2, norms=NORMS_AFTER),
    "smollm3": _llama_like("SmolLM3ForCausalLM", read_smollm3),
    "granite": _llama_like("GraniteForCausalLM", read_granite),
    "phi3": ForeignArchitecture(
        "Phi3ForCausalLM",
        prefix="model.",
        read_config=read_phi3,
        outer=OUTER,
        layers="model.layers",
        layer={
            "input_layernorm": _modules("attention_norm"),
            "self_attn.qkv_proj": _modules(*QUERY_KEY_VALUE, layout=QKV_BY_ROWS),
            "self_attn.o_proj": _modules("attention.output"),
            "post_attention_layernorm": _modules("feed_forward_norm"),
            "mlp.gate_up_proj": _modules("feed_forward.gate", "feed_forward.up", layout=HALVES),
            "mlp.down_proj": _modules("feed_forward.down"),
        },
    ),
    "mixtral": _llama_like(
        "MixtralForCausalLM", read_mixtral, feed_forward=_experts("block_sparse_moe", "w1", "w3", "w2")
    ),
    "qwen3_moe": _llama_like(
        "Qwen3MoeForCausalLM",
        read_qwen3_moe,
        feed_forward=_experts("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
    "olmoe": _llama_like(
        "OlmoeForCausalLM", read_olmoe, feed_forward=_experts("mlp", "gate_proj", "up_proj", "down_proj")
    ),
    "stablelm": _llama_like("StableLmForCausalLM", read_stablelm),
    "falcon": ForeignArchitecture(
        "FalconForCausalLM",
        prefix="transformer.",
        read_config=read_falcon,
        outer={
            "transformer.word_embeddings": _modules("model.embedding"),
            "transformer.ln_f": _modules("model.norm"),
            "lm_head": _modules("head"),
        },
        layers="transformer.h",
        layer={
            "input_layernorm": _modules("attention_norm"),
            "self_attention.query_key_value": _modules(*QUERY_KEY_VALUE, layout=QKV_BY_GROUP),
            "self_attention.dense": _modules("attention.output"),
            "post_attention_layernorm": _modules("feed_forward_norm"),
            "mlp.dense_h_to_4h": _modules("feed_forward.up"),
            "mlp.dense_4h_to_h": _modules("feed_forward.down"),
        },
        two_norms={"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"},
    ),
    "gptj": ForeignArchitecture(
        "GPTJForCausalLM",
        prefix="transformer.",
        read_config=read_gptj,
        outer={
            "transformer.wte": _modules("model.embedding"),
            "transformer.ln_f": _modules("model.norm"),
            "lm_head": _modules("head"),
        },
        layers="transformer.h",
        layer={
            "ln_1": _modules("attention_norm"),
            "attn.q_proj": _modules("attention.projection.query", layout=ROTARY_PAIRS),
            "attn.k_proj": _modules("attention.projection.key", layout=ROTARY_PAIRS),
            "attn.v_proj": _modules("attention.projection.value"),
            "attn.out_proj": _modules("attention.output"),
            "mlp.fc_in": _modules("feed_forward.up"),
            "mlp.fc_out": _modules("feed_forward.down"),
        },
    ),
    "gpt2": ForeignArchitecture(
        "GPT2LMHeadModel",
        prefix="transformer.",
        read_config=read_gpt2,
        outer={
            "transformer.wte": _modules("model.embedding"),
            "transformer.wpe": _modules("model.position_embedding"),
            "transformer.ln_f": _modules("model.norm"),
            "lm_head": _modules("head"),
        },
        layers="transformer.h",
        layer={
            "ln_1": _modules("attention_norm"),
            "attn.c_attn": _modules(*QUERY_KEY_VALUE, layout=TRANSPOSED_QKV),
            "attn.c_proj": _modules("attention.output", layout=TRANSPOSED),
            "ln_2": _modules("feed_forward_norm"),
            "mlp.c_fc": _modules("feed_forward.up", layout=TRANSPOSED),
            "mlp.c_proj": _modules("feed_forward.down", layout=TRANSPOSED),
        },
    ),
    "opt": ForeignArchitecture(
        "OPTForCausalLM",
        prefix="model.",
        read_config=read_opt,
        outer={
            "model.decoder.embed_tokens": _modules("model.embedding"),
            "model.decoder.embed_positions": _modules(
                "model.position_embedding", layout=POSITIONS_AFTER_PADDING
            ),
            "model.decoder.final_layer_norm": _modules("model.norm"),
            "lm_head": _modules("head"),
        },
        layers="model.decoder.layers",
        layer={
            "self_attn_layer_norm": _modules("attention_norm"),
            "self_attn.q_proj": _modules("attention.projection.query"),
            "self_attn.k_proj": _modules("attention.projection.key"),
            "self_attn.v_proj": _modules("attention.projection.value"),
            "self_attn.out_proj": _modules("attention.output"),
            "final_layer_norm": _modules("feed_forward_norm"),
            "fc1": _modules("feed_forward.up"),
            "fc2": _modules("feed_forward.down"),
        },
    ),
    "gpt_neox": ForeignArchitecture(
        "GPTNeoXForCausalLM",
        prefix="gpt_neox.",
        read_config=read_gpt_neox,
        outer={
            "gpt_neox.embed_in": _modules("model.embedding"),
            "gpt_neox.final_layer_norm": _modules("model.norm"),
            "lm_head": _modules("head"),
        },
        layers="gpt_neox.layers",
        layer={
            "input_layernorm": _modules("attention_norm"),
            "attention.query_key_value": _modules(*QUERY_KEY_VALUE, layout=QKV_BY_GROUP),
            "attention.dense": _modules("attention.output"),
            "post_attention_layernorm": _modules("feed_forward_norm"),
            "mlp.dense_h_to_4h": _modules("feed_forward.up"),
            "mlp.dense_4h_to_h": _modules("feed_forward.down"),
        },
        renamed={"embed_out.weight": "lm_head.weight"},
    ),
}
"""By `model_type` of a config.json."""
