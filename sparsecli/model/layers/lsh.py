"""Attention among tokens that hash alike (Reformer's LSH attention; Terraformer's for long inputs).

A shared query and key is hashed by its direction: it falls into the bucket of the rotated axis that it is nearest to.
Each round of hashing sorts the tokens by bucket and cuts them into chunks, and a token attends within its chunk and
the chunks around it, which costs as much for every token however long the sequence is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecli.model.layers.choices import recorded_choice
from sparsecli.model.layers.chunk_attention import attend_chunks
from sparsecli.model.layers.layer_cache import LshCache
from sparsecli.model.layers.shared_query_key import HIDDEN, ITSELF, attend_shared
from sparsecli.spec.attention import LshSpec

SEED = 20210713
"""Of the rotations in evaluation, together with the number of the layer."""


def default_buckets(length: int, chunk_length: int) -> list[int]:
    """Factors of the number of buckets for `length` tokens: two buckets a chunk, in two even factors above 128."""
    buckets = 2 * max(1, length // chunk_length)
    if buckets <= 128:
        return [buckets]
    first = 2 * round(math.sqrt(buckets) / 2)
    return [first, 2 * math.ceil(buckets / (2 * first))]


def factors_of(spec: LshSpec, length: int) -> list[int]:
    """Factors of the number of buckets for `length` tokens."""
    if spec.buckets is None:
        return default_buckets(length, spec.chunk_length)
    return spec.buckets if isinstance(spec.buckets, list) else [spec.buckets]


def draw_rotations(
    heads: int, width: int, rounds: int, factors: Sequence[int], generator: torch.Generator | None = None
) -> Tensor:
    """Random axes (1, heads, width, rounds, sum of factors / 2) on which `hash_buckets` projects.

    They are drawn on the CPU, so that every device hashes alike; from torch's global generator where none is given.
    """
    return torch.randn(1, heads, width, rounds, sum(factors) // 2, generator=generator)


@lru_cache(maxsize=256)
def fixed_rotations(layer: int, heads: int, width: int, rounds: int, factors: tuple[int, ...]) -> Tensor:
    """Those of an attention layer in evaluation, always the same."""
    generator = torch.Generator().manual_seed(SEED + layer)
    return draw_rotations(heads, width, rounds, factors, generator)


def hash_buckets(q: Tensor, rotations: Tensor, factors: Sequence[int]) -> Tensor:
    """Buckets (B, H, rounds, T), int64 below the product of `factors`, of q (B, H, T, d_head).

    Args:
        rotations: (B or 1, H, d_head, rounds, sum of factors / 2), those of the first factor first. Each factor hashes
            on its own; the first is the least significant digit of a bucket.
    """
    halves = [factor // 2 for factor in factors]
    rounds = []
    for axes in rotations.to(q.device, q.dtype).unbind(-2):
        bucket, scale = torch.zeros(q.shape[:-1], dtype=torch.int64, device=q.device), 1
        for half, along in zip(halves, (q @ axes).split(halves, dim=-1), strict=True):  # (B, H, T, half)
            (most, first), (least, second) = along.max(-1), along.min(-1)
            # The nearest of the axes and of their opposites, which count after them.
            bucket += torch.where(most >= -least, first, second + half) * scale
            scale *= 2 * half
        rounds.append(bucket)
    return torch.stack(rounds, dim=2)


def attend_alike(q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, hidden: Tensor, most: int) -> Tensor:
    """Attention of queries (B, H, T, d_head), the last positions, to the `most` keys that matter most.

    Keys that hash as the query does in any round come first, then the most recent ones; the query itself is among
    them, and counts where there is nothing else.

    Args:
        k, v: (B, H, past + T, d_head).
        buckets: (B, past + T, rounds, H) of the keys, the last of which are those of the queries.
        hidden: bool (B, past + T), true at padding.
        most: keys that a query reads, where there are so many.
    """
    new, total = q.shape[2], k.shape[2]
    position = torch.arange(total, device=q.device, dtype=torch.int32)
    query = position[total - new :, None]
    rounds = buckets.unsqueeze(1).unbind(3)  # each (B, 1, past + T, H)
    alike = reduce(torch.logical_or, [keys == keys[:, :, total - new :].transpose(1, 2) for keys in rounds])
    alike = alike.permute(0, 3, 1, 2).contiguous()  # (B, T, past + T, H) -> (B, H, T, past + T)
    rank = torch.where(alike, position + total, position)
    rank.masked_fill_(hidden[:, None, None] | (position > query), -1)
    # Those that come first lie last, and the other way round there is less to sort.
    rank, places = rank.flip(-1).topk(min(most, total), dim=-1, sorted=False)
    chosen = total - 1 - places
    row, head = (torch.arange(n, device=q.device) for n in k.shape[:2])
    keys, values = (x[row[:, None, None, None], head[:, None, None], chosen] for x in (k, v))
    scores = (keys @ q.unsqueeze(-1)).squeeze(-1).float()  # (B, H, T, most)
    scores = scores.masked_fill(rank < 0, HIDDEN).masked_fill(chosen == query, ITSELF)
    return (scores.softmax(-1).to(v.dtype).unsqueeze(-2) @ values).squeeze(-2)


class LshAttention(nn.Module):
    """LSH attention over queries, their unit-length keys, and values; it has no weights.

    Evaluation always draws the same rotations; training draws new ones for every call from torch's global generator.

    Args:
        layer: tells the rotations of layers apart in evaluation.
        causal: a token sees none after it.
    """

    def __init__(self, spec: LshSpec, layer: int = 0, causal: bool = True) -> None:
        super().__init__()
        self.spec, self.layer, self.causal = spec, layer, causal

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None = None,
        dropout: float = 0.0,
        layer_cache: LshCache | None = None,
        rotations: Tensor | None = None,
    ) -> Tensor:
        """Attention of q (B, H, T, d_head), as (B, H, T, d_head); exact where it would be a single chunk.

        Args:
            k, v: (B, H, past + T, d_head), k as `unit_keys` makes them. Where there are past positions, tokens
                read some of them (see `attend_alike`), which is not quite what one pass over all computes.
            valid: bool (B, T), false at padding.
            dropout: of the attention weights.
            layer_cache: past positions; extended in place.
            rotations: to be used instead of drawn ones, see `hash_buckets`.
        """
        new = q.shape[2]
        past = k.shape[2] - new
        if layer_cache is not None:
            hidden = torch.zeros(len(q), new, dtype=torch.bool, device=q.device) if valid is None else ~valid
            hidden = layer_cache.append_and_read("hidden", hidden.unsqueeze(-1), past).squeeze(-1)
            if past and past + new > self.spec.most_keys:
                return self._attend_alike(q, k, v, hidden, layer_cache)
            # Not hashed yet: no row that an earlier text left in the buffer may pass for theirs.
            unhashed = hidden.new_zeros(len(q), new, self.spec.rounds * q.shape[1] + 1, dtype=torch.int32)
            layer_cache.append_and_read("buckets", unhashed, past)
            if past:
                return attend_shared(q, k, v, ~hidden[:, None, None], causal=True)
        if new > self.spec.chunk_length:
            return self._attend_chunks(q, k, v, valid, dropout, rotations)
        mask = None if valid is None else valid[:, None, None]
        return attend_shared(q, k, v, mask, self.causal, dropout)

    def _rotations(self, q: Tensor, factors: list[int]) -> Tensor:
        heads, width = q.shape[1], q.shape[3]
        if self.training:
            return draw_rotations(heads, width, self.spec.rounds, factors)
        return fixed_rotations(self.layer, heads, width, self.spec.rounds, tuple(factors))

    def order(self, q: Tensor, valid: Tensor | None = None, rotations: Tensor | None = None) -> Tensor:
        """Positions sorted by bucket in each round, int64 (B, H, rounds, T), of q (B, H, T, d_head); padding last."""
        factors = factors_of(self.spec, q.shape[2])
        count = math.prod(factors)
        # Drawn whether or not they are needed again, so that what is drawn after them stays the same.
        axes = self._rotations(q, factors) if rotations is None else rotations

        def choose() -> Tensor:
            buckets = hash_buckets(q.detach(), axes, factors)
            return buckets if valid is None else buckets.masked_fill(~valid[:, None, None], count)

        return torch.sort(recorded_choice(choose, below=count + 1), dim=-1, stable=True).indices

    def _attend_chunks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
        dropout: float,
        rotations: Tensor | None,
    ) -> Tensor:
        spec, length = self.spec, q.shape[2]
        if surplus := -length % spec.chunk_length:
            q, k, v = (F.pad(x, (0, 0, 0, surplus)) for x in (q, k, v))
            valid = torch.ones(len(q), length, dtype=torch.bool, device=q.device) if valid is None else valid
            valid = F.pad(valid, (0, surplus))
        order = self.order(q, valid, rotations)
        hidden = None if valid is None else ~valid
        keep = None
        if dropout:
            window = spec.chunks_before + 1 + spec.chunks_after
            keep = torch.empty(spec.chunk_length, window * spec.chunk_length, device=q.device)
            keep = keep.bernoulli_(1 - dropout) / (1 - dropout)
        around = spec.chunks_before, spec.chunks_after
        y = attend_chunks(q, k, v, order, spec.chunk_length, *around, self.causal, hidden, keep)
        return y[:, :, :length]

    def _attend_alike(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layer_cache: LshCache) -> Tensor:
        past = k.shape[2] - q.shape[2]
        buckets = self._cached_buckets(k, past, layer_cache)
        parts, end = [], past
        for part in q.split(16, dim=2):  # few queries at once, as each gathers its own keys
            end += part.shape[2]
            seen = k[:, :, :end], v[:, :, :end], buckets[:, :end], hidden[:, :end]
            parts.append(attend_alike(part, *seen, self.spec.most_keys))
        return torch.cat(parts, dim=2)

    def _cached_buckets(self, k: Tensor, past: int, layer_cache: LshCache) -> Tensor:
        """Buckets (B, past + T, rounds, H) of keys (B, H, past + T, d_head), `past` of which may have been hashed.

        Their number goes with the length, rounded up to a power of two, at which all keys are hashed again. Each row
        ends with the number that it was hashed for, or with 0.
        """
        heads, total = k.shape[1], k.shape[2]
        factors = factors_of(self.spec, 1 << (total - 1).bit_length())
        count = math.prod(factors)

        def rows(keys: Tensor) -> Tensor:
            buckets = hash_buckets(keys, self._rotations(keys, factors), factors).to(torch.int32)
            return F.pad(buckets.permute(0, 3, 2, 1).flatten(2), (0, 1), value=count)

        buckets = layer_cache.append_and_read("buckets", rows(k[:, :, past:]), past)
        if int(buckets[0, past - 1, -1]) != count:
            buckets = layer_cache.append_and_read("buckets", rows(k), 0)
        return buckets[..., :-1].unflatten(2, (self.spec.rounds, heads))
