"""The decoder-only Scaling Transformer (paper section 3), a Hugging Face model like any other."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from sparsecli.model.blocks import (
    ReversibleBlock,
    ScalingTransformerBlock,
    build_norm,
    build_positions,
    merged,
)
from sparsecli.model.cache import DecodeCache
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.layers.attention import causal_mask
from sparsecli.model.layers.dropout import shared_dropout
from sparsecli.model.layers.low_bit import linear
from sparsecli.model.layers.multiplicative import MultiplicativeDense
from sparsecli.model.layers.positions import rotary_angles
from sparsecli.model.layers.reversible import Half, plain_stack, reversible_stack
from sparsecli.model.parts import MultiplicativeVocabularySpec
from sparsecli.model.rotary import rotary_frequencies

Sight = tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]
"""What attention is told of its tokens: mask, valid and angles, see `Attention`."""


class ScalingTransformerPreTrainedModel(PreTrainedModel):
    """What transformers asks of every model: its configuration class and its initialisers."""

    config_class = ScalingTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["ScalingTransformerBlock", "ReversibleBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True

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


class ScalingTransformerModel(ScalingTransformerPreTrainedModel):
    """Embedding, positions, blocks and the final norm."""

    def __init__(self, config: ScalingTransformerConfig) -> None:
        super().__init__(config)
        spec = config.spec
        self.embedding = nn.Embedding(spec.vocabulary.size, spec.d_model)
        self.position_embedding = build_positions(spec, spec.max_positions)
        self.reversible = spec.residual == "reversible"
        block = ReversibleBlock if self.reversible else ScalingTransformerBlock
        self.blocks = nn.ModuleList(block(spec, layer) for layer in range(spec.layers))
        self.attention_layers = spec.attention_layers
        self.merge = spec.merge
        self.norm = build_norm(spec, spec.merged_width)
        self.rotary = rotary_frequencies(spec).tolist() if spec.positions == "rotary" else None
        self.hashes = spec.attention.kind == "lsh"
        self.embedding_scale = spec.embedding_scale
        self.dropout = spec.dropout
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, d) of input_ids (B, T).

        Args:
            attention_mask: (B, positions held + T), 0 at padding, which must be on the left when decoding.
            position_ids: (B, T); by default positions count the tokens that are not padding.
            past_key_values: earlier positions, a `DecodeCache`; with `use_cache` one is made where it is None.
            output_hidden_states: also return the stream before each block (of two streams the mean) and what comes
                after the norm.
        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds, a sequence past max_positions, or a cache
                of another kind.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass input_ids or inputs_embeds, one of them")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        new = x.shape[1]
        if use_cache and past_key_values is None:
            past_key_values = DecodeCache.for_model(self.config.spec)
        if past_key_values is not None and not isinstance(past_key_values, DecodeCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; this model keeps a DecodeCache"
            )
        held = past_key_values.get_seq_length() if past_key_values is not None else 0
        if held + new > self.config.max_positions and self.position_embedding is not None:
            raise ValueError(
                f"{held + new} positions are more than max_positions {self.config.max_positions}"
            )

        valid = self._valid_positions(attention_mask)
        if position_ids is None:
            if valid is None:
                position_ids = torch.arange(held, held + new, device=x.device).unsqueeze(0)
            else:
                position_ids = (valid.long().cumsum(-1) - 1).clamp(min=0)[:, held:]
        if self.position_embedding is not None:
            # A row for each sequence: in training they may count from different numbers.
            x = x + self.position_embedding(position_ids.expand(x.shape[:2])).to(x.dtype)
        x = shared_dropout(x, self.dropout, self.training, (-2,))
        angles = rotary_angles(position_ids, self.rotary) if self.rotary else None

        # None is plainly causal: one new token sees everything, a first pass is a triangle. Hashing needs no mask.
        mask = None
        if not self.hashes and (valid is not None or (held and new > 1)):
            mask = causal_mask(valid, new, held + new, x.device)
        valid_new = None if valid is None else valid[:, held:]
        memories = None if past_key_values is None else past_key_values.layers
        run = self._two_streams if self.reversible else self._one_stream
        x, streams = run(x, (mask, valid_new, angles), memories, bool(output_hidden_states))
        x = self.norm(x)
        if self.merge == "concatenate":  # where the original drops features, and only there
            x = shared_dropout(x, self.dropout, self.training, (-2,))
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*streams, x) if output_hidden_states else None,
        )

    def _one_stream(
        self, x: Tensor, sight: Sight, memories: list[Any] | None, keep_streams: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The stream after all blocks, and those before each of them where they are wanted."""
        streams = []
        for index, block in enumerate(self.blocks):
            if keep_streams:
                streams.append(x)
            x = block(x, *sight, past_key_values=None if memories is None else memories[index])
        return x, streams

    def _two_streams(
        self, x: Tensor, sight: Sight, memories: list[Any] | None, keep_streams: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """As `_one_stream`, for reversible blocks: all halves are one stack, unless streams in between are wanted."""
        halves: list[list[Half]] = []
        for index, block in enumerate(self.blocks):
            assert isinstance(block, ReversibleBlock)
            first, last = index * self.attention_layers, (index + 1) * self.attention_layers
            halves.append(block.halves(*sight, None if memories is None else memories[first:last]))
        stacks = halves if keep_streams else [list(itertools.chain(*halves))]
        # What extends a cache cannot be computed twice.
        run = reversible_stack if memories is None else plain_stack
        a = b = x
        streams = []
        for stack in stacks:
            if keep_streams:
                streams.append(merged(a, b, "mean").to(x.dtype))
            a, b = run(stack, a, b)
        return merged(a, b, self.merge).to(x.dtype), streams

    @staticmethod
    def _valid_positions(attention_mask: Tensor | None) -> Tensor | None:
        """Bool (B, positions), or None where nothing is padding (looked up outside of compilation only)."""
        if attention_mask is None:
            return None
        if attention_mask.ndim != 2:
            raise ValueError(f"attention_mask has {attention_mask.ndim} axes; expected (batch, positions)")
        valid = attention_mask.bool()
        if not torch.compiler.is_compiling() and bool(valid.all()):
            return None
        return valid


class ScalingTransformerForCausalLM(ScalingTransformerPreTrainedModel, GenerationMixin):
    """The model with its logits: dense (optionally tied to the embedding) or multiplicative (sparse loss layer)."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"head.weight": "model.embedding.weight"}

    def __init__(self, config: ScalingTransformerConfig) -> None:
        super().__init__(config)
        spec = config.spec
        self.model = ScalingTransformerModel(config)
        if isinstance(spec.vocabulary, MultiplicativeVocabularySpec):
            self.head: nn.Module = MultiplicativeDense(
                spec.merged_width, spec.vocabulary.size, spec.vocabulary.modules
            )
        else:
            self.head = linear(
                spec.merged_width, spec.vocabulary.size, spec.vocabulary.bias, spec.low_bit.head
            )
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head if isinstance(self.head, nn.Linear) else None

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) of input_ids (B, T), and the mean cross-entropy in nats where `labels` are given.

        Args:
            labels: (B, T), the input itself; shifted here. -100 is left out of the loss.
            logits_to_keep: compute the logits of this many last positions only (0: all).
        The other arguments are those of `ScalingTransformerModel.forward`.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(output.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Give `generate` our preallocated cache instead of the stock one, which copies itself at every token."""
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = DecodeCache.for_model(self.config.spec, max_cache_length)


AutoModel.register(ScalingTransformerConfig, ScalingTransformerModel, exist_ok=True)
AutoModelForCausalLM.register(ScalingTransformerConfig, ScalingTransformerForCausalLM, exist_ok=True)
