"""What the documentation makes from the code; `make docs` builds the whole site, strictly."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsecli.recipe.commands import described_schema

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs" / "site"))

import command_reference  # noqa: E402
import pictures  # noqa: E402
import python_reference  # noqa: E402
import recipe_reference  # noqa: E402


def test_every_key_of_a_recipe_is_described() -> None:
    text, schema = recipe_reference.markdown(), described_schema()
    for block in (schema, *schema["$defs"].values()):
        for key, value in block.get("properties", {}).items():
            described = " ".join(value.get("description", "").split()).replace("|", "\\|")
            assert described or "const" in value, key
            assert re.search(rf"^\| `{key}` \|.*\| {re.escape(described)} \|$", text, re.MULTILINE), key
    assert "| `max_steps` | whole number above 0 | required |" in text


def test_links_of_the_recipe_reference_have_a_target() -> None:
    text = recipe_reference.markdown()
    anchors = re.findall(r"^## .* \{#([\w-]+)\}$", text, re.MULTILINE)
    assert len(set(anchors)) == len(anchors)
    assert set(re.findall(r"\(#([\w-]+)\)", text)) <= set(anchors)


def test_every_option_is_described() -> None:
    text = command_reference.markdown()
    assert {"train", "bench", "recipes schema", "sparsify-convert"} <= command_reference.commands().keys()
    for name, command in command_reference.commands().items():
        assert f"\n## {name}\n" in text
        for parameter in command.params:
            assert parameter.help, (name, parameter.name)
    assert "| `--format` | `table`, `json`, `csv`, `markdown` | `table` |" in text


@pytest.mark.parametrize("name", [name for names in python_reference.SECTIONS.values() for name in names])
def test_objects_of_the_python_reference_exist(name: str) -> None:
    parts = name.split(".")
    file = next(
        path
        for count in range(len(parts), 0, -1)
        if (path := ROOT.joinpath(*parts[:count]).with_suffix(".py")).exists()
    )
    left = parts[len(file.relative_to(ROOT).parts) :]
    assert not left or re.search(rf"^(class|def) {left[0]}\b", file.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_those_that_the_script_draws(name: str) -> None:
    path = pictures.FOLDER / f"{name}.svg"
    assert path.read_text(encoding="utf-8") == str(pictures.PICTURES[name]())
    assert "prefers-color-scheme: dark" in path.read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation() -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)  # tags of MkDocs
    navigation = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]

    def pages(entries: Any) -> set[str]:
        if isinstance(entries, str):
            return {entries}
        values = entries.values() if isinstance(entries, dict) else entries
        return set().union(*map(pages, values))

    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= pages(navigation)


def test_links_between_pages_have_a_target() -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    import hooks

    files = {path.name: path for path in (ROOT / "docs").glob("*.md")}
    files |= {page: ROOT / name for page, name in hooks.FOREIGN.items()}
    for page, path in files.items():
        links = re.findall(r"\]\(([^):#]+\.md)[)#]", hooks.moved(path.read_text(encoding="utf-8")))
        assert set(links) <= files.keys() | hooks.GENERATED.keys(), page
