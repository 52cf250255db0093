"""Pydantic's validation errors as messages for the user who wrote the settings.

Each line has the path, the value given, what is allowed there and the closest match.
"""

import difflib
import json
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from qlora_lite.foundation.peer_names import own_name

_NEEDED = {
    "list_type": 'a list is needed, such as ["a", "b"]',
    "tuple_type": "a list is needed, such as [0.9, 0.999]",
    "dict_type": 'an object is needed, such as {"a": "b"}',
    "string_type": "text is needed",
}
"""Messages for some of pydantic's error types."""
_NEEDS_JSON = ("list_type", "tuple_type", "dict_type", "model_type", "model_attributes_type")


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for every wrong value: its path, the value, what is allowed, the closest match.

    For a union of plain types pydantic reports one error per type; they are joined with "or".
    """
    lines: dict[str, list[str]] = {}
    for problem in error.errors():
        start, needed = _explain(model, dict(problem))
        line, alternative = (start, needed) if start else (needed, "")
        if alternative not in lines.setdefault(line, []):
            lines[line].append(alternative)
    return "\n".join(start + ", or ".join(alternatives) for start, alternatives in lines.items())


def _explain(model: type[BaseModel], problem: dict[str, Any]) -> tuple[str, str]:
    """One of pydantic's errors: "path: got value: " (or "") and what is needed there."""
    location = [str(part) for part in problem["loc"]]
    path = ".".join(_user_path(model, location))
    kind, got = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        owner = _model_at(model, location[:-1])
        return "", unknown_name(path, location[-1], list(owner.model_fields) if owner else [])
    if kind == "missing":
        return "", f"{path}: a value is needed"
    if kind == "union_tag_invalid":
        allowed = [tag.strip("'\" ") for tag in problem["ctx"]["expected_tags"].split(",")]
        return "", unknown_name(path, problem["ctx"]["tag"], allowed)
    start = f"{path}: got {_shown(got)}: " if path else ""
    if kind in ("model_type", "model_attributes_type", "union_tag_not_found"):
        return start, _needs_settings(model, location, path) + json_error(got)
    if kind == "literal_error" and isinstance(got, str):
        named = [part for part in location if not part.isdigit()]  # skip the index of a list item
        owner = _model_at(model, named[:-1])
        field = owner.model_fields.get(named[-1]) if owner else None
        if allowed := [str(value) for value in _literals(field.annotation if field else None)]:
            return "", unknown_name(path, got, allowed)
    message = _NEEDED.get(kind) or problem["msg"].removeprefix("Value error, ")
    if kind == "string_type" and isinstance(got, int | float):
        message = f"text is needed. In a shell, type {path}='\"{got}\"'"
    return start, message + (json_error(got) if kind in _NEEDS_JSON else "")


def _shown(value: Any) -> str:
    """A value for a message. Python does not print integers of thousands of digits."""
    try:
        return repr(value)
    except ValueError:
        return "a huge number"


def _needs_settings(model: type[BaseModel], location: Sequence[str], path: str) -> str:
    """The message for a field that holds a settings model: its kinds, or its own fields."""
    owner = _model_at(model, location[:-1])
    field = owner.model_fields.get(location[-1]) if owner else None
    variants = list(settings_models(field.annotation)) if field else []
    if kinds := by_kind(variants):
        return f"a kind is needed, {path}=NAME with one of {', '.join(kinds)}"
    names = [name for variant in variants for name in variant.model_fields]
    return f"set its fields instead: {', '.join(f'{path}.{name}' for name in names)}"


def _literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for option in get_args(annotation):
            yield from _literals(option)


def _model_at(model: type[BaseModel], location: Sequence[str]) -> type[BaseModel] | None:
    """The settings model at a path of pydantic's, which contains the kinds of unions as well."""
    for part in location:
        if part in model.model_fields:
            variants = list(settings_models(model.model_fields[part].annotation))
            if not variants:
                return None
            model = variants[0]
            alternatives = by_kind(variants)
        elif part in alternatives:
            model = alternatives[part]
    return model


def _user_path(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Drop the parts that pydantic adds to a path: a union's kind, and the type that was tried.

    `("adapter", "lora", "rank")` is `adapter.rank`, and `("optim", "lr", "float")` is `optim.lr`.
    """
    path: list[str] = []
    alternatives: dict[str, type[BaseModel]] = {}
    for i, part in enumerate(location):
        if part in alternatives and part not in model.model_fields:
            model = alternatives[part]
            continue
        path.append(part)
        if part in model.model_fields:
            annotation = model.model_fields[part].annotation
            variants = list(settings_models(annotation))
            if not variants:
                is_mapping = any(get_origin(a) is dict for a in (annotation, *get_args(annotation)))
                rest = location[i + 1 :] if is_mapping else ()
                return [*path, *rest]
            alternatives = by_kind(variants)
            model = variants[0]
    return path


def unknown_name(path: str, got: str, allowed: Sequence[str]) -> str:
    """The message for a name that is not allowed: the allowed ones and the closest match."""
    near = difflib.get_close_matches(got, allowed, n=1, cutoff=0.6)
    own = own_name(got) if path.rpartition(".")[2] == got else None
    hint = f" Did you mean {own or near[0]!r}?" if own or near else ""
    return f"{path}: {got!r} is not known here.{hint} Allowed: {', '.join(allowed)}"


def json_error(value: Any) -> str:
    """Why text that starts like JSON is not valid JSON; empty for any other value."""
    if not isinstance(value, str) or not value.startswith(("{", "[")):
        return ""
    try:
        json.loads(value)
    except json.JSONDecodeError as error:
        return f". This is not valid JSON: {error}. Quote the whole argument for the shell"
    return ""


def settings_models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings models in an annotation: `A`, `A | None`, `Annotated[A | B, ...]`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from settings_models(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from settings_models(option)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def by_kind(variants: Sequence[type[BaseModel]]) -> dict[str, type[BaseModel]]:
    """The models of a union by the value of their `kind` field."""
    return {v.model_fields["kind"].default: v for v in variants if "kind" in v.model_fields}
