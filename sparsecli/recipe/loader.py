"""Loads a recipe file and its overrides into one frozen `Recipe`; one error lists all problems."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

import yaml
from pydantic import ValidationError

from sparsecli.console import RecipeError, system_reason
from sparsecli.recipe import document, messages
from sparsecli.recipe.document import Document, Place, Problem, read_document, spell
from sparsecli.recipe.schema import GenerateSpec, Recipe

MAX_BYTES = 256 * 1024
SUFFIXES = (".yaml", ".yml")
EXPLAINED, SHOWN = 500, 50
"""The most errors that are formatted, and the most problems that are listed; further ones are only counted."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where it came from."""

    recipe: Recipe
    name: str
    """Stem of the file; names the default run directory."""
    path: Path

    @property
    def output(self) -> Path:
        """The default run directory, which `--output` overrides."""
        return Path(self.recipe.output or f"runs/{self.name}")


def load(
    reference: str,
    overrides: Sequence[str] = (),
    options: Mapping[str, tuple[str, object]] = MappingProxyType({}),
) -> LoadedRecipe:
    """Read the recipe at a path, or the shipped one of that name, with `key.path=value` overrides on top.

    `options` of the command line override both. Each maps the option's name, with which its errors begin, to the key
    that it sets and its value; None: not given. Raises RecipeError with every problem, one line each.
    """
    path = _find(reference)
    text = _read(path)
    recipe = parse(text, str(path), overrides, options)
    return LoadedRecipe(recipe=recipe, name=path.stem, path=path)


def parse(
    text: str,
    name: str,
    overrides: Sequence[str] = (),
    options: Mapping[str, tuple[str, object]] = MappingProxyType({}),
) -> Recipe:
    """Parse the recipe in `text`; errors begin with `name`. See `load`. Raises RecipeError."""
    read = read_document(text, name)
    if not read.problems:
        if read.data is None:
            raise RecipeError(f"{name}: is empty; a recipe has blocks such as model, data and train")
        if not isinstance(read.data, dict):
            found = messages.found_as(read.data)
            raise RecipeError(
                f"{read.place(()).label}: expected blocks such as model, data and train, got {found}"
            )
        for number, override in enumerate(overrides, start=1):
            _apply(read, override, number)
        for number, (option, (key, value)) in enumerate(options.items(), start=len(overrides) + 1):
            if value is not None:
                _put(read, key.split("."), Document(value, {(): Place(number, 0, 0, option)}))
    more = 0
    try:
        recipe = Recipe.model_validate(read.data) if not read.problems else None
    except ValidationError as error:
        errors = error.errors(include_url=False)
        more = max(0, len(errors) - EXPLAINED)
        explained = [messages.explain(entry) for entry in errors[:EXPLAINED]]
        for where, message in explained:
            # An error within a list says more than the error that the list is not a number.
            if not any(where == other[: len(where)] and where != other for other, _ in explained):
                read.problems.append(Problem(read.place(where), where, message))
    if read.problems or recipe is None:
        ordered = sorted(read.problems, key=lambda problem: problem.place)
        lines = list(dict.fromkeys(map(str, ordered)))
        more += len(lines) - SHOWN
        raise RecipeError("\n".join(lines[:SHOWN] + [f"{name}: {more} more problems"] * (more > 0)))
    return recipe


def dump(recipe: Recipe, without: Collection[str] = ()) -> str:
    """The recipe as YAML that loads to the same recipe, with all defaults; or `without` some of its blocks."""
    values = recipe.model_dump(mode="json", exclude_none=True, exclude=set(without))
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 *or* this loader would read as something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML writes Unicode's line breaks as they are, and reads them back as a space.
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _tag, _pattern in document.SCALARS:
    _Dumper.add_implicit_resolver(_tag, _pattern, None)


def with_options(options: GenerateSpec, given: Mapping[str, object]) -> GenerateSpec:
    """`options` with the command line's (by field name) on top. Raises RecipeError that names the option."""
    try:
        return GenerateSpec.model_validate({**options.model_dump(), **given})
    except ValidationError as error:
        explained = (
            messages.explain({**entry, "loc": ("generate", *entry["loc"])}) for entry in error.errors()
        )
        lines = [f"--{str(path[1]).replace('_', '-')}: {message}" for path, message in explained]
        raise RecipeError("\n".join(lines)) from None


def require(loaded: LoadedRecipe, *blocks: str) -> None:
    """Raise RecipeError unless the recipe has these top-level blocks."""
    missing = [f"`{block}:`" for block in blocks if getattr(loaded.recipe, block) is None]
    if missing:
        *others, last = missing
        needed = f"{', '.join(others)} and {last} blocks" if others else f"a {last} block"
        raise RecipeError(f"{loaded.path.name}: this command needs {needed}")


def check_unread(overrides: Sequence[str], command: str, blocks: Collection[str]) -> None:
    """Raise RecipeError for an override in a block that `command` does not read, because it loads a trained model."""
    for key in (override.partition("=")[0] for override in overrides):
        if (block := key.partition(".")[0]) in blocks:
            raise RecipeError(
                f"{key}: has no effect: {command} does not read `{block}:` and uses the model as it was trained; "
                f"to train the model further with another recipe, use `sparsecli train` with train.init_from"
            )


def complete(loaded: LoadedRecipe, blocks: Mapping[str, object]) -> Recipe:
    """The recipe with these top-level blocks in place of its own. Raises RecipeError where they do not fit the rest."""
    try:
        return Recipe(**{**dict(loaded.recipe), **blocks})
    except ValidationError as error:
        fault = error.errors()[0]["ctx"]
        raise RecipeError(f"{loaded.path.name}: {fault['field']}: {fault['message']}") from None


@cache
def shipped() -> dict[str, Path]:
    """The recipes that come with sparsecli, by name."""
    folder = Path(str(files("sparsecli.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _find(reference: str) -> Path:
    path = Path(reference)
    name = messages.found_as(reference)
    known = shipped()
    if path.suffix not in SUFFIXES and path.name == reference and reference in known:
        return known[reference]
    try:
        if reference and path.is_dir():
            raise RecipeError(f"{name}: is a folder; name a recipe file in it")
        if reference and path.exists():
            return path
        beside = [str(p) for p in path.parent.glob("*") if p.suffix in SUFFIXES]
    except (OSError, ValueError) as error:
        raise RecipeError(f"{name}: cannot be read: {_reason(error)}") from None
    near = get_close_matches(path.stem, known, n=1) + get_close_matches(reference, beside, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else f"shipped recipes: {', '.join(known)}"
    raise RecipeError(f"{name}: no such recipe file or shipped recipe; {hint}")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {_reason(error)}") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path}: is larger than {MAX_BYTES // 1024} KiB; is it a recipe?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise RecipeError(f"{path}:{line}:{column}: not UTF-8 text") from None


def _reason(error: OSError | ValueError) -> str:
    return (system_reason(error) or str(error)).lower()


def _apply(read: Document, override: str, number: int) -> None:
    """Put one `key.path=value` into the data."""
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        place = Place(number, 0, 0, f"override #{number}")
        read.problems.append(
            Problem(place, (), f"expected key.path=value, got {messages.found_as(override)}")
        )
        return
    given = read_document(value, key, override=number)
    if given.problems:
        read.problems += given.problems
        return
    _put(read, parts, given)


def _put(read: Document, parts: Sequence[str], given: Document) -> None:
    """Put a value into the data at the path `parts`, and replace the places there by those of the value."""
    place = given.place(())
    train = read.data.get("train")
    start = train.get("init_from") if isinstance(train, dict) else None
    if parts[0] == "model" and parts[1:] and read.data.get("model") is None and start:
        message = f"the recipe has no model: block; the architecture is that of train.init_from, {start}"
        read.problems.append(Problem(place, (), message))
        return

    path: document.Path = ()
    here = read.data
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        step: str | int = part
        if isinstance(here, list):
            if not (part.isascii() and part.isdigit() and len(part) <= 6 and int(part) < len(here)):
                expected = f"expected a position from 0 to {len(here) - 1}"
                read.problems.append(Problem(place, (), f"{spell(path)} is a list; {expected}, got {part!a}"))
                return
            step = int(part)
        elif not isinstance(here, dict):
            read.problems.append(
                Problem(place, (), f"{spell(path)} is {messages.found_as(here)}, not a block")
            )
            return
        path = (*path, step)
        if last:
            here[step] = given.data
        elif isinstance(here, dict) and here.get(part) is None:
            here[part] = {}
            read.places[path] = place
        here = here[step]

    for known in [known for known in read.places if known[: len(path)] == path]:
        del read.places[known]
    for inner, inner_place in given.places.items():
        read.places[(*path, *inner)] = inner_place
