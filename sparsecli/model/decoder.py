"""What the three models share: embedding, positions, the decoder's layers, its norm and its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache

from sparsecli.model.cache import CACHE, DecodeCache
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.layers.attention import causal_mask
from sparsecli.model.layers.cross_entropy import token_loss
from sparsecli.model.layers.dropout import shared_dropout
from sparsecli.model.layers.gguf import GgufEmbedding, SketchedTiedHead, TiedHead, use_gguf_modules
from sparsecli.model.layers.multiplicative import MultiplicativeDense
from sparsecli.model.layers.positions import RotaryPositions
from sparsecli.model.layers.quantized import linear
from sparsecli.model.layers.reversible import Half, plain_stack, reversible_stack
from sparsecli.model.layers.tracing import tracing
from sparsecli.model.transformer_layers import (
    DecoderLayer,
    ReversibleLayer,
    build_norm,
    build_positions,
    build_rotary,
    build_sliding_rotary,
    merged,
    run_halves,
)
from sparsecli.model.versions import check_transformers
from sparsecli.spec.model import ModelSpec
from sparsecli.spec.vocabulary import MultiplicativeVocabularySpec

AttentionInputs = tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]
"""Arguments of `Attention` other than x: mask, valid and angles."""


class ScalingTransformerPreTrainedModel(PreTrainedModel):
    """What transformers asks of every model: its configuration class and its initialisers.

    Three things that other models have cannot be had:

    - Attention weights (`output_attentions`): they are never formed, and hashed attention has none of most pairs.
    - A cache of transformers' own form: a `DecodeCache` is preallocated, has room for more positions than it holds, and
      keeps what convolutions and recurrent units look back at.
    - Gradients of the hidden states between reversible layers: those are means of two streams, which the next layer
      does not read. Such layers store no activations, so that there is nothing to checkpoint either.
    """

    config_class = ScalingTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values", "cache"]
    _supports_sdpa = True

    def __init__(self, config: ScalingTransformerConfig) -> None:
        """Raises Failure: the installed transformers is too old."""
        check_transformers(transformers.__version__)
        super().__init__(config)
        # Reversible layers store no activations, and have no forward that could be wrapped or checkpointed.
        self.supports_gradient_checkpointing = config.residual != "reversible"
        names = ["DecoderLayer", "EncoderLayer"] if config.encoder else ["DecoderLayer"]
        self._no_split_modules = names if self.supports_gradient_checkpointing else []

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: transformers would copy the package's own files into every folder that is saved."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Glorot uniform for dense layers, as the original; our own layers know their initialisers."""
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=1e-6)
        elif isinstance(module, nn.Embedding):
            limit = (3 / module.embedding_dim) ** 0.5
            nn.init.uniform_(module.weight, -limit, limit)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()


class Decoder(ScalingTransformerPreTrainedModel):
    """The parts of a decoder, which the forward passes of the three models put together."""

    def __init__(self, config: ScalingTransformerConfig) -> None:
        super().__init__(config)
        spec = config.spec
        self.embedding = nn.Embedding(spec.vocabulary.size, spec.d_model)
        self.position_embedding = build_positions(spec, spec.max_positions)
        self.reversible = spec.residual == "reversible"
        kind = ReversibleLayer if self.reversible else DecoderLayer
        self.layers = nn.ModuleList(kind(spec, layer_idx) for layer_idx in range(spec.layers))
        self.attention_layers = spec.attention_layers
        self.merge = spec.merge
        self.norm = build_norm(spec, spec.merged_width)
        quantization = spec.quantization
        use_gguf_modules(self, quantization.gguf, "model.", spec.head_module, quantization.head_candidates)
        self.rotary = build_rotary(spec)
        self.sliding_rotary = build_sliding_rotary(spec)
        self.windows = [spec.window(layer) for layer in range(spec.layers)]
        self.rotary_tables = [spec.rotary_table(layer) for layer in range(spec.layers)]
        self.hashes = spec.attention.kind == "lsh"
        self.embedding_scale = spec.embedding_scale
        self.dropout = spec.dropout
        self.gradient_checkpointing = False

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """The vectors (B, T, d) of tokens (B, T), or those that are given instead.

        Raises:
            ValueError: not exactly one of them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass input_ids or inputs_embeds, one of them")
        # A table in a GGUF type gives float32.
        x = self.embedding(input_ids).to(self.dtype) if inputs_embeds is None else inputs_embeds
        return x if self.embedding_scale == 1 else x * self.embedding_scale

    def add_positions(self, x: Tensor, position_ids: Tensor, past_length: int) -> Tensor:
        """x (B, T, d) with its positions (B or 1, T) added, of which `past_length` came before; dropped in training.

        Raises:
            ValueError: more positions than the model has.
        """
        if self.position_embedding is not None:
            if (positions := past_length + x.shape[1]) > self.config.max_positions:
                raise ValueError(
                    f"{positions} positions are more than max_positions {self.config.max_positions}; what is given "
                    "and what `generate` adds (max_new_tokens) may not be longer together"
                )
            # A row for each sequence: in training they may count from different numbers.
            x = x + self.position_embedding(position_ids.expand(x.shape[:2])).to(x.dtype)
        return shared_dropout(x, self.dropout, self.training, (-2,))

    def open_cache(
        self, past_key_values: Cache | None, cache: Cache | None, use_cache: bool | None
    ) -> DecodeCache | None:
        """The cache that was given, under one of its two names, or a new one with `use_cache`.

        Where that is None the configuration decides, in evaluation; training makes none. Layers that are computed again
        in the backward pass cannot extend one.

        Raises:
            ValueError: two caches, or one of another kind.
        """
        recomputed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if past_key_values is not None and cache is not None:
            raise ValueError("past_key_values and cache are two names for one cache; pass one of them")
        given = past_key_values if cache is None else cache
        if given is None:
            layers = len(self.layers) * self.attention_layers
            return DecodeCache(layers) if use_cache and not recomputed else None
        if recomputed:
            raise ValueError("a cache cannot be extended by layers that the backward pass computes again")
        if not isinstance(given, DecodeCache):
            raise ValueError(f"the cache is a {type(given).__name__}; this model keeps a DecodeCache")
        return given

    def returns_hidden_states(self, output_hidden_states: bool | None) -> bool:
        """Whether hidden states are to be returned: as asked, else as the configuration has it."""
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return bool(asked)

    def run_layers(
        self,
        streams: tuple[Tensor, Tensor],
        valid: Tensor | None,
        position_ids: Tensor,
        cache: DecodeCache | None,
        encoder_hidden_states: Tensor | None = None,
        encoder_valid: Tensor | None = None,
        keep_streams: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """The output of the layers for new tokens, before the norm.

        Args:
            streams: two of (B, T, d) for reversible layers; others read the first.
            valid: bool (B, past positions + T), false at padding; None where there is none.
            position_ids: (B or 1, T), for rotary positions.
            encoder_hidden_states: (B, S, d), for cross-attention.
            encoder_valid: bool (B, S), false at padding; None where there is none.
            keep_streams: also return the stream before each layer (of two the mean).
        Returns:
            (B, T, d), or (B, T, 2 d) where streams are merged side by side, and the streams that were asked for.
        """
        past_length = cache.length if cache is not None else 0
        if self.rotary and cache is not None:
            self._check_rotary(self.rotary, cache, position_ids)
        inputs = self.attention_inputs(streams[0], valid, position_ids, past_length)
        layer_caches = None if cache is None else cache.layers
        if self.reversible:
            return self._two_streams(streams, inputs[0], layer_caches, keep_streams)
        return self._one_stream(
            streams[0], inputs, (encoder_hidden_states, encoder_valid), layer_caches, keep_streams
        )

    def attention_inputs(
        self, x: Tensor, valid: Tensor | None, position_ids: Tensor, past_length: int
    ) -> list[AttentionInputs]:
        """What attention reads in each layer beside x (B, T, d): see `run_layers`."""
        new, keys = x.shape[1], past_length + x.shape[1]
        angles: dict[str, tuple[Tensor, Tensor] | None] = {"none": None}
        for table, rotary in (("full", self.rotary), ("sliding", self.sliding_rotary)):
            angles[table] = rotary(position_ids) if rotary else None
        # None is plainly causal: one new token sees everything, a first pass is a triangle. Hashing needs no mask.
        masks: dict[int | None, Tensor | None] = {None: None}
        if not self.hashes and (valid is not None or (past_length and new > 1)):
            masks[None] = causal_mask(valid, new, keys, x.device)
        for window in set(self.windows) - {None}:
            masks[window] = causal_mask(valid, new, keys, x.device, window)
        new_valid = None if valid is None else valid[:, past_length:]
        return [
            (masks[window], new_valid, angles[table])
            for window, table in zip(self.windows, self.rotary_tables, strict=True)
        ]

    @staticmethod
    def _check_rotary(rotary: RotaryPositions, cache: DecodeCache, position_ids: Tensor) -> None:
        """Raise ValueError where the cache's keys were turned by other frequencies than new ones are."""
        if rotary.long_frequencies is None or torch.compiler.is_compiling() or tracing():
            return
        long = rotary.is_long(position_ids)
        if cache.length and cache.long_rotary != long:
            raise ValueError(
                f"a text that grows beyond {rotary.switch} positions turns all of them by its long rotary factors; "
                "compute it anew, without a cache of its beginning"
            )
        cache.long_rotary = long

    def _one_stream(
        self,
        x: Tensor,
        inputs: Sequence[AttentionInputs],
        encoded: tuple[Tensor | None, Tensor | None],
        layer_caches: list[Any] | None,
        keep_streams: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        kept = []
        for index, layer in enumerate(self.layers):
            if keep_streams:
                kept.append(x)
            layer_cache = None if layer_caches is None else layer_caches[index]
            x = layer(x, *inputs[index], *encoded, layer_cache=layer_cache)
        return x, kept

    def _two_streams(
        self,
        streams: tuple[Tensor, Tensor],
        inputs: AttentionInputs,
        layer_caches: list[Any] | None,
        keep_streams: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        halves: list[list[Half]] = []
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, ReversibleLayer)
            first, last = index * self.attention_layers, (index + 1) * self.attention_layers
            halves.append(layer.halves(*inputs, None if layer_caches is None else layer_caches[first:last]))
        # What extends a cache cannot be computed twice.
        run = reversible_stack if layer_caches is None else plain_stack
        (a, b), kept = run_halves(halves, streams, run, keep_streams)
        return merged(a, b, self.merge).to(streams[0].dtype), kept

    def final_norm(self, x: Tensor) -> Tensor:
        """What the logits read of the output of `run_layers`."""
        x = self.norm(x)
        if self.merge == "concatenate":  # where the original drops features, and only there
            x = shared_dropout(x, self.dropout, self.training, (-2,))
        return x


def valid_positions(attention_mask: Tensor | None) -> Tensor | None:
    """Bool (B, positions), or None where nothing is padding (looked up only where no program is made of it).

    Raises:
        ValueError: a mask of another shape.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask has {attention_mask.ndim} axes; expected (batch, positions)")
    valid = attention_mask.bool()
    if not (torch.compiler.is_compiling() or tracing()) and bool(valid.all()):
        return None
    return valid


def count_positions(valid: Tensor | None, past_length: int, new: int, device: torch.device) -> Tensor:
    """The numbers (B or 1, new) of the positions after `past_length`, counting tokens that are not padding."""
    if valid is None:
        return torch.arange(past_length, past_length + new, device=device).unsqueeze(0)
    return (valid.long().cumsum(-1) - 1).clamp(min=0)[:, past_length:]


def _has_adapter(module: nn.Module) -> bool:
    """Whether peft has wrapped a module, for an update of low rank or for a copy that trains."""
    return hasattr(module, "base_layer") or hasattr(module, "modules_to_save")


def build_head(spec: ModelSpec) -> nn.Module:
    """The logits: dense (optionally tied to the embedding) or multiplicative (the paper's sparse loss layer)."""
    vocabulary = spec.vocabulary
    if isinstance(vocabulary, MultiplicativeVocabularySpec):
        return MultiplicativeDense(spec.merged_width, vocabulary.size, vocabulary.modules)
    return linear(spec.merged_width, vocabulary.size, vocabulary.bias, spec.quantization.head)


class LanguageModel(ScalingTransformerPreTrainedModel, GenerationMixin):
    """A decoder with its logits, for transformers' `generate`; subclasses name the decoder, and have the forward."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"head.weight": "model.embedding.weight"}
    model_class: ClassVar[type[Decoder]]
    _loss_function = staticmethod(token_loss)

    def __init__(self, config: ScalingTransformerConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.head = build_head(config.spec)
        candidates = config.spec.quantization.head_candidates
        of_head = {k: v for k, v in config.spec.quantization.gguf.items() if k == "head"}
        use_gguf_modules(self, of_head, head="head", candidates=candidates)
        if config.spec.tied and isinstance(self.model.embedding, GgufEmbedding):
            embedding = self.model.embedding
            self.head = SketchedTiedHead(embedding, candidates) if candidates else TiedHead(embedding)
            self._tied_weights_keys = {}  # type: ignore[misc]
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head if isinstance(self.head, nn.Linear) else None

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head = value

    def untie(self) -> None:
        """Give the head weights of its own, a copy of the embedding's. Models whose head is not tied stay as they are.

        Raises:
            ValueError: the embedding keeps the codes of a GGUF file.
        """
        if not self.config.tie_word_embeddings:
            return
        if not isinstance(self.head, nn.Linear):
            raise ValueError(
                "the embedding keeps the codes of a GGUF file; import it with --dtype float32 to untie it"
            )
        self.head.weight = nn.Parameter(self.model.embedding.weight.detach().clone())
        self.config.vocabulary = {**self.config.spec.vocabulary.model_dump(), "tied": False}
        self.config.tie_word_embeddings = False

    def logits(self, x: Tensor, keep: int | Tensor) -> Tensor:
        """Logits (B, kept, V) of x (B, T, d): of so many last positions (0: all), or of those that a tensor names.

        Raises:
            ValueError: the head is tied to the embedding, and one of them has an adapter.
        """
        if self.config.tie_word_embeddings and (
            _has_adapter(self.head) or _has_adapter(self.model.embedding)
        ):
            raise ValueError(
                "an adapter of the embedding or the head would change both when it is merged, since they are tied; "
                "call untie() on the model before, or leave `embedding` and `head` out of the adapter's targets"
            )
        return self.scaled_logits(self.head(x[:, slice(-keep, None) if isinstance(keep, int) else keep]))

    def scaled_logits(self, logits: Tensor) -> Tensor:
        """What the head computes (..., V), with the model's factor and limit."""
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        if (limit := self.config.logit_softcap) is not None:
            logits = limit * torch.tanh(logits / limit)
        return logits

    def prefix_length_of(self, model_kwargs: dict[str, Any]) -> int:
        """Positions of the cache in front of those that `generate` counts."""
        return 0

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Empty the cache of a text that has just grown beyond the short rotary frequencies: it is computed anew."""
        cache, rotary = kwargs.get(CACHE), self.model.rotary
        if isinstance(cache, DecodeCache) and cache.length and rotary and rotary.long_frequencies is not None:
            mask = kwargs.get("attention_mask")
            tokens = input_ids.shape[1] if mask is None else int(mask.sum(-1).max())
            if cache.long_rotary != (tokens > rotary.switch):
                cache.reset()
                kwargs["next_sequence_length"] = None
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Give `generate` our preallocated cache instead of the stock one, which copies itself at every token."""
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            capacity = self.prefix_length_of(model_kwargs) + max_cache_length
            model_kwargs[CACHE] = DecodeCache.for_model(self.config.spec, capacity)
