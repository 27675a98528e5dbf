"""One conversion from start to end: baselines, search, fit, recovery, checks through the engine, report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
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
from sparsecli.convert.plan import RECOVERED, Candidate, eligible, rounded_up
from sparsecli.convert.report import Considered, Report, Row, Stage
from sparsecli.convert.text import Text, check_language
from sparsecli.convert.work import COMPLETE, RESULT, Work
from sparsecli.data.packing import Windows
from sparsecli.decode.engine import processors
from sparsecli.decode.packed.precision import Precision
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.files import RECIPE, share
from sparsecli.model.loading import load_network
from sparsecli.recipe.budget import Budget, parse_budget
from sparsecli.recipe.loader import dump
from sparsecli.recipe.schema import ConvertSpec, Recipe
from sparsecli.train import run_directory
from sparsecli.train.distillation import distil

BASELINES = {"dense, bfloat16": "bfloat16", "dense, int8": "int8", "dense, 4 bit, nearest": "int4"}
TUNING = "dense on tuning text"
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
        known = self.work.once("losses", self._baselines)
        tuning, dense = np.array(known[TUNING]), np.array(known["dense"])
        if budget is None:
            candidate, model = self._only(found[0], options)
        else:
            found = search.measure_parts(
                self.dense,
                found,
                self.text,
                self.convert.rank,
                options,
                float(tuning.mean()),
                self.work.once,
            )
            candidate, model = self._chosen(found, budget, tuning, float(dense.mean()), options)
        allowed = None if budget is None else budget.nats(float(dense.mean()))
        distilled = 0
        if self._needs_recovery(candidate, model, tuning, allowed):
            distilled = self._distil(model)
        return self._finish(candidate, model, dense, budget, found, distilled)

    # -- search and fit --------------------------------------------------------------------------------------

    def _baselines(self) -> dict[str, list[float]]:
        """Losses of the dense model. Raises Failure unless the text is for it."""
        tuning, held_out = (
            window_losses(self.dense, windows, f"the dense model on {kind} text")
            for kind, windows in (("tuning", self.text.tuning), ("held-out", self.text.held_out))
        )
        check_language(tuning, held_out, self.dense.config.vocab_size)
        return {TUNING: tuning.tolist(), "dense": held_out.tolist()}

    def _only(
        self, candidate: Candidate, options: Options
    ) -> tuple[Candidate, ScalingTransformerForCausalLM]:
        """The candidate of given layers, built."""
        return self._kept([candidate]) or self._keep(candidate, self._fitted(candidate, options))

    def _chosen(
        self,
        found: list[Candidate],
        budget: Budget,
        tuning: np.ndarray,
        dense_loss: float,
        options: Options,
    ) -> tuple[Candidate, ScalingTransformerForCausalLM]:
        """The first candidate that, once it is built, still keeps the budget on tuning text.

        Raises:
            Mismatch: there is none.
        """
        ranked = eligible(found, budget, dense_loss)
        allowed = budget.nats(dense_loss)
        if allowed is None:
            return self._only(ranked[0], options)

        def remaining(candidate: Candidate, model: ScalingTransformerForCausalLM | None) -> float:
            """What a candidate costs once it is recovered; it needs no model where it was tried before."""
            change = self._change(candidate, model, tuning)
            return change * (1 - RECOVERED if candidate.recovers else 1)

        kept = self._kept(ranked)
        if kept and remaining(*kept) <= allowed:
            return kept
        tried = []
        for candidate in ranked:
            model = None if self._is_known(candidate) else self._fitted(candidate, options)
            tried.append(remaining(candidate, model))
            if tried[-1] <= allowed:
                return self._keep(candidate, model or self._fitted(candidate, options))
            console.say(f"{candidate.name}: {tried[-1]:+.4f} nats on tuning text, {allowed:+.4f} allowed")
        again = rounded_up(budget, min(tried), dense_loss)
        raise Mismatch(
            f"convert.budget: nothing keeps {budget} on tuning text once it is built; `budget: {again}` would hold, "
            f"and goes on from what is measured"
        )

    def _kept(self, ranked: list[Candidate]) -> tuple[Candidate, ScalingTransformerForCausalLM] | None:
        """What an earlier attempt chose, if it is among those that are `ranked`."""
        chosen = next((each for each in ranked if each.name == self.work.recall("built")), None)
        model = self.work.model("fitted") if chosen else None
        return (chosen, model) if chosen and model else None

    def _keep(
        self, candidate: Candidate, model: ScalingTransformerForCausalLM
    ) -> tuple[Candidate, ScalingTransformerForCausalLM]:
        """Have `candidate`, as it was built, chosen from now on."""
        # What there may be of a distillation is another candidate's, which an earlier budget allowed.
        shutil.rmtree(self.work.folder / "distillation", ignore_errors=True)
        known = self.work.recall("losses")
        self.work.note("losses", {name: losses for name, losses in known.items() if name != "distilled"})
        self.work.note("built", None)
        self.work.keep_model("fitted", model)
        self.work.note("built", candidate.name)
        return candidate, model

    def _fitted(self, candidate: Candidate, options: Options) -> ScalingTransformerForCausalLM:
        console.say(f"building {candidate.name}")
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
        if allowed is None or "distilled" in self.work.recall("losses"):
            return True
        return self._change(candidate, model, tuning) > allowed

    def _change(
        self, candidate: Candidate, model: ScalingTransformerForCausalLM | None, tuning: np.ndarray
    ) -> float:
        """Nats a token over the dense model's on tuning text, of a candidate that was fitted."""
        return float((self._losses(candidate.tuning, model, self.text.tuning) - tuning).mean())

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
            self.text.beginning,
        )
        self._stage("distilled", model)
        return training.max_steps * spec.batch_size * data.sequence_length

    def _is_known(self, candidate: Candidate) -> bool:
        """Whether it was measured on tuning text."""
        return candidate.tuning in self.work.recall("losses")

    def _losses(self, name: str, model: ScalingTransformerForCausalLM | None, windows: Windows) -> np.ndarray:
        """Losses of windows, remembered under the stage's name."""
        known = self.work.recall("losses")
        if name not in known:
            assert model is not None
            known = {**known, name: window_losses(model, windows, f"judging {name}").tolist()}
            self.work.note("losses", known)
        return np.array(known[name])

    def _stage(self, name: str, model: ScalingTransformerForCausalLM) -> None:
        held_out = self.text.held_out
        loss = Loss.of(self._losses(name, model, held_out), self._losses("dense", self.dense, held_out))
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
        result = self.work.folder / RESULT
        written = self.work.keep_model(f"{RESULT}/model", model)
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
            self.work.note(COMPLETE, True)
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
        cost = f"{loss.loss_change:+z.2%} loss, {loss}" if budget.kind == "loss" else f"{loss}"
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
            "held_out_loss": loss.nats_per_token,
            "bits_per_byte": loss.nats_per_token / float(np.log(2)) / bytes_per_token,
        }
        facts = run_directory.environment() | {
            "source": report.source,
            "seed": self.recipe.seed,
            "result": figures,
        }
        run_directory.write_facts(result, facts)
        resolved = self.recipe.model_copy(update={"output": str(self.output)})
        run_directory.replace_text(result / RECIPE, dump(resolved))


@torch.no_grad()
def check_written(model: ScalingTransformerForCausalLM, folder: Path) -> None:
    """Raise Mismatch unless the model in `folder` computes what `model` does."""
    written = load_network(folder)
    ids = torch.arange(min(32, model.config.max_positions)).unsqueeze(0) % model.config.vocab_size
    difference = (written(ids).logits - model(ids).logits).abs().max().item()
    if not difference <= TORN:
        raise Mismatch(f"{folder}: logits differ by {difference:.1e} from those of the converted model")
