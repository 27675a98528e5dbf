"""Generated targets for held-out sources of a model with an encoder, and their ROUGE or exact matches."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast

from sparsecli.data.examples import Examples
from sparsecli.spec.vocabulary import END, IGNORED
from sparsecli.train.run_directory import replace_text

SAMPLES = "samples.jsonl"
ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_lsum": "rougeLsum"}
"""Our names of the figures, with those of rouge-score."""


@dataclass(frozen=True)
class Sample:
    """A held-out pair and the generated target, as text."""

    source: str
    target: str
    written: str


class Samples:
    """The first held-out pairs. Every evaluation generates their targets.

    Args:
        judge: `rouge`, or `exact` for the share of targets with every token right.
        longest: most tokens to generate.
        folder: folder of `samples.jsonl`, which every evaluation replaces; None: it is not written.
    """

    def __init__(
        self,
        examples: Examples,
        tokenizer: PreTrainedTokenizerFast,
        count: int,
        *,
        judge: Literal["rouge", "exact"],
        longest: int,
        batch_size: int,
        folder: Path | None = None,
    ) -> None:
        self.examples, self.tokenizer, self.judge, self.longest = examples, tokenizer, judge, longest
        self.count, self.batch_size, self.folder = min(count, len(examples)), batch_size, folder

    def figures(
        self, model: PreTrainedModel, stopped: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """`exact_match` from 0 to 1, or `rouge_1`, `rouge_2` and `rouge_lsum` from 0 to 100.

        No random number is drawn. Returns None if `stopped` becomes true before the end.
        """
        was_training = model.training
        model.eval()
        samples: list[Sample] = []
        exact = 0
        try:
            for start in range(0, self.count, self.batch_size):
                if stopped():
                    return None
                indices = range(start, min(start + self.batch_size, self.count))
                batch = self.examples.collate([self.examples[index] for index in indices])
                written = write_greedily(model, batch["input_ids"], batch["attention_mask"], self.longest)
                for source, target, ids in zip(batch["input_ids"], batch["labels"], written, strict=True):
                    wanted = target[target != IGNORED]
                    exact += torch.equal(ids, wanted)
                    samples.append(Sample(*(self._text(tokens) for tokens in (source, wanted, ids))))
        finally:
            model.train(was_training)
        if self.folder:
            lines = (json.dumps(asdict(sample), ensure_ascii=False) for sample in samples)
            replace_text(self.folder / SAMPLES, "".join(f"{line}\n" for line in lines))
        if self.judge == "exact":
            return {"exact_match": exact / len(samples)}
        return rouge([sample.written for sample in samples], [sample.target for sample in samples])

    def lead(self) -> dict[str, float]:
        """ROUGE of the first tokens of each source, as many as targets have on average: the baseline of a model."""
        pairs = [self.examples[index] for index in range(self.count)]
        length = round(sum(len(pair["labels"]) - 1 for pair in pairs) / len(pairs))
        beginnings = [self._text(pair["input_ids"][:length]) for pair in pairs]
        return rouge(beginnings, [self._text(pair["labels"]) for pair in pairs])

    def _text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@torch.no_grad()
def write_greedily(model: PreTrainedModel, sources: Tensor, mask: Tensor, longest: int) -> list[Tensor]:
    """Greedy decoding for sources and mask (B, L1): token ids, including the end token.

    The `repetition_penalty` of the model's generation config makes tokens that were already written less likely
    (Keskar et al. 2019, section 4.1).
    """
    assert isinstance(model, GenerationMixin)
    written = model.generate(
        input_ids=sources.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=longest,
        do_sample=False,
        num_beams=1,
    )
    return [_until_end(ids[1:]) for ids in written.cpu()]  # after the start token of every target


def _until_end(ids: Tensor) -> Tensor:
    ends = (ids == END).nonzero()
    return ids[: ends[0, 0] + 1] if len(ends) else ids


def rouge(written: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-Lsum over pairs of texts, from 0 to 100, with stemming.

    ROUGE-Lsum compares sentence by sentence.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE.values()), use_stemmer=True)
    scores = [
        scorer.score(sentences(target), sentences(text))
        for text, target in zip(written, targets, strict=True)
    ]
    return {
        name: 100 * sum(score[theirs].fmeasure for score in scores) / max(len(scores), 1)
        for name, theirs in ROUGE.items()
    }


def sentences(text: str) -> str:
    """`text` with one sentence per line, as ROUGE-Lsum expects."""
    return re.sub(r"(?<=[.!?])\s+", "\n", text)
