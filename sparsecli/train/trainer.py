"""transformers' `Trainer` with our evaluation and checkpoints, and a clean stop at a signal."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, RandomSampler, Sampler
from transformers import (
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from sparsecli.console import Stopped, first_process, progress, say
from sparsecli.data.examples import Examples, PairExamples
from sparsecli.data.ordering import SimilarLengths
from sparsecli.model.layers.feed_forward import Controller, MixtureFeedForward
from sparsecli.model.layers.positions import LearnedPositions
from sparsecli.model.vision import ScalingTransformerForImageClassification
from sparsecli.recipe.training import TrainSpec
from sparsecli.spec.vision import CHANNELS
from sparsecli.train.checkpoint import prune, seal, step_of
from sparsecli.train.evaluation import HeldOut, TeacherModel, evaluate
from sparsecli.train.journal import TOKENS, Journal, Unit
from sparsecli.train.memory import keep_freed_memory
from sparsecli.train.samples import Samples
from sparsecli.train.sharding import (
    prepare_fsdp,
    set_whole_optimizer_state,
    uses_deepspeed,
    uses_fsdp,
    whole_optimizer_state,
)
from sparsecli.train.stages import in_stage

UNFINISHED = ".unfinished"
"""Folder under `checkpoints/` in which a checkpoint is written before it is renamed."""
SUMS = "sums.json"
"""File of a checkpoint: the sums since the last log, for the means of the next one."""


def training_arguments(
    train: TrainSpec, seed: int, checkpoints: Path, *, evaluations: bool = True
) -> TrainingArguments:
    """A recipe's `train` block as transformers' `TrainingArguments`, whose names are nearly the same."""
    ours = {"lr_scheduler_type", "min_lr_rate", "save_total_limit"}
    ours |= {"gradient_checkpointing", "start_units_per_block"}
    ours |= {"init_from", "distillation", "keep_zeros", "bf16", "optim", "eval_samples", "report_to"}
    schedule: dict[str, Any] = {"lr_scheduler_type": train.lr_scheduler_type}
    if train.lr_scheduler_type == "cosine":
        schedule = {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": train.min_lr_rate},
        }
    return TrainingArguments(
        output_dir=str(checkpoints / UNFINISHED),
        **train.model_dump(exclude=ours),
        **schedule,
        # One pass over the weights instead of a dozen: five times faster on a CPU.
        optim="adamw_torch_fused" if train.optim == "adamw_torch" else train.optim,
        activation_checkpointing=train.gradient_checkpointing,
        eval_strategy="steps" if evaluations else "no",
        save_strategy="steps",
        use_cache=True,  # the Trainer writes this into the model's config.json, where it is for decoding
        seed=seed,
        data_seed=seed,
        # A stage in which every unit is active does not use the controllers.
        ddp_find_unused_parameters=train.distillation is not None or train.start_units_per_block is not None,
        ddp_backend="gloo" if uses_deepspeed() and not torch.accelerator.is_available() else None,
        ddp_timeout=24 * 3600,  # seconds; the other processes wait while the first one prepares the text
        use_cpu=not (
            torch.accelerator.is_available() or uses_deepspeed()
        ),  # the latter finds its device itself
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        include_num_input_tokens_seen="all",
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[name for name in train.report_to if name != "tensorboard"],  # that is the journal's own
        run_name=checkpoints.parent.name,
        project="sparsecli",
    )


class Signals:
    """Records SIGTERM and SIGINT while open.

    A second signal has no effect, because the checkpoint that the first one requested may be incomplete. A third one
    has its default effect.

    Args:
        stop_after: seconds from now after which SIGTERM counts as received.
    """

    def __init__(self, stop_after: float | None = None) -> None:
        self._received: signal.Signals | None = None
        self._deadline = math.inf if stop_after is None else time.monotonic() + stop_after

    @property
    def received(self) -> signal.Signals | None:
        """The first signal since this was opened or cleared."""
        if self._received is None and time.monotonic() >= self._deadline:
            self._received = signal.SIGTERM
        return self._received

    def clear(self) -> None:
        """Forget the signal and the time to stop."""
        self._received, self._deadline = None, math.inf

    def __enter__(self) -> Signals:
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = signal.Signals(number)
            return
        self.__exit__()
        with suppress(RuntimeError):  # the signal arrived during another write
            say(
                "stopping after this step with a checkpoint; another signal stops at once, without the checkpoint"
            )


class LanguageModelTrainer(Trainer):
    """Trains on examples, evaluates with hard choices, and seals its checkpoints. Models of images train like those of
    text.

    Args:
        processor: the tokenizer, or the image processor.
        bytes_per_token: of the held-out text; None for images.
        samples: held-out sources whose targets the model generates at every evaluation.
        tuning: further examples on which every evaluation measures the loss, too.
        bf16: matrix products in bfloat16. Transformers' own option would also copy the logits to float32.
        start_units: active units per block at the start, see `stages`; None: the model's own k.
        keep: checkpoints to keep under `checkpoints`.
        signals: once it has received a signal, training stops at the end of the step, with a checkpoint.
    """

    control: TrainerControl
    ended_early = False
    """Whether training has ended before its last step, and not because of a signal."""

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        processor: PreTrainedTokenizerFast | BaseImageProcessor,
        examples: Examples,
        held_out: Examples,
        bytes_per_token: float | None,
        *,
        bf16: bool,
        checkpoints: Path,
        keep: int,
        signals: Signals,
        samples: Samples | None = None,
        tuning: Examples | None = None,
        start_units: int | None = None,
    ) -> None:
        super().__init__(
            model,
            arguments,
            train_dataset=examples,
            eval_dataset=held_out,
            processing_class=processor,
            data_collator=examples.collate,
        )
        self.examples, self.held_out, self.samples, self.tuning = examples, held_out, samples, tuning
        self.bytes_per_token, self.bf16 = bytes_per_token, bf16
        self.start_units = start_units
        self.teacher: TeacherModel | None = None
        self.checkpoints, self.keep, self.signals = checkpoints, keep, signals
        self.mixtures = [layer for layer in model.modules() if isinstance(layer, MixtureFeedForward)]
        self.sums: dict[str, Tensor | float] = {}  # over the batches since the last log
        self.logged_step = 0
        # All target tokens of a step have the same weight: the Trainer passes their number to the model. Windows are
        # equally long, so a step's loss is the mean over its batches; the Trainer's number would include the first
        # token of each window, which is not predicted.
        self.model_accepts_loss_kwargs = isinstance(examples, PairExamples)
        self.unit = TOKENS
        if isinstance(model, ScalingTransformerForImageClassification):
            self.unit = Unit("images", CHANNELS * model.config.image_size**2)
        self.remove_callback(PrinterCallback)
        self.add_callback(_StopAtSignal(self))
        self.add_callback(OrderOfEpoch())
        self.add_callback(_StepsOfRecipe())

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer, with FSDP on CPUs too."""
        super().create_accelerator_and_postprocess()
        if uses_fsdp():
            prepare_fsdp(self.accelerator)
            self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def compute_loss_context_manager(self) -> Any:
        """The autocast context of training and evaluation."""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.bf16)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one batch."""
        for layer in (
            self.mixtures
        ):  # the load-balancing loss does not pass through the Trainer, which would divide it
            layer.balancing_share = 1 / self.current_gradient_accumulation_steps
        assert isinstance(self.model, nn.Module)
        with in_stage(self.model, self.start_units, self.state.global_step, self.state.max_steps):
            loss = super().training_step(*args, **kwargs)
        noted = [layer.balancing for layer in self.mixtures if layer.balancing is not None]
        batch = {"batches": torch.ones(()), "loss": loss.detach()}
        if noted:
            batch["load_balancing"] = torch.stack(noted).mean()
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in batch.items()}
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the Trainer's figures, and the load-balancing loss of mixtures.

        The Trainer's loss covers the steps since this process began. Ours covers those since the last log.
        """
        if "loss" in logs:
            sums, self.sums = self._sums(), {}
            logs["loss"] = sums["loss"] / (self.state.global_step - self.logged_step)
            if "load_balancing" in sums:
                logs["load_balancing"] = sums["load_balancing"] / sums["batches"]
            self.logged_step = self.state.global_step
        super().log(logs, *args, **kwargs)

    def _sums(self) -> dict[str, float]:
        """`sums`, averaged over all processes. All of them have to call this."""
        processes = self.args.world_size
        sums = {name: torch.as_tensor(value) for name, value in self.sums.items()}
        return {
            name: (value if processes == 1 else self._add_up(value) / processes).item()
            for name, value in sums.items()
        }

    def restore_sums(self, checkpoint: Path) -> None:
        """Continue with the sums that were saved with a checkpoint.

        Earlier versions saved none. The next log then covers only the steps after the checkpoint.
        """
        path = checkpoint / SUMS
        saved = json.loads(path.read_text()) if path.exists() else {}
        self.logged_step, self.sums = saved.get("logged_step", step_of(checkpoint)), saved.get("sums", {})

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        # By the batch of a whole step, which several processes share: their number changes no step, and no step at the
        # end of an epoch is smaller than others.
        lengths, step = self.examples.lengths(), self.step_size
        whole = len(self.examples) // step * step or len(self.examples)
        if lengths is None:
            return RandomSampler(self.examples, num_samples=whole)
        return SimilarLengths(lengths, step, self.args.seed, whole)

    @property
    def step_size(self) -> int:
        """Examples of an optimizer step."""
        args = self.args
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of all matrices except embeddings, controllers and routers."""
        spared: set[int] = set()
        for module in model.modules():
            if isinstance(module, nn.Embedding | LearnedPositions | Controller):
                spared.update(map(id, module.parameters()))
            elif isinstance(module, MixtureFeedForward):
                spared.update(map(id, module.router.parameters()))
        named = model.named_parameters()
        return [name for name, parameter in named if parameter.ndim >= 2 and id(parameter) not in spared]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out figures, which are also logged. They are empty if a signal interrupts the evaluation; training then
        stops with a checkpoint."""
        assert isinstance(self.model, PreTrainedModel)
        if self.state.global_step >= self.state.max_steps:
            say("evaluating the trained model on what is held out")
        figures = self._figures(self.held_out, self.teacher)
        tuning = self._figures(self.tuning, None) if self.tuning else None
        with self.compute_loss_context_manager():
            written = self.samples.figures(self.model, self._cut_short) if self.samples else {}
        if figures is None or written is None or (self.tuning and tuning is None):
            self.control.should_evaluate = False
            self.control.should_save = self.control.should_training_stop = True
            return {}
        metrics = {
            "tuning_loss": tuning.nats_per_token if tuning else None,
            "held_out_loss": figures.nats_per_token,
            "accuracy": figures.accuracy,
            "bits_per_byte": figures.bits_per_byte,
            "never_chosen": figures.never_chosen,
            "balance": figures.balance,
            "kl_to_teacher": figures.kl_to_teacher,
            **written,
        }
        known = {name: value for name, value in metrics.items() if value is not None}
        self.log(dict(known))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, known)
        return known

    def _figures(self, examples: Examples, teacher: TeacherModel | None) -> HeldOut | None:
        """The figures on `examples`; None if a signal interrupted them."""
        assert isinstance(self.model, PreTrainedModel)
        alone = self.args.world_size == 1
        with self.compute_loss_context_manager():
            return evaluate(
                self.model,
                examples,
                self.bytes_per_token,
                batch_size=self.args.per_device_eval_batch_size,
                teacher=teacher,
                rank=self.args.process_index,
                ranks=self.args.world_size,
                add_up=(lambda sums: sums) if alone else self._add_up,
                stopped=self._cut_short,
            )

    def _cut_short(self) -> bool:
        """Whether to end an evaluation early. Several processes never do: they stop together, at the end of a step."""
        return self.args.world_size == 1 and self.signals.received is not None

    def stop_received(self) -> bool:
        """Whether any process of the run has received a signal."""
        return self.anywhere(self.signals.received is not None)

    def anywhere(self, here: bool) -> bool:
        """Whether `here` is true in any process of the run. All processes have to call this."""
        return here if self.args.world_size == 1 else bool(self._add_up(torch.tensor(float(here))))

    def _add_up(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums.to(self.args.device), reduction="sum").cpu()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """As the Trainer, without a second copy of tied weights, which gathered shards have."""
        assert isinstance(self.model, PreTrainedModel)
        if state_dict is not None and self.model.config.tie_word_embeddings:
            state_dict = {
                name: tensor
                for name, tensor in state_dict.items()
                if name not in self.model._tied_weights_keys
            }
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the Trainer, but with FSDP the files of a single process."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        whole = whole_optimizer_state(self.model_wrapped, self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(whole, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        whole = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
        set_whole_optimizer_state(self.model_wrapped, self.optimizer.optimizer, whole)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing with FSDP: the weights were loaded before they were sharded."""
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        unfinished = self.checkpoints / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        sums = self._sums()
        if self.args.should_save:
            written = unfinished / f"checkpoint-{self.state.global_step}"
            (written / SUMS).write_text(json.dumps({"logged_step": self.logged_step, "sums": sums}))
            (written / "training_args.bin").unlink(missing_ok=True)  # a pickle, which must not be loaded
            prune(self.checkpoints, seal(written, self.checkpoints), self.keep)
            shutil.rmtree(unfinished, ignore_errors=True)


class OrderOfEpoch(TrainerCallback):
    """Sets the epoch of the sampler.

    The Trainer does so too, but does not reach our sampler if one of several processes resumes within an epoch. There
    two other samplers wrap ours: one distributes the batches, and one skips those before the checkpoint.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        batches = kwargs["train_dataloader"].batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        if hasattr(batches.sampler, "set_epoch"):
            batches.sampler.set_epoch(int(state.epoch))


class _StepsOfRecipe(TrainerCallback):
    """Sets the logging, evaluation and save steps of a resumed run by its recipe, not by its checkpoint."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)


class KeepZeros(TrainerCallback):
    """Sets weights of matrices to zero after every step that were zero when this was made: they stay pruned."""

    def __init__(self, model: nn.Module) -> None:
        matrices = [weight for weight in model.parameters() if weight.ndim > 1]
        self.masks = [(weight, mask) for weight in matrices if not (mask := weight.detach() != 0).all()]

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for weight, mask in self.masks:
            weight.mul_(mask)


class _StopAtSignal(TrainerCallback):
    """Ends training after the step in which a signal arrived. In the last step a signal has no effect."""

    def __init__(self, trainer: LanguageModelTrainer) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step < state.max_steps and self.trainer.stop_received():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


def run_steps(
    trainer: LanguageModelTrainer,
    output: Path,
    checkpoint: Path | None,
    *,
    description: str,
    hint: str,
    tensorboard: bool = True,
) -> Journal | None:
    """Run `trainer` to its last step, from `checkpoint` if given, with a journal in `output`,
    which has a folder for TensorBoard if `tensorboard`.

    Returns the journal, in the first process. Raises `Stopped`, whose message ends with `hint`, after SIGTERM or
    SIGINT before the last step. A later signal has no effect.
    """
    keep_freed_memory()
    start_step, steps = step_of(checkpoint) if checkpoint else 0, trainer.args.max_steps
    with trainer.signals as signals, progress(description, steps) as bar:
        bar.advance(start_step)
        journal = Journal(output, start_step, bar, trainer.unit, tensorboard) if first_process() else None
        if journal:
            trainer.add_callback(journal)
            shutil.rmtree(trainer.checkpoints / UNFINISHED, ignore_errors=True)
        if checkpoint:
            trainer.restore_sums(checkpoint)
            if journal:
                prune(trainer.checkpoints, checkpoint, trainer.keep)
        if start_step < steps:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        elif checkpoint:
            trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    step = max(trainer.state.global_step, start_step)
    if step < steps and not trainer.ended_early:
        message = f"stopped at step {step} of {steps} with a checkpoint; {hint}"
        raise Stopped(message, exit_code=130 if signals.received == signal.SIGINT else None)
    signals.clear()  # of one in the last step, or in the evaluation after it
    return journal
