"""`key=value` from a command line, laid over a recipe's dictionary.

    overlay({"optim": {"lr": 1e-4}}, ["optim.lr=2e-4"])  ->  {"optim": {"lr": 2e-4}}

A value is read as JSON where it is JSON, as text otherwise. A bare name for a union
(`adapter=dora`) becomes `{"kind": "dora"}`; the fields that both kinds have are kept, the others
take the defaults of the new kind. `explain` turns what pydantic found into one message with the
path, what is allowed and the nearest match.
"""

import copy
import difflib
import json
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from qlora_lite.foundation.errors import RecipeError

Model = TypeVar("Model", bound=BaseModel)

_NEEDED = {
    "list_type": 'a list is needed, such as ["a", "b"]',
    "tuple_type": "a list is needed, such as [0.9, 0.999]",
    "dict_type": 'an object is needed, such as {"a": "b"}',
    "string_type": "text is needed",
}
"""What pydantic finds, in words of a command line."""
_MEANT_AS_JSON = ("list_type", "tuple_type", "dict_type", "model_type", "model_attributes_type")


def overlay(
    values: dict[str, Any], assignments: Sequence[str], model: type[BaseModel]
) -> tuple[dict[str, Any], list[str]]:
    """`values` with every `path=value` laid over it, and what a reader should be told.

    `values` holds only what was set, so that a new kind of a union takes its own defaults.

    Raises:
        RecipeError: if an assignment has no `=`, or its path leads nowhere.
    """
    result = copy.deepcopy(values)
    notes: list[str] = []
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator or not path:
            raise RecipeError(f"got {assignment!r}: write key=value, for example optim.lr=1e-4")
        note = _assign(result, path.split("."), _read_value(text), model, path)
        if note:
            notes.append(note)
    return result, notes


def set_values(model: BaseModel) -> dict[str, Any]:
    """What was set in `model`, as plain values; kinds are told although they are defaults."""
    values = model.model_dump(mode="json", exclude_unset=True)
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel) and (name in values or "kind" in type(value).model_fields):
            values[name] = set_values(value)
        elif name == "kind":
            values[name] = value
    return values


def check(model: type[Model], values: dict[str, Any]) -> Model:
    """`values` as a `model`.

    Raises:
        RecipeError: with the path of every wrong value, what is allowed there, and a near match.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RecipeError(explain(error, model)) from None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """A line for every wrong value: its path, what was got, what is allowed, a near match.

    A value that may be of several types is wrong for each: then the line has all their words.
    """
    told: dict[str, list[str]] = {}
    for problem in error.errors():
        where, what = _explain(model, dict(problem))
        if what not in told.setdefault(where, []):
            told[where].append(what)
    return "\n".join(where + ", or ".join(whats) for where, whats in told.items())


def _read_value(text: str) -> Any:
    """JSON where it is JSON; `True`, `False` and `None` as Python says them; text otherwise."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _assign(
    values: dict[str, Any], path: list[str], value: Any, model: type[BaseModel], full_path: str
) -> str | None:
    """Set `path` in the nested dictionary `values`, which describes a `model`."""
    name, *rest = path
    if name not in model.model_fields:
        raise RecipeError(_unknown(full_path, name, list(model.model_fields)))
    variants = list(_models_in(model.model_fields[name].annotation))
    if not rest:
        if variants and isinstance(value, str) and (kinds := _by_kind(variants)):
            return _switch_kind(values, name, value, kinds, full_path)
        values[name] = value
        return None
    if not variants:
        raise RecipeError(f"{full_path}: {name} is a single value and has no field {rest[0]!r}")
    inner = values.get(name)
    if not isinstance(inner, dict):
        inner = values[name] = {}
    chosen = _chosen(
        variants, inner, model.model_fields[name].get_default(call_default_factory=True)
    )
    if "kind" in chosen.model_fields:
        inner.setdefault("kind", chosen.model_fields["kind"].default)
    return _assign(inner, rest, value, chosen, full_path)


def _switch_kind(
    values: dict[str, Any],
    name: str,
    kind: str,
    kinds: dict[str, type[BaseModel]],
    full_path: str,
) -> str | None:
    """Another kind of a union: fields that it shares with the old one are kept."""
    if broken := _broken_json(kind):
        raise RecipeError(f"{full_path}: got {kind!r}{broken}")
    if kind not in kinds:
        raise RecipeError(_unknown(full_path, kind, list(kinds)))
    old = values.get(name)
    old = old if isinstance(old, dict) else {}
    kept = {k: v for k, v in old.items() if k != "kind" and k in kinds[kind].model_fields}
    values[name] = {"kind": kind, **kept}
    if not kept or old.get("kind") == kind:
        return None
    shown = ", ".join(f"{k}={v}" for k, v in kept.items())
    return f"{full_path}={kind}: kept {shown}; the rest takes the defaults of {kind}"


def _chosen(
    variants: list[type[BaseModel]], values: dict[str, Any], default: Any
) -> type[BaseModel]:
    """Which of a union's models `values` describes: by its kind, else as the default."""
    kinds = _by_kind(variants)
    if values.get("kind") in kinds:
        return kinds[values["kind"]]
    return type(default) if isinstance(default, BaseModel) else variants[0]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings models that an annotation allows: `A`, `A | None`, `Annotated[A | B, ...]`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _models_in(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _models_in(option)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _by_kind(variants: Sequence[type[BaseModel]]) -> dict[str, type[BaseModel]]:
    return {v.model_fields["kind"].default: v for v in variants if "kind" in v.model_fields}


def _unknown(path: str, got: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(got, allowed, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{path}: {got!r} is not known here.{hint} Allowed: {', '.join(allowed)}"


def _explain(model: type[BaseModel], problem: dict[str, Any]) -> tuple[str, str]:
    """One of pydantic's findings: "path: what we got: " and what is allowed there."""
    location = [str(part) for part in problem["loc"]]
    path = ".".join(_without_tags(model, location))
    kind, got = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        owner = _model_at(model, location[:-1])
        return "", _unknown(path, location[-1], list(owner.model_fields) if owner else [])
    if kind == "missing":
        return "", f"{path}: needed, and nothing was given"
    if kind == "union_tag_invalid":
        allowed = [tag.strip("'\" ") for tag in problem["ctx"]["expected_tags"].split(",")]
        return "", _unknown(path, problem["ctx"]["tag"], allowed)
    start = f"{path}: got {got!r}: " if path else ""
    if kind in ("model_type", "model_attributes_type", "union_tag_not_found"):
        return start, _wants_settings(model, location, path) + _broken_json(got)
    if kind == "literal_error" and isinstance(got, str):
        named = [part for part in location if not part.isdigit()]  # an item of a list is one too
        owner = _model_at(model, named[:-1])
        field = owner.model_fields.get(named[-1]) if owner else None
        if allowed := [str(value) for value in _literals(field.annotation if field else None)]:
            return "", _unknown(path, got, allowed)
    message = _NEEDED.get(kind) or problem["msg"].removeprefix("Value error, ")
    if kind == "string_type" and isinstance(got, int | float):
        message = f"text is needed. For a shell: {path}='\"{got}\"'"
    return start, message + (_broken_json(got) if kind in _MEANT_AS_JSON else "")


def _wants_settings(model: type[BaseModel], location: Sequence[str], path: str) -> str:
    """What may be given where settings of their own stand."""
    owner = _model_at(model, location[:-1])
    field = owner.model_fields.get(location[-1]) if owner else None
    variants = list(_models_in(field.annotation)) if field else []
    if kinds := _by_kind(variants):
        return f"a kind is needed, {path}=NAME with one of {', '.join(kinds)}"
    names = [name for variant in variants for name in variant.model_fields]
    return f"it has settings of its own: {', '.join(f'{path}.{name}' for name in names)}"


def _broken_json(value: Any) -> str:
    """Why text that begins as JSON was taken as text; nothing where it does not."""
    if not isinstance(value, str) or not value.startswith(("{", "[")):
        return ""
    try:
        json.loads(value)
    except json.JSONDecodeError as error:
        return f". It begins as JSON and is none: {error}. The shell needs quotes around all of it"
    return ""


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
            variants = list(_models_in(model.model_fields[part].annotation))
            if not variants:
                return None
            model = variants[0]
            alternatives = _by_kind(variants)
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
            variants = list(_models_in(annotation))
            if not variants:
                is_mapping = any(get_origin(a) is dict for a in (annotation, *get_args(annotation)))
                rest = location[i + 1 :] if is_mapping else ()
                return [*path, *rest]
            alternatives = _by_kind(variants)
            model = variants[0]
    return path
