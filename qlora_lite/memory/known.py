"""The dimensions of the models in the recipes, so that a plan needs no network.

Each file in `known/` has the hub ids that share these dimensions, the number of parameters that the
model card publishes, and the part of the config that a plan needs.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class KnownModel:
    """Models that share their dimensions."""

    models: tuple[str, ...]
    """Hub ids."""
    num_parameters: int
    """As published; tied weights are counted once."""
    config: dict[str, Any]
    """Enough for transformers' config class, with `model_type`. It has every field that a message
    states, so that no default of the class is stated as a fact."""
    differences: dict[str, dict[str, Any]]
    """Fields that differ in single models, by hub id."""


@cache
def known_models() -> tuple[KnownModel, ...]:
    """All known models, smallest first."""
    folder = files("qlora_lite.memory") / "known"
    facts = [json.loads(file.read_text(encoding="utf-8")) for file in folder.iterdir()]
    models = [
        KnownModel(tuple(f["models"]), f["num_parameters"], f["config"], f.get("differences", {}))
        for f in facts
    ]
    return tuple(sorted(models, key=lambda known: known.num_parameters))


def known_config(model: str) -> dict[str, Any] | None:
    """The shipped part of a hub model's config; None if the model is unknown."""
    return next(
        (
            known.config | known.differences.get(model, {})
            for known in known_models()
            if model in known.models
        ),
        None,
    )
