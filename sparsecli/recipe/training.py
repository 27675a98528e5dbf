"""The parts of a recipe about training: from text, from a teacher, and recovery after a conversion."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sparsecli.spec.base import Count, Probability, Size, Spec, Whole, fault

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class Objective(Spec):
    """The objective of distillation: a weighted sum of these terms.

    Layers choose units as in decoding: hard and without noise.
    """

    temperature: Positive = 1.0
    """Divides the logits of both models; values above 1 give unlikely tokens more weight."""
    kl_weight: NonNegative = 1.0
    """Weight of KL(teacher || student) over the vocabulary, in nats per token times the temperature's square."""
    hidden_weight: NonNegative = 0.0
    """Weight of the mean squared error of the final hidden state; needs a teacher of the same width."""
    cross_entropy_weight: NonNegative = 0.0
    """Weight of the cross-entropy on the text itself."""
    controller_weight: NonNegative = 0.0
    """Weight of the controllers' cross-entropy, whose targets are the units that contribute most (kind sparse)."""
    start_units_per_block: Size | None = None
    """Active units per block at the start. Each stage halves them, down to the model's own k after half of the steps;
    by default they are the model's own k from the start."""

    @model_validator(mode="after")
    def _check(self) -> Objective:
        if not (self.kl_weight or self.hidden_weight or self.cross_entropy_weight):
            raise fault("kl_weight", "all weights are 0; set at least one of them above 0")
        return self


class DistillationSpec(Objective):
    """Train towards another model's predictions."""

    teacher: str
    """The teacher: a run or a model folder, with the same vocabulary."""


Reporter = Literal["tensorboard", "wandb", "trackio"]


class TrainSpec(Spec):
    """Training, with the names of transformers' `TrainingArguments`."""

    max_steps: Size
    """Total number of optimizer steps."""
    per_device_train_batch_size: Size = 8
    """Windows or pairs per step and device."""
    gradient_accumulation_steps: Size = 1
    """Batches summed into one step."""
    per_device_eval_batch_size: Size = 16
    """Windows or pairs per evaluation batch."""
    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt"] = (
        "cosine"
    )
    """Shape of the learning rate after the warm-up."""
    min_lr_rate: Probability = 0.05
    """Final learning rate of the cosine schedule, as a share of the peak."""
    warmup_steps: Count = 0
    """Steps of linear warm-up."""
    optim: Literal["adamw_torch", "adafactor"] = "adamw_torch"
    """Optimizer."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay rate of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay rate of the second moment."""
    weight_decay: NonNegative = 0.1
    """Weight decay of matrices; controllers, embeddings, norms and biases have none."""
    max_grad_norm: NonNegative = 1.0
    """Clip the gradient to this norm; 0 turns clipping off."""
    bf16: bool = False
    """Compute matrix products in bfloat16, with float32 weights. Processors that only emulate bfloat16 use float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    torch_compile: bool = False
    """Compile the model with torch."""
    logging_steps: Size = 10
    """Steps between lines of the log."""
    eval_steps: Size = 250
    """Steps between evaluations on held-out data."""
    eval_samples: Count = 128
    """Held-out sources whose targets every evaluation generates greedily, to measure ROUGE or, for copies, the share
    of exact ones; 0 generates none."""
    save_steps: Size = 250
    """Steps between checkpoints."""
    save_total_limit: Annotated[Whole, Field(ge=2)] = 2
    """Checkpoints to keep; at least two, so that a damaged one is never the only one."""
    report_to: list[Reporter] = Field(default=["tensorboard"])
    """Who else gets the figures of `metrics.jsonl`: `tensorboard` (files in the run), `wandb`, `trackio`."""
    start_units_per_block: Size | None = None
    """Active units per block of Sparse FF at the start. Each stage halves them, down to the model's own k after half of
    the steps; by default they are the model's own k from the start."""
    init_from: str | None = None
    """Start from the weights of this run or model folder; the recipe may omit its architecture and tokenizer."""
    keep_zeros: bool = False
    """Keep weights of matrices at zero that are zero at the start, as those of a pruned model are."""
    distillation: DistillationSpec | None = None
    """Learn from a teacher instead of from the text alone."""

    @model_validator(mode="after")
    def _check(self) -> TrainSpec:
        if self.start_units_per_block and self.distillation:
            raise fault("start_units_per_block", "with a teacher it belongs into train.distillation")
        return self

    @property
    def bound_to_max_steps(self) -> str | None:
        """The quantity that depends on `max_steps` in every step, so that a run cannot be extended; None if none."""
        if self.lr_scheduler_type in ("cosine", "linear"):
            return "the learning rate"
        if self.start_units_per_block or (self.distillation and self.distillation.start_units_per_block):
            return "the number of chosen units"
        return None


Trained = Literal["all", "fitted", "norms_and_biases"]
"""Parameters that a recovery trains: all that are not quantized, those of replaced layers, or only vectors."""


class RecoverySpec(Objective):
    """Train the converted model towards the dense one. The best state on tuning text is kept; it may be the start."""

    tokens: Count = 400_000
    """Tokens to train on at most, without those of trials; 0 skips distillation."""
    batch_size: Size = 8
    """Windows per step."""
    learning_rate: Positive | None = None
    """Peak learning rate (cosine to 5 %); by default short trials on tuning text choose it. A given one is used as it
    is, without trials."""
    trains: Trained | None = None
    """Parameters that train: `all` that are not quantized, those of the `fitted` layers, or `norms_and_biases`; by
    default the trials choose, and without trials all train."""
    warmup_fraction: Probability | None = None
    """Share of the steps in which the learning rate rises from 0; by default the trials choose, and without trials
    it is a tenth."""
    evaluations: Size = 12
    """Evaluations on tuning text, at equal intervals."""
    patience: Size = 4
    """Stop after this many evaluations without a better one."""

    def steps(self, sequence_length: int) -> int:
        """Optimizer steps on windows of `sequence_length` tokens."""
        return max(1, round(self.tokens / (self.batch_size * sequence_length)))

    def training(self, steps: int, learning_rate: float, warmup_fraction: float) -> TrainSpec:
        """The `train` block of so many steps."""
        return TrainSpec(
            max_steps=steps,
            per_device_train_batch_size=self.batch_size,
            learning_rate=learning_rate,
            warmup_steps=round(steps * warmup_fraction),
            weight_decay=0.0,
            bf16=True,
            logging_steps=1,
            eval_steps=-(-steps // self.evaluations),
            save_steps=50,
        )
