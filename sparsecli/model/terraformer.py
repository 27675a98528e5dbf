"""Terraformer (paper section 4): reversible blocks, and a target that follows its source in one sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecli.model.cache import DecodeCache
from sparsecli.model.configuration import TerraformerConfig
from sparsecli.model.decoder import count_positions
from sparsecli.model.encoder_decoder import ConditionalGeneration, EncoderDecoder
from sparsecli.model.layers.cross_attention import Source


class TerraformerModel(EncoderDecoder):
    """The decoder's blocks run over the encoder's output and the target behind it, without cross-attention.

    The target has to start right behind the last token of its source, wherever that is in a batch: attention would
    only have to skip the padding, but convolutions and recurrent units take the rows one after the other. So the
    sources are aligned to the right, their padding in front of them, where it is zero to all layers.
    """

    config_class = TerraformerConfig
    supports_gradient_checkpointing = False

    @staticmethod
    def held_source(length: int) -> int:
        """See `EncoderDecoder.held_source`; the source, padding included, comes first in the cache."""
        return length

    def decode(
        self,
        x: Tensor,
        source: Source,
        valid: Tensor | None,
        cache: DecodeCache | None,
        keep_streams: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """See `EncoderDecoder.decode`.

        Raises:
            ValueError: a cache that was filled behind a source of another length.
        """
        length, new = source.rows.shape[1], x.shape[1]
        held = cache.held if cache is not None else 0
        earlier = 0 if cache is None else cache.get_seq_length()
        if cache is not None:
            if held and cache.source != length:
                raise ValueError(
                    f"the cache goes on behind a source of {cache.source} tokens, not of {length}"
                )
            cache.source = length
        x = self.place(x, count_positions(valid, earlier, new, x.device), earlier)  # they count from 0 again

        streams = (x, x)
        if not held:
            rows = align_right(source).split(x.shape[-1], dim=-1)  # of one stream or two
            streams = torch.cat((rows[0], x), dim=1), torch.cat((rows[-1], x), dim=1)  # (B, S + T, d)
        all_valid = None
        if source.valid is not None or valid is not None:
            everywhere = x.new_ones(x.shape[0], length + earlier + new, dtype=torch.bool)
            read, written = everywhere.split((length, earlier + new), dim=1)
            if source.valid is not None:  # as aligned
                read = read.cumsum(dim=-1) > (~source.valid).sum(dim=-1, keepdim=True)
            all_valid = torch.cat((read, written if valid is None else valid), dim=1)
        position_ids = count_positions(all_valid, held, streams[0].shape[1], x.device)
        y, kept = self.run(streams, all_valid, position_ids, cache, keep_streams=keep_streams)
        return y[:, -new:], [x, *(stream[:, -new:] for stream in kept[1:])] if keep_streams else []


def align_right(source: Source) -> Tensor:
    """The rows (B, S, ...) of the source in their order, but with all padding in front of them."""
    if source.valid is None:
        return source.rows
    place = torch.arange(source.valid.shape[1], device=source.valid.device)
    # No two are equal: ONNX has no stable sort.
    order = torch.where(source.valid, place, place - 2**32).argsort(dim=-1)
    return source.rows.gather(1, order.unsqueeze(-1).expand_as(source.rows))


class TerraformerForConditionalGeneration(ConditionalGeneration):
    """Terraformer and its logits."""

    config_class = TerraformerConfig
    supports_gradient_checkpointing = False
    model_class = TerraformerModel
