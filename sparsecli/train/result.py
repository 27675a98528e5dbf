"""The final figures of a run, and how they are printed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from textwrap import shorten

from pydantic import TypeAdapter, ValidationError

from sparsecli.console import Failure, print_table
from sparsecli.model.card import Card, on_hub, public
from sparsecli.model.sizes import count_parameters
from sparsecli.recipe.loader import dump
from sparsecli.recipe.schema import Recipe
from sparsecli.train import run_directory
from sparsecli.train.samples import ROUGE, SAMPLES

SHOWN, WIDTH = 5, 60
"""Number of samples that are printed after training, and the characters of each text."""


@dataclass(frozen=True)
class Result:
    """The final figures of a run."""

    steps: int
    held_out_loss: float
    bits_per_byte: float | None
    """None for images."""
    tokens_per_second: float | None
    """Training speed of the process that finished the run; None for images."""
    images_per_second: float | None = None
    """The same for images."""
    accuracy: float | None = None
    """Share of held-out images whose likeliest class is theirs."""
    tuning_loss: float | None = None
    never_chosen: float | None = None
    balance: float | None = None
    kl_to_teacher: float | None = None
    exact_match: float | None = None
    """Share of the sampled sources whose target was generated exactly."""
    rouge: dict[str, float] | None = None
    """`rouge_1`, `rouge_2` and `rouge_lsum` of the generated targets, 0 to 100."""
    lead_rouge: dict[str, float] | None = None
    """The same scores for the first tokens of the sources."""

    @classmethod
    def of(
        cls,
        row: Mapping[str, float],
        steps: int,
        speed: float | None,
        lead_rouge: dict[str, float] | None,
    ) -> Result:
        """The figures of the last evaluation, a `row` of the metrics; `speed` in tokens or images a second."""
        optional = ("accuracy", "tuning_loss", "never_chosen", "balance", "kl_to_teacher", "exact_match")
        images = "accuracy" in row
        return cls(
            steps=steps,
            held_out_loss=row["held_out_loss"],
            bits_per_byte=row.get("bits_per_byte"),
            tokens_per_second=None if images else speed,
            images_per_second=speed if images else None,
            **{name: row.get(name) for name in optional},
            rouge={name: row[name] for name in ROUGE if name in row} or None,
            lead_rouge=lead_rouge,
        )


def known_result(output: Path) -> Result | None:
    """The figures of a finished run. Raises `Failure` if they are damaged."""
    figures = run_directory.read_facts(output).get("result")
    try:
        result = TypeAdapter(Result).validate_python(figures) if figures else None
        return result if result is None or result.steps >= 0 else None
    except ValidationError:
        place = output / run_directory.FACTS
        raise Failure(
            f"{place}: does not hold the result of a run; delete it to continue without it"
        ) from None


def card_of(result: Result, recipe: Recipe) -> Card:
    """The card of the run's model."""
    assert recipe.model
    assert recipe.data
    assert recipe.train
    sizes = count_parameters(recipe.model)
    images = result.accuracy is not None
    loss = f"{result.held_out_loss:.4f} nats/{'image' if images else 'token'}"
    loss += "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
    facts = [
        ("parameters", f"{sizes.total:,}; a {'patch' if images else 'token'} reads {sizes.active:,} of them"),
        (f"training {'images' if images else 'text'}", _text_words(recipe)),
        ("steps", f"{result.steps:,}"),
        ("held-out loss", loss),
    ]
    if result.accuracy is not None:
        facts.append(("held-out accuracy", f"{result.accuracy:.2%}"))
    if result.exact_match is not None:
        facts.append(("targets generated exactly", f"{result.exact_match:.1%}"))
    if result.rouge:
        facts.append(("ROUGE", ", ".join(f"{name} {value:.1f}" for name, value in result.rouge.items())))
    taught = recipe.train.distillation.teacher if recipe.train.distillation else None
    base = recipe.train.init_from or taught
    summary = f"A {'vision Transformer' if images else 'language model'} that sparsecli trained"
    summary += f", beginning with {public(recipe.train.init_from)}" if recipe.train.init_from else ""
    summary += f", with {public(taught)} as its teacher" if taught else ""
    return Card(
        f"{summary}.",
        facts,
        recipe=dump(recipe, {"generate"} if images else ()),
        base_model=str(base) if base and on_hub(base) else None,
        task=_task(result, recipe),
    )


def _task(result: Result, recipe: Recipe) -> str:
    """The model's task, by the hub's name."""
    if result.accuracy is not None:
        return "image-classification"
    if not getattr(recipe.model, "encoder", None):
        return "text-generation"
    return "summarization" if result.rouge else "text2text-generation"


def _text_words(recipe: Recipe) -> str:
    """Where the training text or images come from."""
    data = recipe.data
    paths = getattr(data, "paths", None)
    named = getattr(data, "dataset", None) or (", ".join(map(public, paths)) if paths else None)
    folder = getattr(data, "path", None)
    named = named or (public(folder) if folder else None)
    source = str(getattr(data, "source", "text"))
    return f"{source}: {named}" if named else source


def print_result(result: Result, recipe: Recipe, output: Path) -> None:
    """Print the figures that exist and apply to this model and data."""
    copies = recipe.data is not None and recipe.data.copies  # symbols or random tokens, not text
    mixed = recipe.model is not None and recipe.model.feed_forward.kind == "mixture"
    figures = [
        (
            f"held-out loss (nats/{'token' if result.accuracy is None else 'image'})",
            result.held_out_loss,
            ".4f",
        ),
        ("held-out accuracy", result.accuracy, ".2%"),
        ("held-out bits per byte", None if copies else result.bits_per_byte, ".4f"),
        ("training tokens per second", result.tokens_per_second or None, ",.0f"),
        ("training images per second", result.images_per_second or None, ",.0f"),
        ("experts never chosen" if mixed else "units never chosen", result.never_chosen, ".2%"),
        ("balance of choices", result.balance, ".4f"),
        ("KL to the teacher", result.kl_to_teacher, ".4f"),
        ("copied exactly", result.exact_match, ".2%"),
    ]
    rows = [(label, format(value, digits)) for label, value, digits in figures if value is not None]
    for label, scores in (("ROUGE-1, 2, Lsum", result.rouge), ("ROUGE of the lead", result.lead_rouge)):
        if scores:
            rows.append((label, ", ".join(f"{value:.1f}" for value in scores.values())))
    print_table(["result", ""], [*rows, ("model", str(output / "model"))])


def print_samples(output: Path) -> None:
    """Print the first sources, their targets, and the targets that the model generated.

    Raises `Failure` if their file is missing or damaged.
    """
    rows = []
    try:
        with (
            output / SAMPLES
        ).open() as lines:  # texts may contain characters at which `splitlines` would split
            for sample in map(json.loads, islice(lines, SHOWN)):
                source = sample["source"].strip().partition("\n")[0]
                texts = (source, sample["target"], sample["written"])
                rows.append([shorten(text, WIDTH) for text in texts])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Failure(f"{output / SAMPLES}: does not hold the samples of a run") from None
    print_table(["source", "target", "written"], rows)
