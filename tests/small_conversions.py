"""A small dense run to convert, for the tests of conversions."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsecli.convert.report import Report
from sparsecli.recipe.loader import LoadedRecipe, load
from sparsecli.train import command

RECIPE = """
model:
  d_model: 32
  layers: 2
  heads: 4
  max_positions: 32
  positions: rotary
  feed_forward: {kind: dense, d_ff: 64}
  vocabulary: {kind: dense, size: 300, tied: true}
data:
  source: files
  paths: ["TEXTS/*.txt"]
  sequence_length: 32
  tokenizer: {kind: bpe, vocabulary_size: 300}
train: {max_steps: 120, per_device_train_batch_size: 8, learning_rate: 0.003, eval_steps: 120, save_steps: 120}
convert:
  feed_forward: {kind: sparse, d_ff: 64, block_size: 16, units_per_block: 4, rank: 12}
  calibration_tokens: 1024
  tuning_tokens: 512
  controller_steps: 100
  distillation: {tokens: 10240, batch_size: 8, learning_rate: 0.002}
"""


def trained(folder: Path) -> tuple[LoadedRecipe, Path]:
    """A recipe, and the dense run that it trained on text with something to learn."""
    (folder / "texts").mkdir()
    for number in range(40):
        words = [f"{a} plus {b} is {a + b}. " for a in range(number, number + 8) for b in range(6)]
        (folder / "texts" / f"{number}.txt").write_text("".join(words))
    recipe = folder / "sums.yaml"
    recipe.write_text(RECIPE.replace("TEXTS", str(folder / "texts")))
    loaded = load(str(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSECLI_CACHE", str(folder / "cache"))
        command.run(loaded, output=folder / "dense")
    return loaded, folder / "dense"


def search(loaded: LoadedRecipe, budget: str, *overrides: str) -> LoadedRecipe:
    """The recipe with a budget in place of its layers."""
    return load(str(loaded.path), ["convert.feed_forward=null", f"convert.budget={budget}", *overrides])


def losses(report: Report) -> dict[str, float]:
    """Held-out loss (nats/token) by stage."""
    return {stage.name: stage.loss.nats_per_token for stage in report.stages}
