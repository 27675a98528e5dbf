"""Model cards: the README.md of a model folder, which hubs show."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
LIMITS = (
    "It repeats what its training text holds, also what is wrong or offensive in it.",
    "Its figures are for the data and the machine that are named here; measure on your own.",
)

AUTO_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "summarization": "AutoModelForSeq2SeqLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
}
"""The classes of transformers that load a model, by its task."""


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Attributes:
        summary: one or two sentences.
        facts: names and values of a table: data, parameters, losses.
        sections: titles and Markdown of further parts.
        recipe: YAML of the recipe that made the model; None: an import.
        license: the source's, by its name on the hub; None: unknown, or the model's own makers decide.
        base_model: the model that it was made of.
        task: one of `AUTO_CLASSES`, by the hub's name.
    """

    summary: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[tuple[str, str]] = field(default=())
    recipe: str | None = None
    license: str | None = None
    base_model: str | None = None
    task: str = "text-generation"

    def markdown(self, name: str) -> str:
        """The whole card, with the front matter that hubs read. Its commands are for the model's folder."""
        images = self.task == "image-classification"
        front: dict[str, Any] = {"library_name": "sparsecli", "tags": ["sparsecli"]}
        if self.license:
            front["license"] = self.license
        if self.base_model:
            front["base_model"] = self.base_model
        front["pipeline_tag"] = self.task
        where = "In this folder"
        command = 'generate --model . --prompt "..."'
        if images:  # which are named in the recipe
            where += ", with the recipe below as recipe.yaml"
            command = "evaluate recipe.yaml --model ."
        lines = [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            f"# {name}",
            "",
            self.summary,
            "",
        ]
        lines += [f"{where}:", "", "```", f"sparsecli {command}", "```", ""]
        network = AUTO_CLASSES[self.task]
        reader = "AutoImageProcessor" if images else "AutoTokenizer"
        lines += [
            "Or in Python, with sparsecli installed:",
            "",
            "```python",
            f"from transformers import {', '.join(sorted((network, reader)))}",
            f'model = {network}.from_pretrained(".", trust_remote_code=True)',
            f'{"processor" if images else "tokenizer"} = {reader}.from_pretrained(".")',
            "```",
            "",
        ]
        lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in self.facts), ""]
        for title, text in self.sections:
            lines += [f"## {title}", "", text.strip(), ""]
        if self.recipe:
            lines += ["## Recipe", "", "```yaml", self.recipe.strip(), "```", ""]
        known = self.license or "not known; ask the makers of what it was made of"
        lines += [
            "## Limits",
            "",
            *(f"- {limit}" for limit in LIMITS[1 if images else 0 :]),
            f"- License of the source: {known}.",
            "",
        ]
        return "\n".join(lines)

    def write(self, folder: Path, name: str) -> None:
        """Write the card into a model folder, complete or not at all."""
        beside = folder / f"{CARD}.tmp"
        beside.write_text(self.markdown(name), encoding="utf-8")
        os.replace(beside, folder / CARD)


def public(source: object) -> str:
    """A model's or a file's name for a card: of a path from the root only the last part, which others understand."""
    path = Path(str(source))
    return path.name if path.is_absolute() else str(source)


def on_hub(source: object) -> bool:
    """Whether `source` is a name on the hub rather than a path of this machine; cards link only those."""
    return len(str(source).split("/")) == 2 and not Path(str(source)).exists()


def license_of(folder: Path) -> str | None:
    """The license that the card in `folder` names; None without one."""
    path = folder / CARD
    if not path.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        fields = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError:
        return None
    found = fields.get("license") if isinstance(fields, dict) else None
    return found if isinstance(found, str) else None
