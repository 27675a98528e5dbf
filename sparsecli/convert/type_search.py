"""The search of the method `rounding`: a weight type for every linear layer, within a budget."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsecli import console
from sparsecli.console import Mismatch
from sparsecli.convert.candidates import ROUNDING, ConversionCandidate, weight_bytes_per_token
from sparsecli.convert.evaluate import NativeContender
from sparsecli.convert.linear_layers import (
    TypeChoice,
    TypeOption,
    choose_types,
    frontier,
    least_increase,
    with_types,
)
from sparsecli.convert.resume import RESULT, WorkFolder
from sparsecli.convert.search import MARGIN, loss_budget
from sparsecli.convert.streaming import output_gradients
from sparsecli.convert.text import ConversionText
from sparsecli.convert.weight_types import GRADIENT_TOKENS, RoundedLayers
from sparsecli.decode.packed.precision import Precision
from sparsecli.evaluate.losses import HeldOutLoss
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.outputs import share
from sparsecli.model.tokenizer import GGUF_METADATA
from sparsecli.recipe.budget import Budget, parse_budget
from sparsecli.recipe.schema import ConvertSpec
from sparsecli.train import run_directory

LISTED = 9
"""Choices of types that the report lists with their estimates."""
BUILDS = 4
"""Models that are built at most."""
FULL = 0.8
"""Share of a loss budget that a model must use for the search to end early."""
UNDERESTIMATED = 1.5
"""A first guess of how many times the sum of the estimates a model's increase of the loss is. The first model that is
measured replaces it."""
CHOICE = "types"
"""Under this name the work folder keeps the budget and the choice of the model that is written."""

Built = tuple[ConversionCandidate, Path]


def _accepts(budget: Budget, earlier: Budget) -> bool:
    """Whether the model that was built for an earlier budget is the one to measure: for the same budget, or for a
    larger one, after held-out text showed that the model exceeds its own."""
    return budget == earlier or (budget.kind == earlier.kind != "bytes" and budget.value > earlier.value)


@dataclass(frozen=True)
class TypeSearch:
    """A search and its inputs: see `Conversion`."""

    dense: ScalingTransformerForCausalLM
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    text: ConversionText
    work: WorkFolder
    convert: ConvertSpec

    def run(
        self, budget: Budget, tuning_losses: np.ndarray, dense_loss: float, seed: int
    ) -> tuple[ConversionCandidate, Path, list[ConversionCandidate]]:
        """The best types within the budget: the candidate, the written model, and what other types would give.

        Args:
            tuning_losses: the dense model's on every window of the tuning text (W,), nats/token.
            dense_loss: the dense model's on held-out text, nats/token.
            seed: of the labels that gradients are taken for.
        Raises:
            Mismatch: no types meet the budget.
        """
        rounded = RoundedLayers(self.dense, self.work.folder / "types")
        gradients = self._output_gradients(seed)
        rounded.fit(self.text.calibration, self.work.keep_tensors)
        options = rounded.options(gradients)
        recorded = self.work.recall(CHOICE)
        if recorded and _accepts(budget, parse_budget(recorded["budget"])):
            built = self._candidate(TypeChoice(**recorded["choice"])), self._written
        else:
            choice, built = self._build(rounded, options, budget, tuning_losses, dense_loss)
            self.work.record(CHOICE, {"budget": str(budget), "choice": asdict(choice)})
        return *built, [self._candidate(each) for each in frontier(options, LISTED)]

    @property
    def _written(self) -> Path:
        return self.work.folder / RESULT / "model"

    def _output_gradients(self, seed: int) -> dict[str, Tensor]:
        """See `output_gradients`; kept in the work folder."""
        path = self.work.folder / "gradients.safetensors"
        if not path.exists():
            per_batch = self.text.calibration[0].numel()
            batches = self.text.calibration[: -(-GRADIENT_TOKENS // per_batch)]
            generator = torch.Generator().manual_seed(seed)
            self.work.keep_tensors(path, output_gradients(self.dense, batches, generator))
        return load_file(path)

    def _candidate(self, choice: TypeChoice) -> ConversionCandidate:
        spec = with_types(self.dense.config.spec, choice.types, choice.head_candidates)
        size = weight_bytes_per_token(spec, self.convert.decode_dtype)
        return ConversionCandidate(spec, ROUNDING, size, choice.increase)

    def _build(
        self,
        rounded: RoundedLayers,
        options: list[TypeOption],
        budget: Budget,
        tuning_losses: np.ndarray,
        dense_loss: float,
    ) -> tuple[TypeChoice, Built]:
        """Write the model with the best types; with a loss budget, measure it in the engine on tuning text.

        The layers together add more to the loss than the sum of their estimates. Each measured model shows by how
        much, and the next choice uses that. A model meets the budget if its increase and the standard error of this
        together do: on other text a loss rises by more as often as by less.
        """
        allowed = budget.nats(dense_loss)
        if allowed is None:
            smallest = frontier(options, 2)[0]
            rest = self._candidate(smallest).bytes_per_token - smallest.bytes
            choice = least_increase(options, int(budget.value) - rest) or smallest
            return choice, self._write(rounded, choice)
        factor, best, last = UNDERESTIMATED, None, None
        increases: dict[int, float] = {}
        for _ in range(BUILDS):
            choice = choose_types(options, MARGIN * allowed / factor) or frontier(options, 2)[-1]
            if choice.bytes in increases or (best and choice.bytes >= best.bytes):
                break
            built, last = self._write(rounded, choice), choice
            increase, error = self._tuning_increase(*built, tuning_losses)
            increases[choice.bytes] = increase + error
            told = f"loss {increase:+.4f} ± {error:.4f} nats/token on tuning text, {allowed:+.4f} allowed"
            console.say(f"{built[0].name} ({choice.shares}): {told}")
            if increase + error <= allowed:
                best = choice
                if increase + error >= FULL * allowed:
                    break
            factor = max((increase + error) / max(choice.increase, 1e-9), 0.1)
        if best is None:
            least = loss_budget(budget, min(increases.values()), dense_loss)
            raise Mismatch(
                f"convert.budget: no types meet {budget} on tuning text; `budget: {least}` can be met, and resumes "
                f"from these fits"
            )
        return best, built if last == best else self._write(rounded, best)

    def _write(self, rounded: RoundedLayers, choice: TypeChoice) -> Built:
        """The model with these types, complete in the folder of the result."""
        temporary = self._written.with_name("model.tmp")
        with run_directory.writing(self._written, self.work.hint):
            for folder in (temporary, self._written):
                shutil.rmtree(folder, ignore_errors=True)
            self.work.record(CHOICE, None)
            rounded.write(choice, temporary)
            self.tokenizer.save_pretrained(temporary)
            if (metadata := self.folder / GGUF_METADATA).is_file():  # what `export --format gguf` writes
                shutil.copyfile(metadata, temporary / GGUF_METADATA)
            share(temporary)
            temporary.rename(self._written)
        return self._candidate(choice), self._written

    def _tuning_increase(
        self, candidate: ConversionCandidate, written: Path, tuning_losses: np.ndarray
    ) -> tuple[float, float]:
        """Increase of the loss on tuning text over the dense model's in float32, and its standard error, nats/token."""
        precision = Precision.of(self.convert.decode_dtype)
        contender = NativeContender(candidate.name, written, candidate.spec, precision)
        loss = HeldOutLoss.paired(contender.evaluate(self.text.tuning).losses, tuning_losses)
        return loss.increase, loss.standard_error or 0.0
