"""GGUF files as models: their metadata as a config.json, their tensors as ours, with their own codes or dequantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sparsecli.console import Failure, warn_once
from sparsecli.decode.native.gguf import arrange
from sparsecli.interchange.architectures import architecture_of
from sparsecli.interchange.byte_pair_tokenizer import (
    LLAMA3,
    build_byte_pair_tokenizer,
    splitting_of,
    write_byte_pair_tokenizer,
)
from sparsecli.interchange.gguf_reader import BFLOAT16, FLOAT16, FLOATS, GgufReader, GgufTensor
from sparsecli.interchange.sentencepiece_tokenizer import SentencePieceVocabulary, write_tokenizer
from sparsecli.interchange.tensor_layouts import EXPERTS, EXPERTS_TRANSPOSED, TensorLayout
from sparsecli.model.files import last_line
from sparsecli.model.gguf_types import TYPES, GgufType, take_apart, weights_of
from sparsecli.model.tokenizer import GGUF_METADATA
from sparsecli.spec.base import MOST_LAYERS
from sparsecli.spec.model import ModelSpec

SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
ENDS = ("eos", "eot", "eom")
"""Tokens that end a text: of the text, of a turn, of a message to a tool."""
FREQUENCIES = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
FREQUENCY_TOLERANCE = 1e-5
NARROW = {FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}
KINDS = {kind.number: kind for kind in TYPES.values()}

Rows = Callable[[ModelSpec], list[np.ndarray]]
"""For each module of ours the rows of the file's tensor that are its own."""


@dataclass(frozen=True)
class GgufModule:
    """The modules of ours that one of the file's holds; without `rows` and `layout` it is one, as it is.

    With `layout` it is a tensor of ours in place of a module, and changes more than the order of its rows.
    """

    ours: tuple[str, ...]
    rows: Rows | None = None
    layout: TensorLayout | None = None


@dataclass(frozen=True)
class GgufArchitecture:
    """An architecture as llama.cpp writes it.

    Attributes:
        model_type: in transformers.
        config: keys of the metadata, below the architecture's name, by the fields of a config.json that they give.
        constants: fields that every such model has.
        outer, layer: modules outside of the layers, and those of every layer.
        biases: fields that say whether a module of the first layer has a bias.
        two_norms: what the norms of layers hold that are parallel and have two.
    """

    model_type: str
    config: Mapping[str, str]
    layer: Mapping[str, GgufModule]
    outer: Mapping[str, GgufModule]
    constants: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    rotary: bool = True
    two_norms: Mapping[str, GgufModule] = field(default_factory=dict)

    def modules(self, spec: ModelSpec) -> Iterator[tuple[str, GgufModule]]:
        """Names in the file, and what of ours they hold."""
        yield from self.outer.items()
        for index in range(spec.layers):
            for name, module in self.layer.items():
                if spec.parallel and not spec.shared_norm:
                    module = self.two_norms.get(name, module)
                ours = tuple(f"model.layers.{index}.{each}" for each in module.ours)
                yield f"blk.{index}.{name}", replace(module, ours=ours)


def _module(*ours: str, rows: Rows | None = None) -> GgufModule:
    return GgufModule(ours, rows)


def _unpaired(heads: Callable[[ModelSpec], int]) -> Rows:
    """llama.cpp puts the two elements that a rotary position turns side by side; we have halves, as transformers."""

    def rows(spec: ModelSpec) -> list[np.ndarray]:
        count, width = heads(spec), spec.width_of_head
        return [np.arange(count * width).reshape(count, width // 2, 2).swapaxes(1, 2).ravel()]

    return rows


def _query_heads(spec: ModelSpec) -> int:
    return spec.heads


def _key_heads(spec: ModelSpec) -> int:
    return spec.attention.key_value_heads or spec.heads


def _one_after_the_other(spec: ModelSpec) -> list[np.ndarray]:
    """Queries, keys and values in one tensor."""
    ends = np.cumsum([0, spec.attention_width, spec.key_width, spec.key_width])
    return [np.arange(first, last) for first, last in pairwise(ends)]


def _halves(spec: ModelSpec) -> list[np.ndarray]:
    """Gates and ups in one tensor."""
    units = spec.feed_forward.d_ff
    return [np.arange(units), np.arange(units, 2 * units)]


QUERY, KEY, VALUE = (f"attention.projection.{name}" for name in ("query", "key", "value"))
OUTER = {
    "token_embd": _module("model.embedding"),
    "position_embd": _module("model.position_embedding"),
    "output_norm": _module("model.norm"),
    "output": _module("head"),
}
LAYER = {
    "attn_norm": _module("attention_norm"),
    "attn_q": _module(QUERY),
    "attn_k": _module(KEY),
    "attn_v": _module(VALUE),
    "attn_qkv": _module(QUERY, KEY, VALUE, rows=_one_after_the_other),
    "attn_q_norm": _module("attention.projection.query_norm"),
    "attn_k_norm": _module("attention.projection.key_norm"),
    "attn_output": _module("attention.output"),
    "ffn_norm": _module("feed_forward_norm"),
    "ffn_gate": _module("feed_forward.gate"),
    "ffn_up": _module("feed_forward.up"),
    "ffn_down": _module("feed_forward.down"),
}
FUSED = {name: module for name, module in LAYER.items() if name not in ("attn_q", "attn_k", "attn_v")}
"""With queries, keys and values in one tensor only."""
PAIRED = LAYER | {
    "attn_q": _module(QUERY, rows=_unpaired(_query_heads)),
    "attn_k": _module(KEY, rows=_unpaired(_key_heads)),
}
GATED_IN_ONE = {name: module for name, module in FUSED.items() if name not in ("ffn_gate", "ffn_up")} | {
    "ffn_up": _module("feed_forward.gate", "feed_forward.up", rows=_halves)
}
EXPERT_LAYERS = {
    "ffn_gate_inp": _module("feed_forward.router"),
    "ffn_gate_exps": GgufModule(("feed_forward.gate",), layout=EXPERTS),
    "ffn_up_exps": GgufModule(("feed_forward.up",), layout=EXPERTS),
    "ffn_down_exps": GgufModule(("feed_forward.down",), layout=EXPERTS_TRANSPOSED),
}


def _with_experts(layer: Mapping[str, GgufModule]) -> dict[str, GgufModule]:
    dense = ("ffn_gate", "ffn_up", "ffn_down")
    return {name: module for name, module in layer.items() if name not in dense} | EXPERT_LAYERS


POST_NORMS = {
    "post_attention_norm": _module("attention_post_norm"),
    "post_ffw_norm": _module("feed_forward_post_norm"),
}
SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
GPT2_SIZES = {
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_inner": "feed_forward_length",
    "n_positions": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
EXPERT_SIZES = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
WINDOW = {"sliding_window": "attention.sliding_window"}
LLAMA_BIASES = {"attention_bias": "attn_q", "mlp_bias": "ffn_up"}
ARCHITECTURES = {
    "llama": GgufArchitecture("llama", SIZES, PAIRED, OUTER, biases=LLAMA_BIASES),
    "mistral": GgufArchitecture(
        "mistral",
        SIZES | WINDOW,
        PAIRED,
        OUTER,
        {"sliding_window": None},
    ),
    "mixtral": GgufArchitecture(
        "mixtral",
        SIZES | {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
        _with_experts(PAIRED),
        OUTER,
        {"sliding_window": None},
    ),
    "qwen2": GgufArchitecture("qwen2", SIZES, LAYER, OUTER),
    "qwen3moe": GgufArchitecture(
        "qwen3_moe",
        SIZES | EXPERT_SIZES | {"moe_intermediate_size": "expert_feed_forward_length"},
        _with_experts(LAYER),
        OUTER,
        {"norm_topk_prob": True},
        biases={"attention_bias": "attn_q"},
    ),
    "olmoe": GgufArchitecture(
        "olmoe", SIZES | EXPERT_SIZES, _with_experts(LAYER), OUTER, {"norm_topk_prob": False}
    ),
    "phi3": GgufArchitecture("phi3", SIZES | WINDOW, GATED_IN_ONE, OUTER, {"sliding_window": None}),
    "granite": GgufArchitecture(
        "granite",
        SIZES
        | {
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "attention_multiplier": "attention.scale",
            "logits_scaling": "logit_scale",
        },
        PAIRED,
        OUTER,
        biases=LLAMA_BIASES,
    ),
    "smollm3": GgufArchitecture(
        "smollm3", SIZES, PAIRED, OUTER, {"no_rope_layer_interval": 4}, biases=LLAMA_BIASES
    ),
    "stablelm": GgufArchitecture(
        "stablelm",
        SIZES | {"layer_norm_eps": "attention.layer_norm_epsilon"},
        LAYER,
        OUTER,
        biases={"use_qkv_bias": "attn_q"},
    ),
    "falcon": GgufArchitecture(
        "falcon",
        {
            "hidden_size": "embedding_length",
            "num_hidden_layers": "block_count",
            "num_attention_heads": "attention.head_count",
            "num_kv_heads": "attention.head_count_kv",
            "ffn_hidden_size": "feed_forward_length",
            "max_position_embeddings": "context_length",
            "layer_norm_epsilon": "attention.layer_norm_epsilon",
        },
        FUSED | {"attn_norm_2": _module("attention_norm")},
        OUTER,
        {"new_decoder_architecture": True},
        two_norms={"attn_norm": _module("feed_forward_norm")},
    ),
    "gemma2": GgufArchitecture(
        "gemma2",
        SIZES
        | WINDOW
        | {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        LAYER | POST_NORMS,
        OUTER,
        {"hidden_activation": "gelu_pytorch_tanh"},
    ),
    "qwen3": GgufArchitecture("qwen3", SIZES, LAYER, OUTER, biases={"attention_bias": "attn_q"}),
    "gemma": GgufArchitecture("gemma", SIZES, LAYER, OUTER, {"hidden_activation": "gelu_pytorch_tanh"}),
    "gemma3": GgufArchitecture(
        "gemma3_text",
        SIZES | {"sliding_window": "attention.sliding_window"},
        LAYER | POST_NORMS,
        OUTER,
        {"hidden_activation": "gelu_pytorch_tanh"},
    ),
    "olmo2": GgufArchitecture("olmo2", SIZES, LAYER | POST_NORMS, OUTER),
    "gpt2": GgufArchitecture("gpt2", GPT2_SIZES, FUSED, OUTER, rotary=False),
}
"""By `general.architecture`, but for those in `FILE_KINDS`."""
FILE_KINDS = {"mistral": "llama", "mixtral": "llama"}
"""llama.cpp writes these as others: Mistral's name tells, and Mixtral has experts."""
GEMMA2_27B_LAYERS = 46
GEMMA3_PERIOD, GEMMA3_LOCAL_BASE, GEMMA3_27B_LAYERS = 6, 10000.0, 62
"""Every sixth layer of Gemma 3 sees the whole text; the others turn positions with another base."""
UNUSED = ("attn_rot_embd", "rope_freqs", "rope_factors")
"""Tables of constants in some files, which are no weights."""


class GgufSource(Protocol):
    """What a file holds; see `GgufReader`."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class GgufCheckpoint:
    """A GGUF file.

    Args:
        reader: what the file at `path` holds, or is going to; by default it is read.

    Attributes:
        config: the config.json that is equivalent to its metadata.

    Raises:
        Failure: the file is damaged, or of an architecture or with a feature that cannot be imported.
    """

    def __init__(self, path: Path, reader: GgufSource | None = None) -> None:
        self.path, self.reader = path, reader or GgufReader(path)
        try:
            self.kind, self.rules = self._rules()
            self.config = self._config()
        except Failure as failure:
            raise Failure(f"{path}: {failure.message.removeprefix(f'{path}: ')}") from failure

    def _rules(self) -> tuple[str, GgufArchitecture]:
        kind = self.reader.metadata.get("general.architecture")
        if not isinstance(kind, str) or kind not in ARCHITECTURES or kind in FILE_KINDS:
            known = ", ".join(name for name in ARCHITECTURES if name not in FILE_KINDS)
            raise Failure(
                f"general.architecture: {kind!r} is not an architecture that can be imported ({known})"
            )
        if kind == "llama" and self.reader.metadata.get("llama.expert_count"):
            return kind, ARCHITECTURES["mixtral"]
        name = self.reader.metadata.get("general.name")
        if kind == "llama" and isinstance(name, str) and "mistral" in name.lower():
            return kind, ARCHITECTURES["mistral"]
        return kind, ARCHITECTURES[kind]

    def _value(self, key: str, *types: type) -> Any:
        """A value below the architecture's name; None where there is none."""
        value = self.reader.metadata.get(f"{self.kind}.{key}")
        if value is not None and (type(value) not in types):
            raise Failure(f"{self.kind}.{key}: {value!r} is not a number")
        return value

    def _config(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"model_type": self.rules.model_type, **self.rules.constants}
        for name, key in self.rules.config.items():
            if (value := self._value(key, int, float)) is not None:
                fields[name] = value
        layers = self._value("block_count", int)
        if layers is None or layers > MOST_LAYERS:
            raise Failure(f"{self.kind}.block_count: {layers} is not a number up to {MOST_LAYERS}")
        tensors = self.reader.tensors
        if "token_embd.weight" not in tensors:
            raise Failure("misses tensor token_embd.weight")
        fields["vocab_size"] = tensors["token_embd.weight"].shape[0]
        fields["tie_word_embeddings"] = "output.weight" not in tensors
        for name, module in self.rules.biases.items():
            fields[name] = f"blk.0.{module}.bias" in tensors
        if self.rules.rotary:
            fields["rope_parameters"] = self._rotary(fields)
        if self.kind == "gemma3":
            fields |= self._gemma3(fields, layers)
        elif self.kind == "gemma2":
            whole = fields["hidden_size"] // fields["num_attention_heads"]
            scale = whole if layers == GEMMA2_27B_LAYERS else self._width(fields)
            fields["query_pre_attn_scalar"] = scale
        elif self.kind == "phi3" and (original := self._value("rope.scaling.original_context_length", int)):
            fields["original_max_position_embeddings"] = original
        elif self.kind == "stablelm":
            fields["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in tensors
        elif self.kind == "falcon":
            fields["num_ln_in_parallel_attn"] = 2 if "blk.0.attn_norm_2.weight" in tensors else 1
        ids = {
            name: self.reader.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()
        }
        fields |= {f"{name}_id": ids[name] for name in ("bos_token", "pad_token") if ids[name] is not None}
        ends = {self.reader.metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ENDS} - {None}
        if ends:
            fields["eos_token_id"] = sorted(ends) if len(ends) > 1 else ends.pop()
        return {**fields, "architectures": [architecture_of(self.rules.model_type).class_name]}

    def _rotary(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        base = self._value("rope.freq_base", float, int)
        found: dict[str, Any] = {"rope_type": "default", "rope_theta": float(base or 10000.0)}
        scaling = self.reader.metadata.get(f"{self.kind}.rope.scaling.type", "none")
        factor = self._value("rope.scaling.factor", float, int)
        original = self._value("rope.scaling.original_context_length", int)
        attention_factor = float(self._value("rope.scaling.attn_factor", float, int) or 1.0)
        if LONG_FACTORS in self.reader.tensors:
            found |= {
                "rope_type": "longrope",
                "original_max_position_embeddings": original,
                "short_factor": self._numbers(SHORT_FACTORS),
                "long_factor": self._numbers(LONG_FACTORS),
                "attention_factor": attention_factor,
            }
        elif scaling == "linear" and factor:
            found |= {"rope_type": "linear", "factor": float(factor)}
        elif scaling == "yarn" and factor:
            found |= {
                "rope_type": "yarn",
                "factor": float(factor),
                "original_max_position_embeddings": original or fields["max_position_embeddings"],
                "attention_factor": attention_factor * (1 + 0.1 * math.log(factor)),
                "beta_fast": self._value("rope.scaling.yarn_beta_fast", float) or 32.0,
                "beta_slow": self._value("rope.scaling.yarn_beta_slow", float) or 1.0,
            }
        elif scaling != "none":
            raise Failure(f"{self.kind}.rope.scaling.type: {scaling!r} is not supported (none, linear, yarn)")
        width, turned = self._width(fields), self._value("rope.dimension_count", int)
        if turned is not None and turned != width:
            found["partial_rotary_factor"] = turned / width
        if FREQUENCIES in self.reader.tensors:
            divisors = self._floats(self.reader.tensors[FREQUENCIES]).float().ravel()
            found |= _llama3_scaling(divisors.numpy(), found["rope_theta"])
        return found

    def _numbers(self, name: str) -> list[float]:
        """A tensor of a few numbers."""
        if name not in self.reader.tensors:
            raise Failure(f"misses tensor {name}")
        return [float(number) for number in self._floats(self.reader.tensors[name]).ravel()]

    def _gemma3(self, fields: Mapping[str, Any], layers: int) -> dict[str, Any]:
        """What the files leave out: llama.cpp has it in its code."""
        if layers == GEMMA3_27B_LAYERS:
            raise Failure(
                "gemma3 with 62 layers: the file leaves out the scale of attention; import the original"
            )
        local = {"rope_type": "default", "rope_theta": GEMMA3_LOCAL_BASE}
        return {
            "rope_parameters": {"sliding_attention": local, "full_attention": fields["rope_parameters"]},
            "layer_types": [
                "full_attention" if index % GEMMA3_PERIOD == GEMMA3_PERIOD - 1 else "sliding_attention"
                for index in range(layers)
            ],
            "query_pre_attn_scalar": self._width(fields),
        }

    def _width(self, fields: Mapping[str, Any]) -> int:
        width = fields.get("head_dim")
        if width is None:
            sizes = [fields.get(name) for name in ("hidden_size", "num_attention_heads")]
            if not all(isinstance(size, int) and size > 0 for size in sizes):
                raise Failure(f"{self.kind}.embedding_length or attention.head_count: missing")
            width = sizes[0] // sizes[1]  # type: ignore[operator]
        if not isinstance(width, int) or width < 1:
            raise Failure(f"{self.kind}.attention.key_length: {width!r} is not a width")
        return width

    # -- tensors ---------------------------------------------------------------------------------------------

    def parts(self, spec: ModelSpec) -> list[GgufPart]:
        """The tensors of the file in the order of the computation, each with what of ours it holds."""
        found: list[GgufPart] = []
        tensors = self.reader.tensors
        for name, module in self.rules.modules(spec):
            for ending in ("weight", "bias"):
                if (tensor := tensors.get(f"{name}.{ending}")) is not None:
                    if module.layout:
                        found.append(
                            GgufPart(self, tensor, module.ours[0], None, _first(module.layout, spec))
                        )
                        continue
                    rows = module.rows(spec) if module.rows else [None] * len(module.ours)
                    found += [
                        GgufPart(self, tensor, f"{ours}.{ending}", order)
                        for ours, order in zip(module.ours, rows, strict=True)
                    ]
        known = {part.tensor.name for part in found}
        for name in tensors:
            if name not in known and not any(constant in name for constant in UNUSED):
                raise Failure(f"{self.path}: has unknown tensor {name[:60]}; import the original checkpoint")
        return found

    def _floats(self, tensor: GgufTensor) -> Tensor:
        """A tensor as float32, or in 16 bits where it is stored so."""
        if narrow := NARROW.get(tensor.kind):
            return torch.from_numpy(tensor.raw.copy()).view(narrow).view(tensor.shape)
        if tensor.kind in FLOATS:
            return torch.from_numpy(tensor.raw.view(FLOATS[tensor.kind]).astype(np.float32)).view(
                tensor.shape
            )
        if kind := KINDS.get(tensor.kind):
            return torch.from_numpy(_dequantized(kind, tensor.raw)).view(tensor.shape)
        from gguf import GGMLQuantizationType, dequantize

        kind_name = GGMLQuantizationType(tensor.kind).name
        warn_once(f"{self.path}: weights of the type {kind_name} become float32")
        try:
            return torch.from_numpy(dequantize(tensor.raw, GGMLQuantizationType(tensor.kind))).view(
                tensor.shape
            )
        except Exception as error:  # the library raises whatever its parsers do
            raise Failure(f"{self.path}: tensor {tensor.name} does not load: {last_line(error)}") from error

    def floats(self, tensor: GgufTensor) -> Tensor:
        """As `_floats`, which it checks for numbers that are not finite."""
        found = self._floats(tensor)
        if not torch.isfinite(found).all():
            raise Failure(f"tensor {tensor.name} holds a NaN or an infinity; the checkpoint is damaged")
        return found

    # -- the tokenizer ---------------------------------------------------------------------------------------

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer to `folder`.

        Its metadata go with it, for an export.

        Raises:
            Failure: the file has none, or of a kind that is not known.
        """
        assert isinstance(self.reader, GgufReader)
        (folder / GGUF_METADATA).write_bytes(self.reader.header)
        kind = self.reader.metadata.get("tokenizer.ggml.model")
        if kind not in ("llama", "gpt2"):
            raise Failure(f"{self.path}: tokenizer.ggml.model: {kind!r} is not supported (llama, gpt2)")
        tokens, kinds = self._list("tokens", str), self._list("token_type", int)
        kinds = kinds or [1] * len(tokens)
        if not tokens or len(kinds) != len(tokens):
            raise Failure(f"{self.path}: tokenizer.ggml: tokens and token_type differ in length")
        settings = self._tokenizer_settings(tokens)
        if kind == "llama":
            scores = self._list("scores", float)
            if len(scores) != len(tokens):
                raise Failure(f"{self.path}: tokenizer.ggml: tokens and scores differ in length")
            write_tokenizer(self._pieces(tokens, scores, kinds), settings, folder)
            return
        splitting = splitting_of(self.reader.metadata.get("tokenizer.ggml.pre", "default"))
        settings.setdefault("add_bos_token", splitting is LLAMA3)
        try:
            backend = build_byte_pair_tokenizer(tokens, self._list("merges", str), kinds, splitting)
        except Exception as error:  # the library's own
            raise Failure(f"{self.path}: tokenizer.ggml.merges: {last_line(error)}") from error
        write_byte_pair_tokenizer(backend, settings, folder)

    def _list(self, name: str, kind: type) -> list[Any]:
        values = self.reader.metadata.get(f"tokenizer.ggml.{name}", [])
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise Failure(f"{self.path}: tokenizer.ggml.{name}: is not a list of {kind.__name__}")
        return values

    def _pieces(self, tokens: list[str], scores: list[float], kinds: list[int]) -> SentencePieceVocabulary:
        metadata = self.reader.metadata
        return SentencePieceVocabulary(
            tokens,
            scores,
            kinds,
            prefix=metadata.get("tokenizer.ggml.add_space_prefix", True),
            squeezed=metadata.get("tokenizer.ggml.remove_extra_whitespaces", False),
            characters=bytes(
                byte & 255
                for byte in metadata.get("tokenizer.ggml.precompiled_charsmap", [])
                if type(byte) is int
            ),
        )

    def _tokenizer_settings(self, tokens: list[str]) -> dict[str, Any]:
        """Settings as in a tokenizer_config.json."""
        metadata = self.reader.metadata
        numbers = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
        settings: dict[str, Any] = {
            name: tokens[number]
            for name, number in numbers.items()
            if type(number) is int and number < len(tokens)
        }
        for name in ("add_bos_token", "add_eos_token"):
            if type(given := metadata.get(f"tokenizer.ggml.{name}")) is bool:
                settings[name] = given
        if isinstance(template := metadata.get("tokenizer.chat_template"), str):
            settings["chat_template"] = template
        return settings


def _first(layout: TensorLayout, spec: ModelSpec) -> Callable[[Tensor], Tensor]:
    """The one tensor of ours in a foreign one."""
    return lambda tensor: layout.to_ours(tensor, spec)[0]


@dataclass(frozen=True)
class GgufPart:
    """A tensor of ours in a file: some rows of one of its tensors, in some order; all of them as they are for None.

    With `convert` it is what this gives for the whole tensor.
    """

    file: GgufCheckpoint
    tensor: GgufTensor
    name: str
    rows: np.ndarray | None
    convert: Callable[[Tensor], Tensor] | None = None

    @property
    def kind(self) -> GgufType | None:
        """Its type, where that is one whose codes can be kept."""
        return None if self.convert else KINDS.get(self.tensor.kind)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights."""
        shape = self.tensor.shape
        if self.convert:
            return tuple(self.convert(torch.empty(shape, device="meta")).shape)
        return shape if self.rows is None else (len(self.rows), *shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of weights that are not kept as codes."""
        return NARROW.get(self.tensor.kind, torch.float32)

    def floats(self) -> Tensor:
        """The weights, dequantized.

        Raises:
            Failure: a NaN, an infinity, or a type that cannot be dequantized.
        """
        found = self.file.floats(self.tensor)
        if self.convert:
            return self.convert(found)
        return found if self.rows is None else found[torch.from_numpy(self.rows)]

    def codes(self) -> Tensor:
        """The codes as panels, see gguf_types.py.

        Raises:
            Failure: a scale that is a NaN or an infinity.
        """
        kind = self.kind
        assert kind
        raw = self.tensor.raw if self.rows is None else self.tensor.raw[self.rows]
        if not _finite(kind, raw):
            raise Failure(f"tensor {self.tensor.name} holds a NaN or an infinity; the checkpoint is damaged")
        return torch.from_numpy(arrange(kind, raw, self.tensor.shape[-1]))


def _dequantized(kind: GgufType, raw: np.ndarray) -> np.ndarray:
    """float32 weights (R, cols) of some rows, a part at a time."""
    cols = raw.shape[1] // kind.block_bytes * kind.block
    found = np.empty((len(raw), cols), np.float32)
    step = max(1, (1 << 21) // cols)
    for first in range(0, len(raw), step):
        found[first : first + step] = weights_of(kind, take_apart(kind, raw[first : first + step]))
    return found


def _finite(kind: GgufType, raw: np.ndarray) -> bool:
    """Whether the float16 scales of all blocks are finite."""
    blocks = raw.reshape(-1, kind.block_bytes)
    bits = np.ascontiguousarray(blocks[:, kind.halves]).view("<u2")
    return bool(((bits & 0x7C00) != 0x7C00).all())


def _llama3_scaling(divisors: np.ndarray, base: float) -> dict[str, Any]:
    """The parameters of Llama 3's scaling, with which a table of divisors of the frequencies was made.

    Raises:
        Failure: it was made with others.
    """
    width = 2 * len(divisors)
    frequencies = base ** -(np.arange(0, width, 2) / width)
    factor, low, high, original = round(float(divisors.max()), 4), 1.0, 4.0, 8192
    smooth = (original * frequencies / (2 * np.pi) - low) / (high - low)
    made = 1 / ((1 - np.clip(smooth, 0, 1)) / factor + np.clip(smooth, 0, 1))
    if not np.allclose(made, divisors, rtol=FREQUENCY_TOLERANCE):
        raise Failure(
            f"{FREQUENCIES}: rotary frequencies other than Llama 3's; import the original checkpoint"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
