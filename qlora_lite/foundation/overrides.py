"""Apply `key=value` overrides from a command line to the settings of a recipe.

    apply_overrides({"optim": {"lr": 1e-4}}, ["optim.lr=2e-4"])  ->  {"optim": {"lr": 2e-4}}

A value is parsed as JSON if it is valid JSON, and is text otherwise. A bare name for a union
(`adapter=dora`) becomes `{"kind": "dora"}`: fields that both kinds have keep their values, the
others get the defaults of the new kind.
"""

import copy
import json
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qlora_lite.foundation.errors import RecipeError
from qlora_lite.foundation.validation_messages import (
    by_kind,
    explain,
    json_error,
    settings_models,
    unknown_name,
)

Model = TypeVar("Model", bound=BaseModel)


def apply_overrides(
    values: dict[str, Any], assignments: Sequence[str], model: type[BaseModel]
) -> tuple[dict[str, Any], list[str]]:
    """A copy of `values` with every `path=value` applied, and notes for the user.

    `values` holds only what was set explicitly, so a new kind of a union gets its own defaults.

    Raises:
        RecipeError: if an assignment has no `=`, or its path names no field.
    """
    result = copy.deepcopy(values)
    notes: list[str] = []
    ordered = _in_order(assignments)
    given = {path for path, _ in ordered}
    for path, text in ordered:
        note = _assign(result, path.split("."), _read_value(text), model, path, given)
        if note:
            notes.append(note)
    return result, notes


def _in_order(assignments: Sequence[str]) -> list[tuple[str, str]]:
    """Paths and texts, a whole object before its fields: `adapter.rank=8 adapter=dora` is the same
    as `adapter=dora adapter.rank=8`.

    Raises:
        RecipeError: if an assignment has no `=`, or a path is given twice.
    """
    found: dict[str, str] = {}
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator or not path:
            raise RecipeError(f"got {assignment!r}: write key=value, for example optim.lr=1e-4")
        if path in found:
            raise RecipeError(f"{path} is given twice: {found[path]} and {text}. Leave one out")
        found[path] = text
    for path, text in found.items():
        value = _read_value(text)
        for name in value if isinstance(value, dict) else ():
            if (inner := f"{path}.{name}") in found:
                raise RecipeError(f"{inner} is given twice: alone and in {path}. Leave one out")
    return sorted(found.items(), key=lambda item: item[0].count("."))


def explicit_values(model: BaseModel) -> dict[str, Any]:
    """What was set explicitly in `model`, as plain values. `kind` is always included."""
    values = model.model_dump(mode="json", exclude_unset=True)
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel) and (name in values or "kind" in type(value).model_fields):
            values[name] = explicit_values(value)
        elif name == "kind":
            values[name] = value
    return values


def validate(model: type[Model], values: dict[str, Any]) -> Model:
    """A `model` made of `values`.

    Raises:
        RecipeError: with the path of every wrong value, what is allowed there, and the closest
            match.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RecipeError(explain(error, model)) from None


def _read_value(text: str) -> Any:
    """Valid JSON is parsed; Python's `True`, `False` and `None` are accepted; the rest is text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _assign(
    values: dict[str, Any],
    path: list[str],
    value: Any,
    model: type[BaseModel],
    full_path: str,
    given: Collection[str],
) -> str | None:
    """Set `path` in the nested dictionary `values`, whose schema is `model`. Returns a note."""
    name, *rest = path
    if name not in model.model_fields:
        raise RecipeError(unknown_name(full_path, name, list(model.model_fields)))
    variants = list(settings_models(model.model_fields[name].annotation))
    if not rest:
        if variants and isinstance(value, str) and (kinds := by_kind(variants)):
            return _switch_kind(values, name, value, kinds, full_path, given)
        values[name] = value
        return None
    if not variants:
        raise RecipeError(f"{full_path}: {name} is a single value, it has no field {rest[0]!r}")
    inner = values.get(name)
    if not isinstance(inner, dict):
        inner = values[name] = {}
    chosen = _variant(
        variants, inner, model.model_fields[name].get_default(call_default_factory=True)
    )
    if "kind" in chosen.model_fields:
        inner.setdefault("kind", chosen.model_fields["kind"].default)
    return _assign(inner, rest, value, chosen, full_path, given)


def _switch_kind(
    values: dict[str, Any],
    name: str,
    kind: str,
    kinds: dict[str, type[BaseModel]],
    full_path: str,
    given: Collection[str],
) -> str | None:
    """Switch a union to another kind. Fields that both kinds have keep their values.

    The note leaves out the fields that are `given`, too.
    """
    if broken := json_error(kind):
        raise RecipeError(f"{full_path}: got {kind!r}{broken}")
    if kind not in kinds:
        raise RecipeError(unknown_name(full_path, kind, list(kinds)))
    old = values.get(name)
    old = old if isinstance(old, dict) else {}
    kept = {k: v for k, v in old.items() if k != "kind" and k in kinds[kind].model_fields}
    lost = [f"{k}={v}" for k, v in old.items() if k != "kind" and k not in kept]
    values[name] = {"kind": kind, **kept}
    kept = {k: v for k, v in kept.items() if f"{full_path}.{k}" not in given}
    if not (kept or lost) or old.get("kind") == kind:
        return None
    parts = []
    if kept:
        parts.append(f"kept {', '.join(f'{k}={v}' for k, v in kept.items())}")
    if lost:
        parts.append(f"dropped {', '.join(lost)}, which {kind} does not have")
    return f"{full_path}={kind}: {'; '.join(parts)}; the other fields get the defaults of {kind}"


def _variant(
    variants: list[type[BaseModel]], values: dict[str, Any], default: Any
) -> type[BaseModel]:
    """The model of a union that `values` describes: by its kind, else that of the default."""
    kinds = by_kind(variants)
    if values.get("kind") in kinds:
        return kinds[values["kind"]]
    return type(default) if isinstance(default, BaseModel) else variants[0]
