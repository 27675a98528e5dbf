"""Terraformer (paper section 4): reversible layers, and the encoder's output as a prefix of the target."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecli.model.cache import DecodeCache
from sparsecli.model.configuration import TerraformerConfig
from sparsecli.model.decoder import count_positions
from sparsecli.model.encoder_decoder import ConditionalGeneration, EncoderDecoder


class TerraformerModel(EncoderDecoder):
    """The decoder's layers run over the encoder's output and the target behind it, without cross-attention.

    The target has to start right behind the last token of its prefix, wherever that is in a batch: attention would
    only have to skip the padding, but convolutions and recurrent units take the rows one after the other. So the
    prefixes are aligned to the right, their padding in front of them, where it is zero to all layers.
    """

    config_class = TerraformerConfig
    supports_gradient_checkpointing = False

    @staticmethod
    def prefix_length(encoder_length: int) -> int:
        """See `EncoderDecoder.prefix_length`; padding counts."""
        return encoder_length

    def decode(
        self,
        x: Tensor,
        encoder_hidden_states: Tensor,
        encoder_valid: Tensor | None,
        valid: Tensor | None,
        cache: DecodeCache | None,
        keep_streams: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """See `EncoderDecoder.decode`.

        Raises:
            ValueError: a cache that was filled behind a prefix of another length.
        """
        length, new = encoder_hidden_states.shape[1], x.shape[1]
        past_length = cache.length if cache is not None else 0
        earlier = 0 if cache is None else cache.get_seq_length()
        if cache is not None:
            if past_length and cache.prefix_length != length:
                raise ValueError(f"the cache has a prefix of {cache.prefix_length} tokens, not of {length}")
            cache.prefix_length = length
        # Positions of the target count from 0 again.
        x = self.add_positions(x, count_positions(valid, earlier, new, x.device), earlier)

        streams = (x, x)
        if not past_length:
            aligned = align_right(encoder_hidden_states, encoder_valid)
            prefixes = aligned.split(x.shape[-1], dim=-1)  # of one stream or two
            streams = torch.cat((prefixes[0], x), dim=1), torch.cat((prefixes[-1], x), dim=1)  # (B, S + T, d)
        all_valid = None
        if encoder_valid is not None or valid is not None:
            everywhere = x.new_ones(x.shape[0], length + earlier + new, dtype=torch.bool)
            read, written = everywhere.split((length, earlier + new), dim=1)
            if encoder_valid is not None:  # as aligned
                read = read.cumsum(dim=-1) > (~encoder_valid).sum(dim=-1, keepdim=True)
            all_valid = torch.cat((read, written if valid is None else valid), dim=1)
        position_ids = count_positions(all_valid, past_length, streams[0].shape[1], x.device)
        y, kept = self.run_layers(streams, all_valid, position_ids, cache, keep_streams=keep_streams)
        return y[:, -new:], [x, *(stream[:, -new:] for stream in kept[1:])] if keep_streams else []


def align_right(x: Tensor, valid: Tensor | None) -> Tensor:
    """x (B, S, ...) with all padding, where `valid` (B, S) is false, moved in front; the order is kept otherwise."""
    if valid is None:
        return x
    place = torch.arange(valid.shape[1], device=valid.device)
    # No two are equal: ONNX has no stable sort.
    order = torch.where(valid, place, place - 2**32).argsort(dim=-1)
    return x.gather(1, order.unsqueeze(-1).expand_as(x))


class TerraformerForConditionalGeneration(ConditionalGeneration):
    """Terraformer and its logits."""

    config_class = TerraformerConfig
    supports_gradient_checkpointing = False
    model_class = TerraformerModel
