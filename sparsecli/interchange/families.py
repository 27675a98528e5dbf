"""Families of foreign models: under which names their tensors lie, and what reads their configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsecli.console import Failure
from sparsecli.interchange.configurations import (
    read_gemma,
    read_gpt2,
    read_gpt_neox,
    read_llama,
    read_mistral,
    read_opt,
    read_qwen2,
    read_qwen3,
)
from sparsecli.interchange.forms import (
    ONE_LESS,
    POSITIONS_BEHIND,
    SAME,
    THREE_BY_HEAD,
    TRANSPOSED,
    TRANSPOSED_THREE,
    Form,
)
from sparsecli.model.tensors import Shape, tensor_shapes
from sparsecli.spec.model import ModelSpec

# Tables of constants that old files carry.
BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias))$")

NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
"""Fields of a configuration that no architecture depends on; old ones name tokens that there are not."""

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
                ours = tuple(f"model.layers.{index}.{module}" for module in place.ours)
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
    "llama": _llama_like("LlamaForCausalLM", read_llama),
    "mistral": _llama_like("MistralForCausalLM", read_mistral),
    "qwen2": _llama_like("Qwen2ForCausalLM", read_qwen2),
    "qwen3": _llama_like("Qwen3ForCausalLM", read_qwen3),
    "gemma": _llama_like("GemmaForCausalLM", read_gemma, norm=ONE_LESS),
    "gpt2": Family(
        "GPT2LMHeadModel",
        prefix="transformer.",
        read=read_gpt2,
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
        read=read_opt,
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
        read=read_gpt_neox,
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
