"""The encoder-decoder Scaling Transformer with cross-attention (paper section 3; the models of its Table 1)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils.generic import can_return_tuple

from sparsecli.model.cache import CACHE, DecodeCache
from sparsecli.model.configuration import (
    ScalingTransformerConfig,
    ScalingTransformerEncoderDecoderConfig,
)
from sparsecli.model.decoder import Decoder, LanguageModel, count_positions, valid_positions
from sparsecli.model.encoder import Encoder
from sparsecli.spec.vocabulary import IGNORED


class EncoderDecoder(Decoder):
    """A decoder, and its encoder; subclasses say how the decoder reads the encoder's output."""

    def __init__(self, config: ScalingTransformerConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config.spec)
        self.post_init()

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """The encoder's hidden states of input_ids (B, S): (B, S, d), or (B, S, 2 d) with two streams side by side.

        Args:
            attention_mask: (B, S), 0 at padding.
            output_hidden_states: also return the stream before each layer (of two the mean) and the final hidden
                states.
        Raises:
            ValueError: an input without tokens, or with more than the encoder has positions for; a mask of another
                length.
        """
        x = self.embed(input_ids, inputs_embeds)
        valid = _valid_encoder_positions(attention_mask, x)
        keep = self.returns_hidden_states(output_hidden_states)
        streams, kept = self.encoder(x, valid, count_positions(valid, 0, x.shape[1], x.device), keep)
        rows = torch.cat(streams, dim=-1) if len(streams) > 1 else streams[0]
        return BaseModelOutput(last_hidden_state=rows, hidden_states=(*kept, rows) if keep else None)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        """Hidden states (B, T, d) of decoder_input_ids (B, T), given the encoder's input_ids (B, S).

        Args:
            attention_mask: (B, S), 0 at the encoder's padding.
            decoder_attention_mask: (B, past target positions + T), 0 at the target's padding.
            encoder_outputs: what `encode` returned, in place of input_ids.
            past_key_values, cache: two names for earlier positions, a `DecodeCache`; with `use_cache` one is made where
                there is none.
            output_hidden_states: also return the streams of encoder and decoder before each layer (of two the mean) and
                in the end; by default the configuration decides.
        Raises:
            ValueError: see `encode`; also no target, one past max_positions, or a cache of another kind.
        """
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise ValueError(
                "the target is missing or there twice: pass decoder_input_ids or decoder_inputs_embeds, one of them, "
                "or labels to a model with a loss; `generate` needs none and writes it"
            )
        if encoder_outputs is None:
            encoder_outputs = self.encode(input_ids, attention_mask, inputs_embeds, output_hidden_states)
        hidden_states = encoder_outputs[0]
        keep = self.returns_hidden_states(output_hidden_states)
        cache = self.open_cache(past_key_values, cache, use_cache)
        x, streams = self.decode(
            self.embed(decoder_input_ids, decoder_inputs_embeds),
            hidden_states,
            _valid_encoder_positions(attention_mask, hidden_states),
            valid_positions(decoder_attention_mask),
            cache,
            keep,
        )
        x = self.final_norm(x)
        return Seq2SeqModelOutput(
            last_hidden_state=x,
            decoder_hidden_states=(*streams, x) if keep else None,
            encoder_last_hidden_state=hidden_states,
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            **{CACHE: cache},
        )

    @staticmethod
    def prefix_length(encoder_length: int) -> int:
        """Positions of the decoder's cache that the encoder's output of `encoder_length` tokens takes."""
        return 0

    @abstractmethod
    def decode(
        self,
        x: Tensor,
        encoder_hidden_states: Tensor,
        encoder_valid: Tensor | None,
        valid: Tensor | None,
        cache: DecodeCache | None,
        keep_streams: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """The output of the layers for embedded target tokens x (B, T, d), see `Decoder.run_layers`.

        Args:
            encoder_hidden_states: (B, S, d), or (B, S, 2 d) with two streams side by side.
            encoder_valid: bool (B, S), false at padding; None where there is none.
            valid: bool (B, past target positions + T), false at the target's padding; None where there is none.
        """


def _valid_encoder_positions(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """See `valid_positions`; `x` is (B, S, ...), of the encoder."""
    if attention_mask is not None and attention_mask.shape != x.shape[:2]:
        masked, given = (" x ".join(map(str, shape)) for shape in (attention_mask.shape, x.shape[:2]))
        raise ValueError(f"attention_mask is {masked}, the source {given}")
    return valid_positions(attention_mask)


class ScalingTransformerEncoderDecoderModel(EncoderDecoder):
    """Every layer of the decoder attends to the encoder's output, whose keys and values are cached."""

    config_class = ScalingTransformerEncoderDecoderConfig

    def decode(
        self,
        x: Tensor,
        encoder_hidden_states: Tensor,
        encoder_valid: Tensor | None,
        valid: Tensor | None,
        cache: DecodeCache | None,
        keep_streams: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """See `EncoderDecoder.decode`."""
        past_length = cache.length if cache is not None else 0
        position_ids = count_positions(valid, past_length, x.shape[1], x.device)
        x = self.add_positions(x, position_ids, past_length)
        return self.run_layers(
            (x, x), valid, position_ids, cache, encoder_hidden_states, encoder_valid, keep_streams
        )


class ConditionalGeneration(LanguageModel):
    """An encoder-decoder with its logits; subclasses name the model within."""

    model: EncoderDecoder
    model_class: ClassVar[type[EncoderDecoder]]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Logits (B, T, V) of the target, and the mean cross-entropy in nats where `labels` are given.

        Args:
            labels: (B, T), the target. The decoder's input, unless it is given, is that shifted right by one; -100
                and padding are left out of the loss, which is NaN where nothing is left, as T5's is. A decoder that
                hashes does not see those at the end of a target, unless decoder_attention_mask is given.
            logits_to_keep: compute the logits of this many last positions only (0: all).
        The other arguments are those of `EncoderDecoder.forward`.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            if decoder_attention_mask is None and self.model.hashes:
                # Chunks have so many places, and what follows the last token to predict must not take any.
                counted = self._counted(labels) != IGNORED
                decoder_attention_mask = counted.flip(-1).cumsum(-1).flip(-1) > 0
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cache=cache,
            return_dict=True,
        )
        logits = self.logits(output.last_hidden_state, logits_to_keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=None,
                shift_labels=self._counted(labels),
                vocab_size=self.config.vocab_size,
                **kwargs,
            )
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            decoder_hidden_states=output.decoder_hidden_states,
            encoder_last_hidden_state=output.encoder_last_hidden_state,
            encoder_hidden_states=output.encoder_hidden_states,
            **{CACHE: output.get(CACHE)},
        )

    def _counted(self, labels: Tensor) -> Tensor:
        """labels (B, T), with -100 wherever the loss counts none."""
        return labels.masked_fill(labels == self.config.pad_token_id, IGNORED)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """labels (B, T), shifted right by one, with the decoder's start token in front and padding for -100."""
        start, padding = self.config.decoder_start_token_id, self.config.pad_token_id
        return F.pad(labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, padding), (1, 0), value=start)

    def _prepare_text_encoder_decoder_kwargs_for_generation(
        self,
        inputs_tensor: Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: Any,
    ) -> dict[str, Any]:
        """Run the encoder once before `generate`; alone it could not, since it shares the decoder's embedding."""
        inputs = {model_input_name or self.main_input_name: inputs_tensor}
        encoded = self.model.encode(
            **inputs,
            attention_mask=model_kwargs.get("attention_mask"),
            output_hidden_states=generation_config.output_hidden_states,
        )
        return {**model_kwargs, "encoder_outputs": encoded}

    def prefix_length_of(self, model_kwargs: dict[str, Any]) -> int:
        """See `LanguageModel.prefix_length_of`; `generate` counts the target's."""
        return self.model.prefix_length(model_kwargs["encoder_outputs"][0].shape[1])


class ScalingTransformerForConditionalGeneration(ConditionalGeneration):
    """The encoder-decoder with cross-attention and its logits."""

    config_class = ScalingTransformerEncoderDecoderConfig
    model_class = ScalingTransformerEncoderDecoderModel
