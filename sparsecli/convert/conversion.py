"""One conversion from start to end: baselines, search, fit, recovery, checks through the engine, report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from sparsecli import console
from sparsecli.console import Failure, Mismatch
from sparsecli.convert import search
from sparsecli.convert.evaluation import Loss, window_losses
from sparsecli.convert.fitting import fit, start
from sparsecli.convert.measurement import Contender, Decoded, OwnContender, Speed, speeds
from sparsecli.convert.methods import METHODS, Options
from sparsecli.convert.plan import RECOVERED, Candidate, eligible, rounded_up, would_hold
from sparsecli.convert.report import Considered, Report, Row, Stage
from sparsecli.convert.text import Text, check_language
from sparsecli.convert.work import Work
from sparsecli.decode.engine import processors
from sparsecli.decode.packing import Precision
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.checkpoint import load_network
from sparsecli.model.folder import share
from sparsecli.recipe.budget import Budget, parse_budget
from sparsecli.recipe.loader import dump
from sparsecli.recipe.schema import ConvertSpec, Recipe
from sparsecli.train import run_directory
from sparsecli.train.distillation import distil

BASELINES = {"dense, bfloat16": "bfloat16", "dense, int8": "int8", "dense, 4 bit, nearest": "int4"}
TRIES = 3  # candidates that are built before a loss budget is given up
CONVERTED = len(BASELINES)
"""Place of the converted model among the rows: after the baselines, before other programs."""
ROUNDS = 7
TORN = 1e-4  # difference of logits between the model in memory and the one written


@dataclass
class Conversion:
    """What a conversion needs; `run` does it.

    Attributes:
        reference: the dense model as the user named it.
        folder: where it lies as a model folder of ours.
        with_llama: whether llama.cpp is measured too.
    """

    recipe: Recipe
    convert: ConvertSpec
    reference: str
    folder: Path
    dense: ScalingTransformerForCausalLM
    tokenizer: PreTrainedTokenizerBase
    text: Text
    work: Work
    output: Path
    with_llama: bool = False

    def run(self, found: list[Candidate]) -> Report:
        """Convert to one of the candidates `found`, of which a search with a budget chooses.

        Raises:
            Failure: the text is not for this model, or something cannot be written.
            Mismatch: no candidate keeps the budget, or the written model is not the converted one.
            Stopped: see `distil`.
        """
        budget = parse_budget(self.convert.budget) if self.convert.budget else None
        options = Options(self.convert.controller_steps, torch.Generator().manual_seed(self.recipe.seed))
        tuning = self._losses("dense on tuning text", self.dense, tuning=True)
        dense = self._losses("dense", self.dense)
        check_language(tuning, dense, self.dense.config.vocab_size)
        if budget is not None:
            found = self._measured(found, float(tuning.mean()), options)
        dense_loss = float(dense.mean())
        allowed = None if budget is None else budget.nats(dense_loss)
        ranked = found if budget is None else eligible(found, budget, dense_loss)
        if budget is not None and not ranked:
            self.work.close()
            nearest = would_hold(found, budget, dense_loss)
            raise Mismatch(f"convert.budget: nothing keeps {budget}; `budget: {nearest}` would hold")
        candidate, model = self._built(ranked, tuning, allowed, options)
        distilled = 0
        if self._needs_recovery(candidate, model, tuning, allowed):
            distilled = self._distil(model)
        return self._finish(candidate, model, dense, budget, found, distilled)

    # -- search and fit --------------------------------------------------------------------------------------

    def _measured(self, found: list[Candidate], reference: float, options: Options) -> list[Candidate]:
        """The candidates with what they are predicted to cost over the dense model's loss on tuning text."""
        changes = self.work.recall("changes")
        if changes is None:
            measured = search.measure_parts(
                self.dense, found, self.text, self.convert.rank, options, reference
            )
            changes = {each.name: each.change for each in measured}
            self.work.note("changes", changes)
        return [replace(each, change=changes[each.name]) for each in found]

    def _built(
        self, ranked: list[Candidate], tuning: np.ndarray, allowed: float | None, options: Options
    ) -> tuple[Candidate, ScalingTransformerForCausalLM]:
        """The first candidate that, once it is built, still keeps the budget on tuning text; else the best tried."""
        done = next((each for each in ranked if each.name == self.work.recall("built")), None)
        if done is not None and (model := self.work.model("fitted")) is not None:
            return done, model
        self._forget_distillation()  # of another candidate, which an earlier budget allowed
        tried: list[tuple[float, Candidate, ScalingTransformerForCausalLM]] = []
        for candidate in ranked[: TRIES if allowed is not None else 1]:
            console.say(f"building {candidate.name}")
            model = self._fitted(candidate, options)
            change = self._change(candidate, model, tuning)
            remaining = change * (1 - RECOVERED if candidate.recovers else 1)
            tried.append((remaining, candidate, model))
            if allowed is None or remaining <= allowed:
                break
            console.say(f"{candidate.name}: {change:+.4f} nats on tuning text, {allowed:+.4f} allowed")
        _, candidate, model = min(tried, key=lambda each: each[0])
        self.work.keep_model("fitted", model)
        self.work.note("built", candidate.name)
        return candidate, model

    def _fitted(self, candidate: Candidate, options: Options) -> ScalingTransformerForCausalLM:
        model = start(self.dense, candidate.spec)
        fit(self.dense, model, self.text.calibration, options, refit=False)
        self._stage(f"fitted: {candidate.name}", model)
        if self.convert.refit and candidate.method and METHODS[candidate.method].recovers:
            fit(self.dense, model, self.text.calibration, options, refit=True, keep=True)
            self._stage(f"refitted: {candidate.name}", model)
        return model

    def _needs_recovery(
        self,
        candidate: Candidate,
        model: ScalingTransformerForCausalLM,
        tuning: np.ndarray,
        allowed: float | None,
    ) -> bool:
        """Whether the model is distilled: as the recipe says, but not when the loss budget is kept already.

        One that was distilled before, under a narrower budget, stays so.
        """
        if not self.convert.distillation.tokens:
            return False
        if allowed is None or "distilled" in (self.work.recall("losses") or {}):
            return True
        return self._change(candidate, model, tuning) > allowed

    def _change(
        self, candidate: Candidate, model: ScalingTransformerForCausalLM, tuning: np.ndarray
    ) -> float:
        """Nats a token over the dense model's on tuning text, of a candidate that was fitted."""
        return float((self._losses(f"{candidate.name} on tuning text", model, tuning=True) - tuning).mean())

    def _distil(self, model: ScalingTransformerForCausalLM) -> int:
        """Distil `model` in place; the number of tokens it saw."""
        spec, data = self.convert.distillation, self.text.data
        training = spec.training(data.sequence_length)
        folder = self.work.folder / "distillation"
        distil(
            model,
            self.dense,
            self.text.corpus,
            data,
            spec,
            training,
            self.recipe.seed,
            folder,
            self.work.hint,
        )
        self._stage("distilled", model)
        return training.max_steps * spec.batch_size * data.sequence_length

    def _forget_distillation(self) -> None:
        shutil.rmtree(self.work.folder / "distillation", ignore_errors=True)
        known = self.work.recall("losses")
        self.work.note("losses", {name: losses for name, losses in known.items() if name != "distilled"})

    def _losses(self, name: str, model: ScalingTransformerForCausalLM, tuning: bool = False) -> np.ndarray:
        """Losses of windows, remembered under the stage's name."""
        known = self.work.recall("losses") or {}
        if name not in known:
            losses = window_losses(model, self.text.tuning if tuning else self.text.held_out)
            known = {**known, name: losses.tolist()}
            self.work.note("losses", known)
        return np.array(known[name])

    def _stage(self, name: str, model: ScalingTransformerForCausalLM) -> None:
        loss = Loss.of(self._losses(name, model), self._losses("dense", self.dense))
        console.say(f"{name}: {loss}")

    # -- checks and report -----------------------------------------------------------------------------------

    def _finish(
        self,
        candidate: Candidate,
        model: ScalingTransformerForCausalLM,
        dense: np.ndarray,
        budget: Budget | None,
        found: list[Candidate],
        distilled: int,
    ) -> Report:
        """Write the model beside, check it there, and put everything in its place."""
        result = self.work.folder / "result"
        written = self.work.keep_model("result/model", model)
        with run_directory.writing(written, self.work.hint):
            self.tokenizer.save_pretrained(written)
            share(written)
        check_written(model, written)
        contenders: list[Contender] = [
            OwnContender(name, self.folder, self.dense.config.spec, Precision.of(dtype))
            for name, dtype in BASELINES.items()
        ]
        precision = Precision.of(self.convert.decode_dtype)
        contenders.append(OwnContender(candidate.name, written, candidate.spec, precision))
        decoded = [contender.decode(self.text.held_out) for contender in contenders]
        loss = Loss.of(decoded[CONVERTED].losses, dense)
        self._check_budget(loss, budget, float(dense.mean()))
        with TemporaryDirectory(dir=self.work.folder) as folder:
            peers = self._peers(Path(folder))
            contenders += peers
            decoded += [contender.decode(self.text.held_out) for contender in peers]
            times, gb_per_second = speeds(contenders, ROUNDS, self.recipe.seed)
        report = self._report(candidate, contenders, decoded, times, dense, found, distilled, gb_per_second)
        with run_directory.writing(self.output, self.work.hint):
            self._write(report, result, loss)
            if self.output.is_dir():
                self.output.rmdir()  # it is empty: see run_directory.claim
            result.rename(self.output)
        self.work.close()
        return report

    def _peers(self, folder: Path) -> Sequence[Contender]:
        """The dense model in other programs, whose files lie in `folder`; what cannot be measured is told."""
        if not self.with_llama:
            return []
        from sparsecli.convert import llama

        try:
            return llama.contenders(folder, self.dense, self.text.held_out, processors())
        except Failure as failure:
            console.warn(f"llama.cpp is not measured: {failure}")
            return []

    def _check_budget(self, loss: Loss, budget: Budget | None, dense: float) -> None:
        allowed = None if budget is None else budget.nats(dense)
        if budget is None or allowed is None or loss.change <= allowed:
            return
        again = rounded_up(budget, loss.change, dense)
        cost = f"{loss.loss_change:+.2%} loss, {loss}" if budget.kind == "loss" else f"{loss}"
        raise Mismatch(
            f"convert.budget: {budget} is not kept on held-out text: {cost}; `budget: {again}` takes what was built, "
            f"a new --output searches again"
        )

    def _report(
        self,
        candidate: Candidate,
        contenders: list[Contender],
        decoded: list[Decoded],
        times: list[Speed],
        dense: np.ndarray,
        found: list[Candidate],
        distilled: int,
        gb_per_second: float,
    ) -> Report:
        known = self.work.recall("losses")
        stages = [
            Stage(name.removesuffix(f": {candidate.name}"), Loss.of(np.array(losses), dense))
            for name, losses in known.items()
            if name in ("dense", "distilled") or name.endswith(f": {candidate.name}")
        ]
        rows = [
            Row(
                contender.name,
                Loss.of(computed.losses, dense),
                contender.bytes_per_token(computed.kept_fractions),
                speed.decode_ms.p50,
                speed.prompt_ms.p50,
                converted=contender is contenders[CONVERTED],
                peer=index > CONVERTED,
                settings=contender.settings,
            )
            for index, (contender, computed, speed) in enumerate(zip(contenders, decoded, times, strict=True))
        ]
        considered = [
            Considered(each.name, each.bytes_per_token, each.change, each.expected)
            for each in sorted(found, key=lambda each: each.bytes_per_token)
            if each.change is not None
        ]
        held_out = self.text.held_out
        return Report(
            source=self.reference,
            output=str(self.output),
            budget=self.convert.budget,
            method=candidate.name,
            calibration_tokens=self.convert.calibration_tokens,
            held_out_tokens=len(held_out) * (held_out.sequence_length - 1),
            distilled_tokens=distilled,
            kept_fraction=candidate.spec.kept_fraction,
            kept_fraction_by_layer=decoded[CONVERTED].kept_fractions,
            threads=processors(),
            bandwidth_gb_per_second=round(gb_per_second, 1),
            stages=stages,
            rows=rows,
            considered=considered,
        )

    def _write(self, report: Report, result: Path, loss: Loss) -> None:
        """Everything beside the model; the recipe, which marks a run, comes last."""
        run_directory.replace_text(result / "report.md", report.markdown())
        run_directory.replace_text(result / "report.json", json.dumps(report.as_json(), indent=2) + "\n")
        report.draw(result / "frontier.png")
        bytes_per_token = self.text.held_out.bytes_per_token(self.text.corpus.tokenizer)
        figures = {
            "held_out_nats": loss.nats_per_token,
            "bits_per_byte": loss.nats_per_token / float(np.log(2)) / bytes_per_token,
        }
        facts = run_directory.environment() | {
            "source": report.source,
            "seed": self.recipe.seed,
            "result": figures,
        }
        run_directory.write_facts(result, facts)
        resolved = self.recipe.model_copy(update={"output": str(self.output)})
        run_directory.replace_text(result / run_directory.RECIPE, dump(resolved))


@torch.no_grad()
def check_written(model: ScalingTransformerForCausalLM, folder: Path) -> None:
    """Raise Mismatch unless the model in `folder` computes what `model` does."""
    written = load_network(folder)
    ids = torch.arange(min(32, model.config.max_positions)).unsqueeze(0) % model.config.vocab_size
    difference = (written(ids).logits - model(ids).logits).abs().max().item()
    if not difference <= TORN:
        raise Mismatch(f"{folder}: logits differ by {difference:.1e} from those of the converted model")
