"""`key=value` from a command line, laid over a recipe's dictionary.

    overlay({"optim": {"lr": 1e-4}}, ["optim.lr=2e-4"])  ->  {"optim": {"lr": 2e-4}}

A value is read as JSON where it is JSON, as text otherwise. A bare name for a union
(`adapter=dora`) becomes `{"kind": "dora"}`; the fields that both kinds have are kept, the others
take the defaults of the new kind.
"""

import copy
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qlora_lite.foundation.errors import RecipeError
from qlora_lite.foundation.validation_messages import (
    broken_json,
    by_kind,
    explain,
    models_in,
    unknown,
)

Model = TypeVar("Model", bound=BaseModel)


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
        raise RecipeError(unknown(full_path, name, list(model.model_fields)))
    variants = list(models_in(model.model_fields[name].annotation))
    if not rest:
        if variants and isinstance(value, str) and (kinds := by_kind(variants)):
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
    if broken := broken_json(kind):
        raise RecipeError(f"{full_path}: got {kind!r}{broken}")
    if kind not in kinds:
        raise RecipeError(unknown(full_path, kind, list(kinds)))
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
    kinds = by_kind(variants)
    if values.get("kind") in kinds:
        return kinds[values["kind"]]
    return type(default) if isinstance(default, BaseModel) else variants[0]
