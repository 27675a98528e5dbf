"""The text of a conversion: to calibrate on, to compare candidates on, to distil on, and to judge by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsecli.console import Failure
from sparsecli.data.packing import PackedCorpus, Windows, pack
from sparsecli.data.tokenization import beginning
from sparsecli.model.files import recipe_of
from sparsecli.recipe.data import CopyTask, SavedTokenizer, StdlibCorpus, TextSpec
from sparsecli.recipe.loader import load
from sparsecli.recipe.schema import Recipe
from sparsecli.spec.model import ModelSpec

WINDOW = 512
HELD_OUT = 32768
CHANCE = 0.95  # of the loss of a blind guess: a model that does no better does not know the text's language
APART = 1.5  # nats a token between calibration and held-out text, from which they are two kinds of text
BATCH = 4


@dataclass(frozen=True)
class Text:
    """A packed corpus and its windows."""

    data: TextSpec
    corpus: PackedCorpus
    beginning: list[int]
    """Token ids that every window begins with."""
    calibration: list[Tensor]
    """Token ids (B, T) of batches."""
    tuning: Windows
    held_out: Windows


def data_of(recipe: Recipe, folder: Path, spec: ModelSpec) -> TextSpec:
    """The recipe's text; else that of the run which trained the model; else the standard library.

    It is always read with the model's own tokenizer.

    Raises:
        Failure: the run was trained on pairs.
    """
    data = recipe.data
    stored = recipe_of(folder)
    if data is None and stored:
        data = load(str(stored)).recipe.data
    if data is None:
        length = min(WINDOW, spec.max_positions)
        data = StdlibCorpus(source="stdlib", sequence_length=length, held_out_tokens=HELD_OUT)
    if isinstance(data, CopyTask) or data.pairs:
        raise Failure(
            f"{stored or folder}: was trained on pairs; a conversion reads running text, name some with data"
        )
    return data.model_copy(update={"tokenizer": SavedTokenizer(kind="saved", path=str(folder))})


def read_text(
    data: TextSpec, calibration_tokens: int, tuning_tokens: int, seed: int, imported: bool = False
) -> Text:
    """Pack the corpus and draw the windows of its training split that are calibrated and tuned on.

    Windows of an imported model begin with what its tokenizer puts before every text, since `generate` begins so.
    No document is in both splits: `read_documents` sees to that.

    Raises:
        Failure: there is too little text.
    """
    corpus = pack(data)
    begun = beginning(corpus.tokenizer) if imported else []
    windows = corpus.train.windows(data.sequence_length, beginning=begun)
    held_out = corpus.held_out.windows(data.sequence_length, data.held_out_tokens, begun)
    needed = [max(1, -(-tokens // data.sequence_length)) for tokens in (calibration_tokens, tuning_tokens)]
    if len(windows) < sum(needed):
        have = len(windows) * data.sequence_length
        raise Failure(
            f"data: {have:,} tokens to calibrate on, but convert.calibration_tokens and tuning_tokens ask for "
            f"{calibration_tokens + tuning_tokens:,}; add text or lower them"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, others = order[: needed[0]], order[needed[0] : sum(needed)]
    rows = torch.stack([windows[index]["input_ids"] for index in chosen])
    tokens = np.concatenate([windows[index]["input_ids"].numpy() for index in others])
    tuning = Windows(tokens, data.sequence_length)  # these tokens have the beginnings in them
    return Text(data, corpus, begun, list(rows.split(BATCH)), tuning, held_out)


def check_language(dense_tuning: np.ndarray, dense_held_out: np.ndarray, vocabulary: int) -> None:
    """Raise Failure where the dense model's losses show that it is damaged, or that the text is not for it.

    Args:
        dense_tuning, dense_held_out: losses of windows in nats a token.
    """
    held_out, tuning = float(dense_held_out.mean()), float(dense_tuning.mean())
    if not math.isfinite(held_out + tuning):
        raise Failure("convert.model: its loss is not a number; are its weights whole?")
    if held_out > CHANCE * math.log(vocabulary):
        raise Failure(
            f"data: the dense model predicts the held-out text hardly better than by chance ({held_out:.2f} nats a "
            f"token of {math.log(vocabulary):.2f}); is it in the model's language, and is the tokenizer its own?"
        )
    if abs(held_out - tuning) > APART:
        raise Failure(
            f"data: calibration and held-out text are of different kinds ({tuning:.2f} against {held_out:.2f} nats a "
            f"token); calibrate on text like that which the model will see"
        )
