"""The decoder-only Scaling Transformer (paper section 3), a Hugging Face model like any other."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from sparsecli.model.cache import CACHE
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.decoder import Decoder, LanguageModel, count_positions, valid_positions


class ScalingTransformerModel(Decoder):
    """Embedding, positions, layers and the final norm."""

    def __init__(self, config: ScalingTransformerConfig) -> None:
        super().__init__(config)
        self.post_init()

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
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, d) of input_ids (B, T).

        Args:
            attention_mask: (B, past positions + T), 0 at padding, which must be on the left when decoding.
            position_ids: (B, T); by default positions count the tokens that are not padding.
            past_key_values, cache: two names for earlier positions, a `DecodeCache`; with `use_cache` one is made where
                there is none.
            output_hidden_states: also return the stream before each layer (of two streams the mean) and what comes
                after the norm; by default the configuration decides.
        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds, a sequence past max_positions, or a cache
                of another kind.
        """
        x = self.embed(input_ids, inputs_embeds)
        cache = self.open_cache(past_key_values, cache, use_cache)
        past_length = cache.length if cache is not None else 0
        valid = valid_positions(attention_mask)
        if position_ids is None:
            position_ids = count_positions(valid, past_length, x.shape[1], x.device)
        x = self.add_positions(x, position_ids, past_length)
        keep = self.returns_hidden_states(output_hidden_states)
        x, streams = self.run_layers((x, x), valid, position_ids, cache, keep_streams=keep)
        x = self.final_norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*streams, x) if keep else None,
            **{CACHE: cache},
        )


class ScalingTransformerForCausalLM(LanguageModel):
    """The model with its logits."""

    model_class = ScalingTransformerModel

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
        cache: Cache | None = None,
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
            cache=cache,
            return_dict=True,
        )
        logits = self.logits(output.last_hidden_state, logits_to_keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            **{CACHE: output.get(CACHE)},
        )
