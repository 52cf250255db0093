"""How a recipe differs from the one that a run recorded, without what changes no result.

Differences are lines such as `optim.lr: 0.0002 -> 0.001`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from qlora_lite.foundation.errors import RecipeError
from qlora_lite.foundation.files import as_stored
from qlora_lite.foundation.overrides import validate
from qlora_lite.recipe import CHANGEABLE_SETTINGS, Recipe, differences

LENGTH_SETTINGS = ("optim.steps", "optim.epochs")
"""The settings that `extend` may change."""

MAY_DIFFER_AFTER_TRAINING = (
    *("base.model", "base.revision", "data.train", "data.heldout", "adapter.start", "device"),
    "base.trust_remote_code",
)
"""Files are checked by their fingerprints, a run may be used on another device, and trust counts on
the command line only."""


def changes(recorded: dict[str, Any], recipe: Recipe) -> list[str]:
    """Differences that would change a result. A setting that did not exist when the recipe was
    recorded counts as its default."""
    with contextlib.suppress(RecipeError):  # not readable by this version: compare as recorded
        recorded = validate(Recipe, recorded).to_dict()
    changed = differences(recorded, recipe.to_dict())
    return [line for line in changed if not _is_changeable(_setting(line))]


def edited_after_training(trained: dict[str, Any], recipe: Recipe) -> list[str]:
    """Differences from the recipe of an adapter that no later use explains."""
    return [
        line
        for line in changes(trained, recipe)
        if not is_length(line) and _setting(line) not in MAY_DIFFER_AFTER_TRAINING
    ]


def origin_of(recipe: Recipe, fingerprints: dict[str, str]) -> dict[str, Any]:
    """What a checkpoint depends on, by name: the settings that may not change in a run, and the
    fingerprints of its `data` and `base`."""
    settings = {
        name: value
        for name, value in _flat(as_stored(recipe.to_dict()))
        if not _is_changeable(name) and name not in (*LENGTH_SETTINGS, *MAY_DIFFER_AFTER_TRAINING)
    }
    return settings | {f"the {what}": fingerprints[what] for what in ("data", "base")}


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def is_length(difference: str) -> bool:
    """Whether a difference is in the length of the run."""
    return _setting(difference) in LENGTH_SETTINGS


def extend_hint(changed: list[str]) -> str:
    """The end of an error message: how to train longer, if nothing else changed."""
    if all(is_length(line) for line in changed):
        return ", or add --extend to train this run longer"
    return ""


def _setting(difference: str) -> str:
    return difference.partition(":")[0]


def _is_changeable(path: str) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in CHANGEABLE_SETTINGS)
