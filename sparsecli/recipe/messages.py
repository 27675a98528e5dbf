"""Plain messages for Pydantic's errors: the key, the expected value, the value found, and a suggestion."""

from __future__ import annotations

import types
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from sparsecli.recipe.document import Path
from sparsecli.recipe.schema import Recipe
from sparsecli.spec.base import Spec

Field = tuple[Any, tuple[Any, ...]]
"""A type and the limits (Gt, Le, MinLen ...) on it."""

TAGS = ("kind", "source")
"""Fields that discriminate the members of a closed union."""


def explain(error: Any) -> tuple[Path, str]:
    """The key and the message of one entry of a recipe's `ValidationError.errors()`."""
    path, (annotation, limits), owner = _follow(error["loc"])
    context = error.get("ctx", {})
    match error["type"]:
        case "fault":
            steps = (int(step) if step.isdigit() else step for step in context["field"].split("."))
            return (*path, *steps), context["message"]
        case "limit":
            return path, context["message"]
        case "value_error":  # from our own validator, with its own message
            return path, str(context["error"])
        case "missing":
            return path, f"missing, expected {expected(annotation, limits)}"
        case "extra_forbidden":
            keys = owner.model_fields if owner else ()
            return path, f"unknown key{_kind_of(owner)}, {_instead(str(path[-1]), keys)}"
        case "union_tag_invalid" if context["discriminator"].endswith("()"):  # that of a model, see `_tag`
            choices, found = _tags(annotation), error["input"]["kind"]
            wanted = f"expected {_one_of(choices)}, or no kind for a model of text"
            return (*path, "kind"), f"{wanted}, got {found_as(found)}{_meant(found, choices)}"
        case "union_tag_not_found":
            tag = context["discriminator"].strip("'")
            return (*path, tag), f"missing, expected {_one_of(_tags(annotation))}"
        case "union_tag_invalid":
            tag = context["discriminator"].strip("'")
            choices = _tags(annotation)
            found = error["input"].get(tag) if isinstance(error["input"], dict) else error["input"]
            return (*path, tag), f"expected {_one_of(choices)}, got {found_as(found)}{_meant(found, choices)}"
    found = error["input"]
    choices = [str(choice) for choice in get_args(annotation)] if get_origin(annotation) is Literal else []
    return path, f"expected {expected(annotation, limits)}, got {found_as(found)}{_meant(found, choices)}"


def _follow(loc: Iterable[Any]) -> tuple[Path, Field, type[Spec] | None]:
    """Pydantic's location without its union tags, the field there, and the block that the last key is in."""
    path: Path = ()
    here: Field = (Recipe, ())
    owner: type[Spec] | None = None
    for part in loc:
        blocks = _blocks(here[0])
        if isinstance(part, int):
            here = next(
                (_field(*get_args(a)) for a in _alternatives(here[0]) if get_origin(a) is list), (Any, ())
            )
        elif len(blocks) > 1:
            here = next(((block, ()) for block in blocks if (_tag(block) or "text") == part), here)
            continue
        elif not blocks and len(_alternatives(here[0])) > 1:
            continue  # pydantic's own name for a number or a list
        else:
            owner = blocks[0] if blocks else None
            info = owner.model_fields.get(part) if owner else None
            here = (info.annotation, tuple(info.metadata)) if info else (Any, ())
        path = (*path, part)
    return path, here, owner


def _field(annotation: Any, limits: tuple[Any, ...] = ()) -> Field:
    """Unwrap `Annotated` and pydantic's `Field(...)` into a type and its limits."""
    while get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        for limit in extra:
            limits += tuple(limit.metadata) if isinstance(limit, FieldInfo) else (limit,)
    return annotation, limits


def _alternatives(annotation: Any) -> list[Any]:
    """Members of a union, `None` left out; or the type itself."""
    annotation, _ = _field(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return [inner for member in get_args(annotation) for inner in _alternatives(member)]
    return [] if annotation is type(None) else [annotation]


def _blocks(annotation: Any) -> list[type[Spec]]:
    return [a for a in _alternatives(annotation) if isinstance(a, type) and issubclass(a, Spec)]


def _tag(block: type[Spec]) -> str | None:
    """`sparse` for the block whose `kind` is always `sparse`; None for a block outside of unions."""
    for name in TAGS:
        field = block.model_fields.get(name)
        if field and get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            return str(get_args(field.annotation)[0])
    return None


def _tags(annotation: Any) -> list[str]:
    return [tag for tag in map(_tag, _blocks(annotation)) if tag]


def expected(annotation: Any, limits: tuple[Any, ...] = (), many: bool = False) -> str:
    """Plain words for a type: `a whole number above 0`, `one of adamw_torch, adafactor`."""
    annotation, limits = _field(annotation, limits)
    origin = get_origin(annotation)
    blocks = _blocks(annotation)
    if blocks:
        noun = "blocks" if many else "a block"
        if len(blocks) > 1:
            return f"{noun} with kind {_one_of(_tags(annotation))}".replace("kind", _tag_field(blocks[0]))
        required = [name for name, field in blocks[0].model_fields.items() if field.is_required()]
        return f"{noun} with {', '.join(required or blocks[0].model_fields)}"
    if origin in (Union, types.UnionType):
        return " or ".join(expected(member, limits, many) for member in _alternatives_annotated(annotation))
    if origin is Literal:
        return _one_of([str(choice) for choice in get_args(annotation)])
    if origin is list:
        least = next((limit.min_length for limit in limits if isinstance(limit, annotated_types.MinLen)), 0)
        return f"a {'non-empty ' if least else ''}list of {expected(get_args(annotation)[0], many=True)}"
    one, several = {
        int: ("a whole number", "whole numbers"),
        float: ("a number", "numbers"),
        bool: ("true or false", "true or false"),
        str: ("text", "texts"),
    }.get(annotation, ("another value", "other values"))
    return " ".join([several if many else one, *_bounds(limits)])


def _alternatives_annotated(annotation: Any) -> list[Any]:
    """Members of a union with their limits, `None` left out."""
    return [member for member in get_args(annotation) if member is not type(None)]


def _bounds(limits: tuple[Any, ...]) -> list[str]:
    words = []
    for limit in limits:
        match limit:
            case annotated_types.Gt(gt=bound):
                words.append(f"above {bound}")
            case annotated_types.Ge(ge=bound):
                words.append(f"of at least {bound}")
            case annotated_types.Lt(lt=bound):
                words.append(f"below {bound}")
            case annotated_types.Le(le=bound):
                words.append(f"of at most {bound}")
    return [" and ".join(words)] if words else []


def _tag_field(block: type[Spec]) -> str:
    return next(name for name in TAGS if name in block.model_fields)


def _one_of(choices: list[str]) -> str:
    return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"


def _kind_of(owner: type[Spec] | None) -> str:
    """Says which member of a union refused the key, because another member may have it."""
    tag = _tag(owner) if owner else None
    return f" for {_tag_field(owner)}: {tag}" if owner and tag else ""


def _instead(key: str, keys: Iterable[str]) -> str:
    near = get_close_matches(key, keys, n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(keys)}"


def _meant(found: Any, choices: list[str]) -> str:
    near = get_close_matches(found, choices, n=1) if isinstance(found, str) else []
    return f", did you mean {near[0]}?" if near else ""


def found_as(value: Any) -> str:
    """A value as a person wrote it, cut short."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case dict():
            return "a block"
        case list():
            return "a list" if value else "an empty list"
    shown = ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
