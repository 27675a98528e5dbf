"""transformers' own `Trainer` and `Seq2SeqTrainer` on the three models, as their users write it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from sparsecli.model import (
    ScalingTransformerConfig,
    ScalingTransformerEncoderDecoderConfig,
    ScalingTransformerForCausalLM,
    ScalingTransformerForConditionalGeneration,
    TerraformerConfig,
    TerraformerForConditionalGeneration,
)

VOCABULARY = 64
SIZES = {
    "d_model": 32,
    "layers": 2,
    "heads": 4,
    "max_positions": 40,
    "feed_forward": {"kind": "sparse", "d_ff": 64, "block_size": 8, "rank": 6},
    "vocabulary": {"kind": "dense", "size": VOCABULARY},
    "pad_token_id": 0,
}
CLASSES = {
    ScalingTransformerForCausalLM: ScalingTransformerConfig,
    ScalingTransformerForConditionalGeneration: ScalingTransformerEncoderDecoderConfig,
    TerraformerForConditionalGeneration: TerraformerConfig,
}
WITH_ENCODER = [ScalingTransformerForConditionalGeneration, TerraformerForConditionalGeneration]


def build(kind: type[PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(CLASSES[kind](**SIZES))


def examples(model: PreTrainedModel, count: int = 5) -> list[dict[str, list[int]]]:
    """Texts of nine tokens; or sources of seven to nine, with a target of five each."""
    ids = torch.randint(2, VOCABULARY, (count, 14), generator=torch.Generator().manual_seed(1)).tolist()
    if not model.config.is_encoder_decoder:
        return [{"input_ids": row[:9], "labels": row[:9]} for row in ids]
    return [{"input_ids": row[: 7 + i % 3], "labels": row[9:]} for i, row in enumerate(ids)]


def arguments(folder: Path, **fields: object) -> dict[str, object]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        **fields,
    }


class Padding:
    """Sources padded on the right; transformers' collator does so with a tokenizer, of which there is none here."""

    def pad(self, features: list[dict], **_: object) -> dict[str, Tensor]:
        width = max(len(feature["input_ids"]) for feature in features)
        batch = {name: torch.zeros(len(features), width, dtype=torch.long) for name in ("input_ids", "mask")}
        for row, feature in enumerate(features):
            ids = torch.as_tensor(feature["input_ids"])
            batch["input_ids"][row, : len(ids)] = ids
            batch["mask"][row, : len(ids)] = 1
        return {"input_ids": batch["input_ids"], "attention_mask": batch["mask"]}

    padding_side = "right"


def collator(model: PreTrainedModel) -> DataCollatorForSeq2Seq | None:
    return DataCollatorForSeq2Seq(Padding(), model) if model.config.is_encoder_decoder else None


@pytest.mark.parametrize("kind", CLASSES)
def test_trainer_evaluates_while_it_trains(kind: type[PreTrainedModel], tmp_path: Path) -> None:
    model = build(kind)
    seen = []
    trainer = Trainer(
        model,
        TrainingArguments(**arguments(tmp_path)),
        data_collator=collator(model),
        train_dataset=examples(model),
        eval_dataset=examples(model),
        compute_metrics=lambda prediction: seen.append(prediction) or {},
    )
    trainer.train()
    found = trainer.evaluate()
    assert 0 < found["eval_loss"] < 10
    logits = seen[-1].predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    assert logits.shape == (5, 5 if model.config.is_encoder_decoder else 9, VOCABULARY)


@pytest.mark.parametrize("kind", WITH_ENCODER)
def test_seq2seq_trainer_writes_what_generate_writes(kind: type[PreTrainedModel], tmp_path: Path) -> None:
    model = build(kind)
    settings = {"predict_with_generate": True, "generation_max_length": 6, "generation_num_beams": 2}
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(**arguments(tmp_path, **settings)),
        data_collator=collator(model),
        train_dataset=examples(model),
        eval_dataset=examples(model),
    )
    trainer.train()
    assert 0 < trainer.evaluate()["eval_loss"] < 10
    written = trainer.predict(examples(model, 2)).predictions
    batch = Padding().pad(examples(model, 2))
    alone = model.eval().generate(**batch, max_length=6, num_beams=2)
    assert written[:, : alone.shape[1]].tolist() == alone.tolist()


@pytest.mark.parametrize("kind", CLASSES)
def test_labels_are_smoothed_against_the_tokens_they_belong_to(
    kind: type[PreTrainedModel], tmp_path: Path
) -> None:
    """The Trainer shifts labels for models that it knows as causal, by the name of their class."""
    model = build(kind)
    given = TrainingArguments(**arguments(tmp_path, label_smoothing_factor=0.1, eval_strategy="no"))
    trainer = Trainer(model, given, data_collator=collator(model), train_dataset=examples(model))
    batch = next(iter(trainer.get_eval_dataloader(examples(model, 2))))
    labels = batch["labels"]
    logits = model.eval()(**batch).logits
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_models_kind_can_be_looked_up_by_name(kind: type[PreTrainedModel]) -> None:
    """As evaluation harnesses do."""
    causal, with_encoder = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    names, others = (with_encoder, causal) if kind in WITH_ENCODER else (causal, with_encoder)
    assert names[CLASSES[kind].model_type] == kind.__name__
    assert CLASSES[kind].model_type not in others
