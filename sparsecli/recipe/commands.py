"""`sparsecli recipes`: list, show, copy and check recipes, and describe them to editors."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecli import console
from sparsecli.console import Failure, RecipeError
from sparsecli.model.outputs import check_new
from sparsecli.recipe.budget import parse_share
from sparsecli.recipe.loader import load, shipped
from sparsecli.recipe.schema import Recipe, StudySpec
from sparsecli.spec.base import Spec

if TYPE_CHECKING:
    from sparsecli.model.sizes import Sizes


def list_shipped(json: bool = False) -> None:
    """Write names and descriptions to stdout."""
    _show(["recipe", "description"], [(name, load(name).recipe.description) for name in shipped()], json)


def _show(columns: Sequence[str], rows: Sequence[Sequence[object]], json: bool) -> None:
    """A table, or a list of objects with its columns as keys."""
    if json:
        keys = [column.replace(" ", "_") for column in columns]
        console.json_out([dict(zip(keys, row, strict=True)) for row in rows])
    else:
        console.print_table(columns, rows)


def show(name: str) -> None:
    """Write the text of a recipe to stdout. Raises RecipeError for an unknown name or an invalid recipe."""
    console.out(load(name).path.read_text(encoding="utf-8"), end="")


def copy(name: str, destination: Path | None) -> None:
    """Copy a recipe to a file or a folder, by default the working directory.

    Raises Failure if the file exists or cannot be written; nothing is left behind.
    """
    source = load(name).path
    target = destination or Path()
    if target.is_dir():
        target = target / source.name
    check_new(target, "DESTINATION")
    if not target.parent.exists():
        raise Failure(f"{target}: the folder {target.parent} does not exist")
    file = target.open("x", encoding="utf-8")
    try:
        with file:
            file.write(source.read_text(encoding="utf-8"))
    except OSError as error:  # a full disk
        target.unlink()
        raise Failure(f"{target}: cannot be written: {console.system_reason(error)}") from error
    console.say(f"wrote {target}")


def check(references: Sequence[str], json: bool = False) -> None:
    """Validate recipes and print their sizes. Raises RecipeError with the problems of all of them."""
    failures: list[str] = []
    rows: list[tuple[str, str, int | None, int | None]] = []
    for reference in references:
        try:
            loaded = load(reference)
            found = sizes(loaded.recipe)
        except RecipeError as error:
            failures.append(error.message)
            continue
        if not found:
            train = loaded.recipe.train
            rows.append(
                (loaded.name, "that of train.init_from" if train and train.init_from else "", None, None)
            )
            continue
        from sparsecli.model.sizes import TOLERANCE, disagreement  # torch: not for a recipe with errors

        rows += [(loaded.name, label, size.total, size.active) for label, size in found]
        share = disagreement([size for _, size in found])
        bench, study = loaded.recipe.bench, loaded.recipe.study
        if study:
            try:
                check_sizes(study, dict(found), loaded.path)
            except RecipeError as error:
                failures.append(error.message)
        elif bench and bench.equal_sizes and share > TOLERANCE:
            failures.append(
                f"{loaded.path}: bench.variants: numbers of parameters differ by {100 * share:.1f} %, "
                f"expected at most {100 * TOLERANCE:.0f} %; change d_ff"
            )
    if rows:
        shown = (
            rows
            if json
            else [
                [f"{cell:,}" if isinstance(cell, int) else "" if cell is None else cell for cell in row]
                for row in rows
            ]
        )
        _show(["recipe", "variant", "parameters", "read per token"], shown, json)
    if failures:
        raise RecipeError("\n".join(failures))


def sizes(recipe: Recipe) -> list[tuple[str, Sizes]]:
    """Names and sizes of the variants of a study or a bench, else the size of the model, without a name; empty without
    a model."""
    if recipe.model is None:
        return []
    from sparsecli.model.sizes import count_parameters  # torch

    specs = [("", recipe.model)]
    if recipe.study:
        specs = list(recipe.study.models(recipe.model).items())
    elif recipe.bench and recipe.bench.variants:
        specs = [(variant.name, variant.model.apply(recipe.model)) for variant in recipe.bench.variants]
    return [(label, count_parameters(spec)) for label, spec in specs]


def check_sizes(study: StudySpec, sizes: Mapping[str, Sizes], file: Path) -> None:
    """Raise RecipeError, naming two variants, if numbers of parameters differ by more than `study` allows.

    Variants that start from another are not asked: pruning makes them smaller.
    """
    from sparsecli.model.sizes import unequal  # torch

    compared = {each.name: sizes[each.name] for each in study.variants if each.init_from is None}
    if study.equal_parameters and (found := unequal(compared, parse_share(study.equal_parameters))):
        raise RecipeError(
            f"{file}: study.equal_parameters: {found}; change d_ff, or set study.equal_parameters=null"
        )


def schema() -> None:
    """Write the JSON schema of a recipe to stdout; editors complete and check recipes with it."""
    console.json_out({"$schema": "https://json-schema.org/draft/2020-12/schema", **described_schema()})


def described_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, with the docstring of each field as its description."""
    document = Recipe.model_json_schema()
    described = {block.__name__: _docstrings(block) for block in _subclasses(Spec)}
    for name, block in {Recipe.__name__: document, **document["$defs"]}.items():
        for key, value in block.get("properties", {}).items():
            if key in described.get(name, {}):
                value["description"] = described[name][key]
    return document


def _docstrings(block: type[Spec]) -> dict[str, str]:
    """The docstring of each field. Pydantic can read them too, but at every start of the program."""
    found: dict[str, str] = {}
    for owner in reversed(block.__mro__[: block.__mro__.index(Spec)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = inspect.cleandoc(ast.literal_eval(text.value))
    return found


def _subclasses(block: type[Spec]) -> Iterator[type[Spec]]:
    for subclass in block.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
