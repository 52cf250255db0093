"""What pydantic found wrong with settings, in words of whoever wrote them.

A line says the path, what was got, what is allowed there and the nearest match.
"""

import difflib
import json
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

_NEEDED = {
    "list_type": 'a list is needed, such as ["a", "b"]',
    "tuple_type": "a list is needed, such as [0.9, 0.999]",
    "dict_type": 'an object is needed, such as {"a": "b"}',
    "string_type": "text is needed",
}
"""What pydantic finds, in words of a command line."""
_MEANT_AS_JSON = ("list_type", "tuple_type", "dict_type", "model_type", "model_attributes_type")


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """A line for every wrong value: its path, what was got, what is allowed, a near match.

    A value that may be of several types is wrong for each: then the line has all their words.
    """
    told: dict[str, list[str]] = {}
    for problem in error.errors():
        where, what = _explain(model, dict(problem))
        line, words = (where, what) if where else (what, "")
        if words not in told.setdefault(line, []):
            told[line].append(words)
    return "\n".join(line + ", or ".join(words) for line, words in told.items())


def _explain(model: type[BaseModel], problem: dict[str, Any]) -> tuple[str, str]:
    """One of pydantic's findings: "path: what we got: " and what is allowed there."""
    location = [str(part) for part in problem["loc"]]
    path = ".".join(_without_tags(model, location))
    kind, got = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        owner = _model_at(model, location[:-1])
        return "", unknown(path, location[-1], list(owner.model_fields) if owner else [])
    if kind == "missing":
        return "", f"{path}: needed, and nothing was given"
    if kind == "union_tag_invalid":
        allowed = [tag.strip("'\" ") for tag in problem["ctx"]["expected_tags"].split(",")]
        return "", unknown(path, problem["ctx"]["tag"], allowed)
    start = f"{path}: got {got!r}: " if path else ""
    if kind in ("model_type", "model_attributes_type", "union_tag_not_found"):
        return start, _wants_settings(model, location, path) + broken_json(got)
    if kind == "literal_error" and isinstance(got, str):
        named = [part for part in location if not part.isdigit()]  # an item of a list is one too
        owner = _model_at(model, named[:-1])
        field = owner.model_fields.get(named[-1]) if owner else None
        if allowed := [str(value) for value in _literals(field.annotation if field else None)]:
            return "", unknown(path, got, allowed)
    message = _NEEDED.get(kind) or problem["msg"].removeprefix("Value error, ")
    if kind == "string_type" and isinstance(got, int | float):
        message = f"text is needed. For a shell: {path}='\"{got}\"'"
    return start, message + (broken_json(got) if kind in _MEANT_AS_JSON else "")


def _wants_settings(model: type[BaseModel], location: Sequence[str], path: str) -> str:
    """What may be given where settings of their own stand."""
    owner = _model_at(model, location[:-1])
    field = owner.model_fields.get(location[-1]) if owner else None
    variants = list(models_in(field.annotation)) if field else []
    if kinds := by_kind(variants):
        return f"a kind is needed, {path}=NAME with one of {', '.join(kinds)}"
    names = [name for variant in variants for name in variant.model_fields]
    return f"it has settings of its own: {', '.join(f'{path}.{name}' for name in names)}"


def _literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for option in get_args(annotation):
            yield from _literals(option)


def _model_at(model: type[BaseModel], location: Sequence[str]) -> type[BaseModel] | None:
    """The settings model at a path, where pydantic puts a union's kind into the path as well."""
    for part in location:
        if part in model.model_fields:
            variants = list(models_in(model.model_fields[part].annotation))
            if not variants:
                return None
            model = variants[0]
            alternatives = by_kind(variants)
        elif part in alternatives:
            model = alternatives[part]
    return model


def _without_tags(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """`("adapter", "lora", "rank")` is `adapter.rank` to a user; `("optim", "lr", "float")` is
    `optim.lr`, where the last part is a type of several."""
    path: list[str] = []
    alternatives: dict[str, type[BaseModel]] = {}
    for i, part in enumerate(location):
        if part in alternatives and part not in model.model_fields:
            model = alternatives[part]
            continue
        path.append(part)
        if part in model.model_fields:
            annotation = model.model_fields[part].annotation
            variants = list(models_in(annotation))
            if not variants:
                is_mapping = any(get_origin(a) is dict for a in (annotation, *get_args(annotation)))
                rest = location[i + 1 :] if is_mapping else ()
                return [*path, *rest]
            alternatives = by_kind(variants)
            model = variants[0]
    return path


def unknown(path: str, got: str, allowed: Sequence[str]) -> str:
    """A name that is not one of those allowed, and the nearest of them."""
    near = difflib.get_close_matches(got, allowed, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{path}: {got!r} is not known here.{hint} Allowed: {', '.join(allowed)}"


def broken_json(value: Any) -> str:
    """Why text that begins as JSON was taken as text; nothing where it does not."""
    if not isinstance(value, str) or not value.startswith(("{", "[")):
        return ""
    try:
        json.loads(value)
    except json.JSONDecodeError as error:
        return f". It begins as JSON and is none: {error}. The shell needs quotes around all of it"
    return ""


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings models that an annotation allows: `A`, `A | None`, `Annotated[A | B, ...]`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from models_in(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from models_in(option)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def by_kind(variants: Sequence[type[BaseModel]]) -> dict[str, type[BaseModel]]:
    return {v.model_fields["kind"].default: v for v in variants if "kind" in v.model_fields}
