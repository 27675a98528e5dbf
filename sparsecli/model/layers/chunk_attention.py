"""Attention within chunks of tokens that were sorted, in memory that does not grow with what they see (Reformer).

All that the rounds of sorting bring together counts in one softmax, so that the forward pass keeps three things of a
token's query (its output, the highest score it met and the sum of exponentials) and the backward pass computes
scores once more, chunk by chunk, from those. A block of chunks is small enough to stay in the processor's cache;
queries, keys and values are gathered in sorted order as they are needed. Exponentials are of base two, which
processors are quicker at, above all where they vanish.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SCORES_AT_ONCE = 1 << 19
"""Scores that a processor computes together: two megabytes, to stay in its cache."""
SCORES_AT_ONCE_ELSEWHERE = 1 << 25
"""The same of a GPU, which has to be kept busy."""
FAR = 1e9
"""What a score may be at most, for each position that a key lies before its query."""
NOTHING = -1e8
"""Scores below are of what a token does not see."""


def attend_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    chunk_length: int,
    before: int,
    after: int,
    causal: bool = True,
    hidden: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Each token attends to its own chunk of every round and to the chunks around it, as (B, H, T, d_head).

    Chunks follow one another in a circle through all rounds, as in the original implementation. A key that several
    rounds bring counts several times. A token that sees nothing else sees itself, and only then.

    Args:
        q, k, v: (B, H, T, d_head), T a multiple of `chunk_length`; scores are not scaled.
        order: int64 (B, H, rounds, T): positions, sorted, of each round.
        before, after: chunks around its own that a token sees; fewer where there are not so many.
        causal: a token sees none after it.
        hidden: bool (B, T), true at keys that none sees.
        keep: (chunk_length, (before + 1 + after) * chunk_length), factors on attention weights (dropout), the same
            for every chunk.
    """
    batch, heads, rounds, length = order.shape
    chunks = rounds * length // chunk_length
    before = min(before, chunks - 1)
    after = min(after, chunks - 1 - before)
    layout = _Layout(length, rounds, chunk_length, before, after, causal)
    if keep is not None:
        keep = keep[:, : layout.window]
    y = _ChunkAttention.apply(
        *(x.reshape(batch * heads, length, -1) for x in (q * math.log2(math.e), k, v)),
        order.reshape(batch * heads, rounds, length),
        None if hidden is None else hidden.repeat_interleave(heads, dim=0),
        layout,
        keep,
    )
    return y.unflatten(0, (batch, heads))


@dataclass(frozen=True)
class _Layout:
    length: int
    rounds: int
    chunk_length: int
    before: int
    after: int
    causal: bool

    @property
    def chunks(self) -> int:
        """Chunks of all rounds."""
        return self.rounds * self.length // self.chunk_length

    @property
    def window(self) -> int:
        """Keys that a token sees."""
        return (self.before + 1 + self.after) * self.chunk_length

    def blocks(self, rows: int, device: torch.device) -> Iterator[tuple[slice, list[slice]]]:
        """Rows to be computed together, and the chunks of theirs to be computed together."""
        scores = SCORES_AT_ONCE if device.type == "cpu" else SCORES_AT_ONCE_ELSEWHERE
        at_once = max(1, scores // (self.chunk_length * self.window))  # chunks
        chunks = [slice(i, min(i + at_once, self.chunks)) for i in range(0, self.chunks, at_once)]
        step = max(1, at_once // self.chunks)
        for row in range(0, rows, step):
            yield slice(row, min(row + step, rows)), chunks


class _Rows:
    """Some rows (R of them) of batch and heads, and what the chunks of all their rounds look at.

    Their sorted queries are N = rounds * T; sorted keys have the chunks that lie beyond either end around them.
    """

    def __init__(self, layout: _Layout, order: Tensor, hidden: Tensor | None) -> None:
        self.layout = layout
        rows, rounds, length = order.shape
        queries = order.flatten(1)  # (R, N) positions
        before, after = (n * layout.chunk_length for n in (layout.before, layout.after))
        total = rounds * length
        keys = torch.cat((queries[:, total - before :], queries, queries[:, :after]), dim=1)
        self.query_at, self.key_at = queries.float() * FAR, keys.float() * FAR
        self.key_limit: Tensor | None = None
        if hidden is not None:
            key_hidden = hidden.gather(1, keys)
            if layout.causal:
                self.key_at.masked_fill_(key_hidden, length * FAR)  # after all queries
            else:
                self.key_limit = torch.full_like(self.key_at, FAR).masked_fill_(key_hidden, -FAR)
        row = torch.arange(rows, device=order.device)[:, None]
        self.query_rows, self.key_rows = queries + row * length, keys + row * length
        place = torch.arange(total, device=order.device).view(1, rounds, length).expand_as(order)
        places = torch.empty_like(order).scatter_(2, order, place)  # where in N a token went in each round
        self.places = places.flatten(1) + row * total

    def of_queries(self, x: Tensor, chunks: slice) -> Tensor:
        """x (R, T, n) at the queries of `chunks`, as (R, C, L, n)."""
        rows = self.query_rows[:, self.at(chunks)]
        return _gather(x, rows).unflatten(1, (-1, self.layout.chunk_length))

    def of_keys(self, x: Tensor, chunks: slice) -> Tensor:
        """x (R, T, n) at the keys that `chunks` see, as a view (R, C, W, n) of windows that overlap."""
        return self._windows(_gather(x, self.key_rows[:, self._keys(chunks)])).transpose(2, 3)

    def scores(self, q: Tensor, k: Tensor, chunks: slice) -> Tensor:
        """Scores (R, C, L, W), float32, of queries (R, C, L, d) with keys (R, C, W, d).

        Where the key is the query itself, after it or hidden they are below `NOTHING`. A limit that goes with the
        distance does that in two passes over them, which comparing and filling does not.
        """
        scores = (q @ k.transpose(2, 3)).float()
        query_at = self.query_at[:, self.at(chunks)].unflatten(1, (-1, self.layout.chunk_length))
        keys = self._keys(chunks)
        limit = query_at.unsqueeze(3) - self._windows(self.key_at[:, keys]).unsqueeze(2)
        if not self.layout.causal:
            limit.abs_()
        torch.minimum(scores, limit.sub_(FAR / 2), out=scores)
        if self.key_limit is not None:
            torch.minimum(scores, self._windows(self.key_limit[:, keys]).unsqueeze(2), out=scores)
        return scores

    def unsorted(self, x: Tensor) -> Tensor:
        """x (R, N, n) in the tokens' order, (R, rounds, T, n)."""
        return _gather(x, self.places).unflatten(1, (self.layout.rounds, self.layout.length))

    def at(self, chunks: slice) -> slice:
        """The queries of `chunks` among N."""
        return slice(chunks.start * self.layout.chunk_length, chunks.stop * self.layout.chunk_length)

    def _keys(self, chunks: slice) -> slice:
        around = self.layout.before + self.layout.after
        return self.at(slice(chunks.start, chunks.stop + around))

    def _windows(self, x: Tensor) -> Tensor:
        return x.unfold(1, self.layout.window, self.layout.chunk_length)  # the window comes last


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """x (R, T, n) at `rows` (R, m) of its first two axes taken as one."""
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1)


class _KeySums:
    """Sums over all windows for each sorted key of some rows: (R, chunks, L, n), with the chunks around either end."""

    def __init__(self, layout: _Layout, like: Tensor) -> None:
        self.layout = layout
        rows, _, width = like.shape
        chunks = layout.before + layout.chunks + layout.after
        self.sums = like.new_zeros(rows, chunks, layout.chunk_length, width, dtype=torch.float32)

    def add(self, windows: Tensor, chunks: slice) -> None:
        """Add `windows` (R, C, W, n), what the queries of `chunks` give to the keys that they see."""
        for index, part in enumerate(windows.split(self.layout.chunk_length, dim=2)):
            self.sums[:, chunks.start + index : chunks.stop + index] += part

    def closed(self) -> Tensor:
        """Sums (R, N, n) of the circle, its ends put together again."""
        before, after, chunks = self.layout.before, self.layout.after, self.layout.chunks
        own = self.sums[:, before : before + chunks]
        own[:, chunks - before :] += self.sums[:, :before]
        own[:, :after] += self.sums[:, before + chunks :]
        return own.flatten(1, 2)


class _ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        order: Tensor,
        hidden: Tensor | None,
        layout: _Layout,
        keep: Tensor | None,
    ) -> Tensor:
        y = torch.empty_like(v)
        highest = v.new_empty(*v.shape[:2], 1, dtype=torch.float32)
        total = torch.empty_like(highest)
        for rows, blocks in layout.blocks(len(order), q.device):
            part = _Rows(layout, order[rows], None if hidden is None else hidden[rows])
            found, peaks, masses = (
                x.new_empty(len(part.places), part.places.shape[1], x.shape[2]) for x in (v, highest, total)
            )
            for chunks in blocks:
                queries, keys = part.of_queries(q[rows], chunks), part.of_keys(k[rows], chunks)
                scores = part.scores(queries, keys, chunks)
                peak = scores.amax(-1, keepdim=True)
                weights = scores.sub_(peak).exp2_()
                at = part.at(chunks)
                peaks[:, at], masses[:, at] = peak.flatten(1, 2), weights.sum(-1, keepdim=True).flatten(1, 2)
                if keep is not None:
                    weights *= keep
                found[:, at] = (weights.to(v.dtype) @ part.of_keys(v[rows], chunks)).flatten(1, 2)
            # Every round has sums relative to its own peak; bring them to the highest and add them up.
            peaks = part.unsorted(peaks)  # (R, rounds, T, 1)
            highest[rows] = peaks.amax(1)
            share = peaks.sub_(highest[rows].unsqueeze(1)).exp2_()
            total[rows] = (part.unsorted(masses) * share).sum(1)
            y[rows] = (part.unsorted(found) * share).sum(1) / total[rows]
        alone = highest < NOTHING
        y = torch.where(alone, v, y)
        highest.masked_fill_(alone, 0)  # so that the backward pass finds no weight on anything
        total.masked_fill_(alone, 1)
        ctx.layout, ctx.hidden, ctx.keep = layout, hidden, keep
        ctx.save_for_backward(q, k, v, order, y, highest, total, alone)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, order, y, highest, total, alone = ctx.saved_tensors
        layout, hidden, keep = ctx.layout, ctx.hidden, ctx.keep
        # What the softmax takes from all its gradients alike is the output's product with its own gradient.
        alike = (grad * y).sum(-1, keepdim=True, dtype=torch.float32)
        of_token = torch.cat((highest, total, alike), dim=-1)
        grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
        grad_v = torch.where(alone, grad, 0)
        for rows, blocks in layout.blocks(len(order), q.device):
            part = _Rows(layout, order[rows], None if hidden is None else hidden[rows])
            of_queries = q.new_empty(len(part.places), part.places.shape[1], q.shape[2])
            of_keys, of_values = _KeySums(layout, k[rows]), _KeySums(layout, v[rows])
            for chunks in blocks:
                queries, keys = part.of_queries(q[rows], chunks), part.of_keys(k[rows], chunks)
                values, grads = part.of_keys(v[rows], chunks), part.of_queries(grad[rows], chunks)
                peak, mass, same = part.of_queries(of_token[rows], chunks).split(1, dim=-1)
                weights = part.scores(queries, keys, chunks).sub_(peak).exp2_().div_(mass)
                of_weights = (grads @ values.transpose(2, 3)).float()
                kept = weights
                if keep is not None:
                    kept = weights * keep
                    of_weights *= keep
                of_values.add(kept.to(v.dtype).transpose(2, 3) @ grads, chunks)
                of_scores = of_weights.sub_(same).mul_(weights).to(q.dtype)
                of_queries[:, part.at(chunks)] = (of_scores @ keys).flatten(1, 2)
                of_keys.add(of_scores.transpose(2, 3) @ queries, chunks)
            # The derivative of 2^x has a factor.
            grad_q[rows] = part.unsorted(of_queries).sum(1) * math.log(2)
            grad_k[rows] = part.unsorted(of_keys.closed()).sum(1) * math.log(2)
            grad_v[rows] += part.unsorted(of_values.closed()).sum(1)
        return grad_q, grad_k, grad_v, None, None, None, None
