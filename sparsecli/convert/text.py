"""The text of a conversion: windows for calibration, tuning, distillation, and held-out evaluation."""

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
from sparsecli.recipe.data import CopyTask, ImagesSpec, SavedTokenizer, StdlibCorpus, TextSpec
from sparsecli.recipe.loader import load
from sparsecli.recipe.schema import Recipe
from sparsecli.spec.model import ModelSpec

DEFAULT_LENGTH = 512
DEFAULT_HELD_OUT_TOKENS = 32768
CHANCE = 0.95  # share of the loss of uniform guessing, above which a model does not know the text's language
MISMATCH = 1.5  # nats/token between tuning and held-out text, above which they are different kinds of text
CALIBRATION_BATCH = 4


@dataclass(frozen=True)
class ConversionText:
    """A packed corpus and its windows."""

    data: TextSpec
    corpus: PackedCorpus
    beginning: list[int]
    """Token ids that every window begins with."""
    calibration: list[Tensor]
    """Token ids (B, T) of batches."""
    tuning: Windows
    distillation: Windows
    """All training windows but those of `tuning`."""
    held_out: Windows


def choose_data(recipe: Recipe, folder: Path, spec: ModelSpec) -> TextSpec:
    """The recipe's text; else that of the run which trained the model; else the standard library.

    It is always tokenized with the model's own tokenizer.

    Raises:
        Failure: the run was trained on pairs.
    """
    data = recipe.data
    stored = recipe_of(folder)
    if data is None and stored:
        data = load(str(stored)).recipe.data
    if data is None:
        length = min(DEFAULT_LENGTH, spec.max_positions)
        data = StdlibCorpus(source="stdlib", sequence_length=length, held_out_tokens=DEFAULT_HELD_OUT_TOKENS)
    if isinstance(data, ImagesSpec):
        raise Failure("data: a conversion needs running text, not images")
    if isinstance(data, CopyTask) or data.pairs:
        raise Failure(
            f"{stored or folder}: was trained on pairs; a conversion needs running text: name it in `data:`"
        )
    return data.model_copy(update={"tokenizer": SavedTokenizer(kind="saved", path=str(folder))})


def read_text(
    data: TextSpec, calibration_tokens: int, tuning_tokens: int, seed: int, imported: bool = False
) -> ConversionText:
    """Pack the corpus, and draw windows for calibration and tuning from its training split.

    Windows of an imported model begin with the tokens that its tokenizer adds to every text, as in `generate`.
    No document is in both splits: see `read_documents`.

    Raises:
        Failure: there is too little text.
    """
    corpus = pack(data)
    prefix = beginning(corpus.tokenizer) if imported else []
    windows = corpus.train.windows(data.sequence_length, beginning=prefix)
    held_out = corpus.held_out.windows(data.sequence_length, data.held_out_tokens, prefix)
    needed = [max(1, -(-tokens // data.sequence_length)) for tokens in (calibration_tokens, tuning_tokens)]
    if len(windows) < sum(needed):
        have = len(windows) * data.sequence_length
        raise Failure(
            f"data: {have:,} training tokens, but convert.calibration_tokens and tuning_tokens need "
            f"{calibration_tokens + tuning_tokens:,}; add text or lower them"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, others = order[: needed[0]], order[needed[0] : sum(needed)]
    rows = torch.stack([windows[index]["input_ids"] for index in chosen])
    tokens = np.concatenate([windows[index]["input_ids"].numpy() for index in others])
    tuning = Windows(tokens, data.sequence_length)  # these tokens include the prefixes
    return ConversionText(
        data, corpus, prefix, list(rows.split(CALIBRATION_BATCH)), tuning, windows.without(others), held_out
    )


def check_text(dense_tuning: np.ndarray, dense_held_out: np.ndarray, vocabulary: int) -> None:
    """Raise Failure if the dense model's losses show that it is damaged, or that the text does not suit it.

    Args:
        dense_tuning, dense_held_out: losses of windows (W,), nats/token.
    """
    held_out, tuning = float(dense_held_out.mean()), float(dense_tuning.mean())
    if not math.isfinite(held_out + tuning):
        raise Failure("convert.model: its loss is not finite; check its weights")
    if held_out > CHANCE * math.log(vocabulary):
        raise Failure(
            f"data: the dense model predicts the held-out text hardly better than by chance ({held_out:.2f} nats/token "
            f"of {math.log(vocabulary):.2f}); check the text's language and the model's tokenizer"
        )
    if abs(held_out - tuning) > MISMATCH:
        raise Failure(
            f"data: calibration and held-out text are of different kinds ({tuning:.2f} and {held_out:.2f} nats/token); "
            f"calibrate on text that resembles the model's later input"
        )
