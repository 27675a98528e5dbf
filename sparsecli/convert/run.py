"""One conversion from start to end: `Conversion.run` lists the stages, and the methods follow in their order."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from sparsecli import console
from sparsecli.bench import host
from sparsecli.console import Failure, Mismatch
from sparsecli.convert import page
from sparsecli.convert.candidates import ConversionCandidate, rounds
from sparsecli.convert.evaluate import (
    Contender,
    DecodingSpeed,
    HeldOutResult,
    NativeContender,
    measure_speed,
)
from sparsecli.convert.importance import input_importance
from sparsecli.convert.methods import METHODS
from sparsecli.convert.methods.base import FitOptions
from sparsecli.convert.methods.fitting import fit_model, initialize_from_dense
from sparsecli.convert.report import CandidateSummary, MeasuredModel, Report, StageLoss, card_of
from sparsecli.convert.resume import COMPLETE, RESULT, WorkFolder
from sparsecli.convert.search import PartSearch, loss_budget, rank_candidates
from sparsecli.convert.streaming import dequantized, streamed_losses
from sparsecli.convert.text import ConversionText, check_text
from sparsecli.convert.type_search import TypeSearch
from sparsecli.data.packing import Windows
from sparsecli.decode.engine import MAX_THREADS, processors
from sparsecli.decode.native import binding
from sparsecli.decode.packed.precision import Precision
from sparsecli.evaluate.losses import HeldOutLoss, window_losses
from sparsecli.model.card import license_of
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.files import RECIPE
from sparsecli.model.loading import load_network
from sparsecli.model.outputs import share
from sparsecli.recipe.budget import Budget, parse_budget
from sparsecli.recipe.loader import dump
from sparsecli.recipe.schema import ConvertSpec, Recipe
from sparsecli.train import run_directory
from sparsecli.train.recovery import Recovery, distil

BASELINES = {"dense, bfloat16": "bfloat16", "dense, int8": "int8", "dense, 4 bit, nearest": "int4"}
DENSE, DENSE_TUNING, DISTILLED = "dense", "dense on tuning text", "distilled"
"""Names under which losses are recorded."""
ROUNDS = 7
MAX_DIFFERENCE = 1e-4  # of logits between the model in memory and the written one


def measured_threads(recipe: Recipe) -> int:
    """Threads that a conversion measures decoding with: the most of `bench.threads`, else one for each processor.

    Raises:
        Failure: they are more than the engine can have.
    """
    asked = recipe.bench.threads if recipe.bench else None
    if asked and max(asked) > MAX_THREADS:
        raise Failure(f"bench.threads: {max(asked)} is more than {MAX_THREADS}", exit_code=2)
    return max(asked) if asked else min(processors(), MAX_THREADS)


@dataclass
class Conversion:
    """A conversion and its inputs.

    Attributes:
        reference: the dense model as the user named it.
        folder: the dense model as a model folder of ours.
        work: holds the finished steps, so that a stopped conversion resumes after the last of them.
        with_llama: whether llama.cpp is measured too.
        source_weights: the source's own weight types, for the report.
    """

    recipe: Recipe
    convert: ConvertSpec
    reference: str
    folder: Path
    dense: ScalingTransformerForCausalLM
    tokenizer: PreTrainedTokenizerBase
    text: ConversionText
    work: WorkFolder
    output: Path
    with_llama: bool = False
    source_weights: str = ""

    def run(self, candidates: list[ConversionCandidate]) -> Report:
        """Convert to one of the candidates: the only one, or the best that a search with a budget finds.

        Raises:
            Failure: the text does not suit this model, or a file cannot be written.
            Mismatch: no candidate meets the budget, or the written model differs from the converted one.
            Stopped: see `distil`.
        """
        self.work.compute_once("losses", self._measure_dense)
        if self.budget and rounds(self.convert, self.dense.config.spec):
            search = TypeSearch(self.dense, self.tokenizer, self.folder, self.text, self.work, self.convert)
            losses = self._losses(DENSE_TUNING), self._dense_loss()
            candidate, written, candidates = search.run(self.budget, *losses, self.recipe.seed)
            return self._finish(candidate, written, candidates, None)
        if self.budget:
            candidates = self._predict(candidates)
            candidate, model = self._build_within_budget(candidates, self.budget)
        else:
            candidate, model = self._build_given(candidates[0])
        recovery = self._distil(model) if self._needs_recovery(candidate, model) else None
        written = self._write_model(model)
        return self._finish(candidate, written, candidates, recovery)

    def _finish(
        self,
        candidate: ConversionCandidate,
        written: Path,
        candidates: list[ConversionCandidate],
        recovery: Recovery | None,
    ) -> Report:
        """Measure the written model beside the dense ones, and publish it with its report."""
        contenders, results, times, bandwidth = self._measure(candidate, written)
        report = Report(
            source=self.reference,
            output=str(self.output),
            budget=self.convert.budget,
            method=candidate.name,
            calibration_tokens=self.convert.calibration_tokens,
            held_out_tokens=len(self.text.held_out) * (self.text.held_out.sequence_length - 1),
            distillation_tokens=recovery.tokens if recovery else 0,
            kept_fraction=candidate.spec.kept_fraction,
            kept_fraction_by_layer=results[len(self.baselines)].kept_fractions,
            threads=self.threads,
            bandwidth_gb_per_second=round(bandwidth, 1),
            stages=self._stage_losses(candidate),
            models=self._measured_models(contenders, results, times),
            source_weights=self.source_weights,
            candidates=_summarize(candidates),
            recovery=recovery,
            processor=f"{host.processor()[0]}, {binding.isa()}",
            command=shlex.join(["sparsecli", *sys.argv[1:]]),
        )
        self._publish(report)
        return report

    @property
    def threads(self) -> int:
        """Threads that decoding is measured with."""
        return measured_threads(self.recipe)

    @cached_property
    def budget(self) -> Budget | None:
        """The recipe's budget; None where its layers are given."""
        return parse_budget(self.convert.budget) if self.convert.budget else None

    @cached_property
    def baselines(self) -> dict[str, str]:
        """Names and weight types of the dense models that the result is compared with."""
        if self.dense.config.spec.quantization.gguf:
            return {"dense, as it is": self.convert.decode_dtype}
        return BASELINES

    @cached_property
    def options(self) -> FitOptions:
        """Options of every fit."""
        return FitOptions(self.convert.controller_steps, torch.Generator().manual_seed(self.recipe.seed))

    # -- losses in PyTorch -----------------------------------------------------------------------------------

    def _measure_dense(self) -> dict[str, list[float]]:
        """Losses of the dense model by window. Raises Failure if the text does not suit it."""
        texts = [self.text.tuning, self.text.held_out]
        tuning, held_out = streamed_losses(self.dense, texts, "the dense model on tuning and held-out text")
        check_text(tuning, held_out, self.dense.config.vocab_size)
        return {DENSE_TUNING: tuning.tolist(), DENSE: held_out.tolist()}

    def _losses(
        self, name: str, model: ScalingTransformerForCausalLM | None = None, windows: Windows | None = None
    ) -> np.ndarray:
        """Losses of windows (W,), nats/token, as recorded under `name`; else of `model`, and recorded."""
        recorded = self.work.recall("losses")
        if name not in recorded:
            assert model is not None
            assert windows is not None
            losses = window_losses(model, windows, f"evaluating {name}").tolist()
            recorded = {**recorded, name: losses}
            self.work.record("losses", recorded)
        return np.array(recorded[name])

    def _dense_loss(self) -> float:
        """Held-out loss of the dense model, nats/token."""
        return float(self._losses(DENSE).mean())

    def _tuning_increase(
        self, candidate: ConversionCandidate, model: ScalingTransformerForCausalLM | None
    ) -> float:
        """Increase of the loss on tuning text, nats/token; needs no model where it was measured before."""
        losses = self._losses(candidate.tuning_key, model, self.text.tuning)
        return float((losses - self._losses(DENSE_TUNING)).mean())

    def _finish_stage(self, name: str, model: ScalingTransformerForCausalLM) -> None:
        """Record and print the held-out loss after a stage."""
        losses = self._losses(name, model, self.text.held_out)
        console.say(f"{name}: {HeldOutLoss.paired(losses, self._losses(DENSE))}")

    # -- search and fit --------------------------------------------------------------------------------------

    def _predict(self, candidates: list[ConversionCandidate]) -> list[ConversionCandidate]:
        """The candidates with their predicted losses, from fits of their parts."""
        tuning_loss = float(self._losses(DENSE_TUNING).mean())
        search = PartSearch(
            self.dense, self.text, self.convert.rank, self.options, tuning_loss, self.work.compute_once
        )
        return search.predict(candidates)

    def _build_given(
        self, candidate: ConversionCandidate
    ) -> tuple[ConversionCandidate, ScalingTransformerForCausalLM]:
        """Build the candidate, unless an earlier attempt has built it."""
        return self._built_before([candidate]) or self._choose(candidate, self._fit(candidate))

    def _build_within_budget(
        self, candidates: list[ConversionCandidate], budget: Budget
    ) -> tuple[ConversionCandidate, ScalingTransformerForCausalLM]:
        """Build the most promising candidates in turn, until one meets the budget on tuning text.

        Raises:
            Mismatch: none does.
        """
        dense_loss = self._dense_loss()
        ranked = rank_candidates(candidates, budget, dense_loss)
        allowed = budget.nats(dense_loss)
        if allowed is None:
            return self._build_given(ranked[0])

        def expected(candidate: ConversionCandidate, model: ScalingTransformerForCausalLM | None) -> float:
            return candidate.after_recovery(self._tuning_increase(candidate, model))

        built = self._built_before(ranked)
        if built and expected(*built) <= allowed:
            return built
        increases = []
        for candidate in ranked:
            is_measured = candidate.tuning_key in self.work.recall("losses")
            model = None if is_measured else self._fit(candidate)
            increases.append(expected(candidate, model))
            if increases[-1] <= allowed:
                return self._choose(candidate, model or self._fit(candidate))
            console.say(
                f"{candidate.name}: loss {increases[-1]:+.4f} nats/token on tuning text, {allowed:+.4f} allowed"
            )
        least = loss_budget(budget, min(increases), dense_loss)
        raise Mismatch(
            f"convert.budget: no candidate meets {budget} on tuning text once it is built; `budget: {least}` can be "
            f"met, and resumes from these measurements"
        )

    def _built_before(
        self, ranked: list[ConversionCandidate]
    ) -> tuple[ConversionCandidate, ScalingTransformerForCausalLM] | None:
        """The choice of an earlier attempt, if it is among those that are `ranked`."""
        chosen = next((each for each in ranked if each.name == self.work.recall("built")), None)
        model = self.work.load_model("fitted") if chosen else None
        return (chosen, model) if chosen and model else None

    def _choose(
        self, candidate: ConversionCandidate, model: ScalingTransformerForCausalLM
    ) -> tuple[ConversionCandidate, ScalingTransformerForCausalLM]:
        """Record `candidate` and its fitted model as the choice."""
        # A distillation in the folder belongs to another candidate, chosen under an earlier budget.
        shutil.rmtree(self.work.folder / "distillation", ignore_errors=True)
        recorded = self.work.recall("losses")
        self.work.record("losses", {name: losses for name, losses in recorded.items() if name != DISTILLED})
        self.work.record("built", None)
        self.work.keep_model("fitted", model)
        self.work.record("built", candidate.name)
        return candidate, model

    def _fit(self, candidate: ConversionCandidate) -> ScalingTransformerForCausalLM:
        """Fit and refit a whole model."""
        console.say(f"building {candidate.name}")
        model = initialize_from_dense(self.dense, candidate.spec)
        fit_model(self.dense, model, self.text.calibration, self.options, refit=False)
        self._finish_stage(f"fitted: {candidate.name}", model)
        if self.convert.refit and candidate.method and METHODS[candidate.method].recovers:
            fit_model(self.dense, model, self.text.calibration, self.options, refit=True, fitted=True)
            self._finish_stage(f"refitted: {candidate.name}", model)
        return model

    # -- recovery --------------------------------------------------------------------------------------------

    def _needs_recovery(self, candidate: ConversionCandidate, model: ScalingTransformerForCausalLM) -> bool:
        """Whether the model is distilled: if the recipe says so, unless it meets the loss budget already.

        A model that was distilled before, under a smaller budget, stays distilled.
        """
        if not self.convert.distillation.tokens:
            return False
        allowed = self.budget.nats(self._dense_loss()) if self.budget else None
        if allowed is None or DISTILLED in self.work.recall("losses"):
            return True
        return self._tuning_increase(candidate, model) > allowed

    def _distil(self, model: ScalingTransformerForCausalLM) -> Recovery:
        """Distil `model` in place."""
        recovery = distil(
            model,
            self.dense,
            self.text.corpus.tokenizer,
            self.text.distillation,
            self.text.tuning,
            self.convert.distillation,
            self.recipe.seed,
            self.work.folder / "distillation",
            self.work.hint,
        )
        self._finish_stage(DISTILLED, model)
        return recovery

    # -- writing and measuring -------------------------------------------------------------------------------

    def _write_model(self, model: ScalingTransformerForCausalLM) -> Path:
        """Write the model folder into the work folder, and check it."""
        written = self.work.keep_model(f"{RESULT}/model", model)
        with run_directory.writing(written, self.work.hint):
            self.tokenizer.save_pretrained(written)
            share(written)
        check_written(model, written)
        return written

    def _measure(
        self, candidate: ConversionCandidate, written: Path
    ) -> tuple[list[Contender], list[HeldOutResult], list[DecodingSpeed], float]:
        """Baselines, the written model and peers: losses and active units, speed, and bandwidth (GB/s).

        Raises:
            Mismatch: the written model exceeds the budget.
        """
        held_out = self.text.held_out
        contenders: list[Contender] = [
            NativeContender(
                name, self.folder, self.dense.config.spec, Precision.of(dtype), threads=self.threads
            )
            for name, dtype in self.baselines.items()
        ]
        precision = Precision.of(self.convert.decode_dtype)
        contenders.append(
            NativeContender(candidate.name, written, candidate.spec, precision, threads=self.threads)
        )
        results = [contender.evaluate(held_out) for contender in contenders]
        self._check_budget(HeldOutLoss.paired(results[-1].losses, self._losses(DENSE)))
        with TemporaryDirectory(dir=self.work.folder) as folder:
            peers = self._peers(Path(folder))
            contenders += peers
            results += [contender.evaluate(held_out) for contender in peers]
            with host.threads(self.threads):
                times, bandwidth = measure_speed(contenders, ROUNDS, self.recipe.seed)
        return contenders, results, times, bandwidth

    def _check_budget(self, loss: HeldOutLoss) -> None:
        dense_loss = self._dense_loss()
        allowed = self.budget.nats(dense_loss) if self.budget else None
        if self.budget is None or allowed is None or loss.increase <= allowed:
            return
        least = loss_budget(self.budget, loss.increase, dense_loss)
        change = f"{loss.relative_increase:+z.2%} loss, {loss}" if self.budget.kind == "loss" else f"{loss}"
        raise Mismatch(
            f"convert.budget: {self.budget} is exceeded on held-out text: {change}; `budget: {least}` accepts this "
            f"model, a smaller one picks again from the same measurements"
        )

    def _peers(self, folder: Path) -> Sequence[Contender]:
        """The dense model in other programs, with their files in `folder`; failures are warnings."""
        if not self.with_llama:
            return []
        from sparsecli.convert.llama_cpp import llama_contenders  # needs optional packages

        try:
            dense = dequantized(self.dense)
            importance = input_importance(dense, self.text.calibration)
            return llama_contenders(folder, dense, self.text.held_out, self.threads, importance)
        except Failure as failure:
            console.warn(f"llama.cpp is not measured: {failure}")
            return []

    # -- report ----------------------------------------------------------------------------------------------

    def _stage_losses(self, candidate: ConversionCandidate) -> list[StageLoss]:
        suffix = f": {candidate.name}"
        return [
            StageLoss(name.removesuffix(suffix), HeldOutLoss.paired(np.array(losses), self._losses(DENSE)))
            for name, losses in self.work.recall("losses").items()
            if name in (DENSE, DISTILLED) or name.endswith(suffix)
        ]

    def _measured_models(
        self, contenders: list[Contender], results: list[HeldOutResult], times: list[DecodingSpeed]
    ) -> list[MeasuredModel]:
        dense = self._losses(DENSE)
        return [
            MeasuredModel(
                contender.name,
                HeldOutLoss.paired(result.losses, dense),
                contender.bytes_per_token(result.kept_fractions),
                speed.decode_ms.p50,
                speed.prompt_ms.p50,
                bits_per_weight=round(contender.bits_per_weight(result.kept_fractions), 3),
                converted=index == len(self.baselines),
                peer=index > len(self.baselines),
                settings=contender.settings,
            )
            for index, (contender, result, speed) in enumerate(zip(contenders, results, times, strict=True))
        ]

    def _publish(self, report: Report) -> None:
        """Write the files beside the model, and move the result into place."""
        result = self.work.folder / RESULT
        with run_directory.writing(self.output, self.work.hint):
            self._write_files(report, result)
            if self.output.is_dir():
                self.output.rmdir()  # it is empty: see run_directory.claim
            self.work.record(COMPLETE, True)
            result.rename(self.output)
        self.work.close()

    def _write_files(self, report: Report, folder: Path) -> None:
        """Report, picture, facts of the run, and last the recipe, which marks a run."""
        run_directory.replace_text(folder / "report.md", report.markdown())
        run_directory.replace_text(folder / "report.json", json.dumps(report.as_json(), indent=2) + "\n")
        page.write_figure(report, folder / "frontier.png")
        card_of(report, self.recipe, license_of(self.folder)).write(folder / "model", self.output.name)
        loss = report.result.loss.nats_per_token
        bytes_per_token = self.text.held_out.bytes_per_token(self.text.corpus.tokenizer)
        facts = {
            "source": report.source,
            "seed": self.recipe.seed,
            "result": {
                "held_out_loss": loss,
                "bits_per_byte": loss / float(np.log(2)) / bytes_per_token,
            },
        }
        run_directory.write_facts(folder, run_directory.environment() | facts)
        resolved = self.recipe.model_copy(update={"output": str(self.output)})
        run_directory.replace_text(folder / RECIPE, dump(resolved))


def _summarize(candidates: list[ConversionCandidate]) -> list[CandidateSummary]:
    """The candidates with predictions, by bytes."""
    return [
        CandidateSummary(each.name, each.bytes_per_token, each.predicted_increase, each.expected_increase)
        for each in sorted(candidates, key=lambda each: each.bytes_per_token)
        if each.predicted_increase is not None
    ]


@torch.no_grad()
def check_written(model: ScalingTransformerForCausalLM, folder: Path) -> None:
    """Raise Mismatch unless the model in `folder` has the logits of `model`."""
    written = load_network(folder)
    ids = torch.arange(min(32, model.config.max_positions)).unsqueeze(0) % model.config.vocab_size
    difference = (written(ids).logits - model(ids).logits).abs().max().item()
    if not difference <= MAX_DIFFERENCE:
        raise Mismatch(f"{folder}: logits differ by {difference:.1e} from those of the converted model")
