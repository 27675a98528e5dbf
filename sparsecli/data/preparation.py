"""Prepares the examples of a recipe of text, of every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sparsecli.console import Failure
from sparsecli.data.cache import digest
from sparsecli.data.copying import prepare_copied_tokens, prepare_copies
from sparsecli.data.corruption import CorruptedSpans
from sparsecli.data.examples import Prepared
from sparsecli.data.packing import PackedCorpus, TokenStream, pack, pack_pairs
from sparsecli.data.tokenization import sentinel
from sparsecli.recipe.data import CopiedPairs, CopyTask, CorruptedPairs, TextSpec


def prepare(data: TextSpec | CopyTask, cache_dir: Path | None = None) -> Prepared:
    """Training and held-out examples, with their tokenizer.

    Raises `Failure` when the text or the tokenizer cannot be read, there is too little text, or the cache cannot be
    written.
    """
    if isinstance(data, CopyTask):
        return prepare_copies(data)
    if isinstance(data.pairs, CopiedPairs):
        return prepare_copied_tokens(data, data.pairs, cache_dir)
    if isinstance(data.pairs, CorruptedPairs):
        return _corrupted(pack(data, cache_dir), data.pairs, data.held_out_tokens)
    if data.pairs:
        return pack_pairs(data, cache_dir)
    corpus = pack(data, cache_dir)
    return Prepared(
        corpus.train.windows(data.sequence_length),
        corpus.held_out.windows(data.sequence_length, data.held_out_tokens),
        corpus.tokenizer,
        corpus.fingerprint,
    )


def prepare_with_tuning(data: TextSpec, tuning_tokens: int, cache_dir: Path | None = None) -> Prepared:
    """As `prepare` for running text, with tuning windows of so many tokens.

    They follow `data.held_out_tokens` in the held-out documents, from the next document on, if enough text follows.

    Raises `Failure` also when the held-out documents have too few tokens.
    """
    assert data.held_out_tokens is not None
    corpus, length = pack(data, cache_dir), data.sequence_length
    held_out = corpus.held_out.windows(length, data.held_out_tokens)
    rest = corpus.held_out.tokens[max(data.held_out_tokens, length) :]
    if len(rest) < max(tuning_tokens, length):
        raise Failure(
            f"data: {len(rest):,} held-out tokens follow data.held_out_tokens, study.tuning_tokens asks for "
            f"{tuning_tokens:,} (a window has {length}); lower them, or raise data.held_out_fraction"
        )
    ends = np.flatnonzero(rest == corpus.tokenizer.eos_token_id)
    start = int(ends[0]) + 1 if len(ends) else 0
    if len(rest) - start < max(tuning_tokens, length):
        start = 0
    tuning = TokenStream(rest[start:]).windows(length, tuning_tokens)
    return Prepared(corpus.train.windows(length), held_out, corpus.tokenizer, corpus.fingerprint, tuning)


def _corrupted(corpus: PackedCorpus, pairs: CorruptedPairs, held_out_tokens: int | None) -> Prepared:
    counts = pairs.counts()
    sentinels = corpus.tokenizer.convert_tokens_to_ids([sentinel(index) for index in range(counts.spans)])
    limit = held_out_tokens and max(1, held_out_tokens // (counts.hidden + counts.spans + 1))
    train = CorruptedSpans(corpus.train.tokens, counts, sentinels, seed=0)
    held_out = CorruptedSpans(corpus.held_out.tokens, counts, sentinels, seed=1, limit=limit)
    for examples, name in ((train, "to train on"), (held_out, "held out")):
        if not len(examples):
            raise Failure(
                f"data: {len(examples.tokens)} tokens {name} do not fill one window of {counts.window}; add text or "
                f"lower data.pairs.source_length"
            )
    return Prepared(train, held_out, corpus.tokenizer, digest(corpus.fingerprint, pairs.model_dump_json()))
