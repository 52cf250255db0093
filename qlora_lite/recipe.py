"""The typed recipe: one object with all settings of a run.

A recipe is a Python file that builds a `Recipe`, or the `recipe.json` that every run writes. The
command line overrides settings with `key=value`, as `recipe.but("optim.lr=1e-4")` does in Python.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from qlora_lite.adapters.ranks import scale_of
from qlora_lite.data.settings import Data
from qlora_lite.foundation.errors import RecipeError
from qlora_lite.foundation.overrides import apply_overrides, explicit_values, validate
from qlora_lite.foundation.settings import Settings, UserPath, kind_of_name
from qlora_lite.foundation.units import parse_bytes
from qlora_lite.methods.catalogue import Adapter
from qlora_lite.methods.lora import LoRA
from qlora_lite.model.settings import Base
from qlora_lite.offload.settings import NoOffload, Offload, with_kind
from qlora_lite.training.settings import Checkpoints, Evaluation, Optim

CHANGEABLE_SETTINGS = (
    *("output", "budget", "tracking", "checkpoints", "evaluation.samples", "offload"),
)
"""Settings that change a run's numbers by rounding at most, so they may differ when it is
continued."""


class Recipe(Settings):
    """A base, an adapter, data, and how to train."""

    base: Base
    """The frozen model and its quantisation."""

    adapter: Annotated[Adapter, BeforeValidator(kind_of_name)] = LoRA()
    """The adapter method (`kind`) and its settings."""

    data: Data
    """The training and held-out rows."""

    optim: Optim = Optim()
    """The optimizer, its schedule, and the tokens of a step."""

    evaluation: Evaluation = Evaluation()
    """Scoring during training."""

    checkpoints: Checkpoints = Checkpoints()
    """Saved states to continue from."""

    offload: Annotated[Offload, BeforeValidator(with_kind)] = NoOffload()
    """DeepSpeed ZeRO: what is divided among processes, or kept in host memory."""

    budget: str | None = None
    """Memory that each process may use, such as "22GiB"; by default the device's free memory."""

    output: UserPath = Field(min_length=1)
    """The run's folder."""

    seed: int = Field(default=0, ge=0)
    """Seed of every random number."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""

    tracking: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Experiment trackers that get the metrics; by default none."""

    @field_validator("tracking", mode="before")
    @classmethod
    def _may_be_one_name(cls, tracking: Any) -> Any:
        return [tracking] if isinstance(tracking, str) and tracking[:1] != "[" else tracking

    @field_validator("budget", mode="before")
    @classmethod
    def _may_be_a_number(cls, budget: Any) -> Any:
        return str(budget) if isinstance(budget, int) and budget > 0 else budget

    @field_validator("budget")
    @classmethod
    def _is_a_size(cls, budget: str | None) -> str | None:
        if budget is not None:
            try:
                parse_bytes(budget)
            except RecipeError:
                raise ValueError('a size is needed, such as "22GiB", "800MB" or bytes') from None
        return budget

    def but(self, *assignments: str) -> "Recipe":
        """A checked copy with other settings: `recipe.but("optim.lr=1e-4", "adapter=rslora")`.

        Raises:
            RecipeError: naming every path that is wrong, and what is allowed there.
        """
        return vary(self, assignments)[0]

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain JSON values."""
        return self.model_dump(mode="json")


def vary(recipe: Recipe, assignments: Sequence[str]) -> tuple[Recipe, list[str]]:
    """`recipe.but`, and notes about what changed besides the assignments."""
    values = explicit_values(recipe)
    notes = _replace_length(values, assignments)
    values, more = apply_overrides(values, assignments, Recipe)
    varied = validate(Recipe, values)
    return varied, [*notes, *more, *_other_scale(recipe.adapter, varied.adapter, assignments)]


def _other_scale(old: Adapter, new: Adapter, assignments: Sequence[str]) -> list[str]:
    """A note if a new rank changes the scale of the update, because alpha stays."""
    given = {text.partition("=")[0] for text in assignments}
    if "adapter.rank" not in given or given & {"adapter.alpha", "adapter.scaling"}:
        return []
    if (old.alpha, old.scaling) != (new.alpha, new.scaling):
        return []
    before, after = (scale_of(a.alpha, a.rank, a.scaling) for a in (old, new))
    if before == after:
        return []
    return [f"adapter.alpha stays {new.alpha:g}, so the scale is {after:g} instead of {before:g}"]


def _replace_length(values: dict[str, Any], assignments: Sequence[str]) -> list[str]:
    """A new `optim.steps` replaces the recipe's `optim.epochs`, and the other way round.

    Raises:
        RecipeError: if both are given.
    """
    given = dict(text.split("=", 1) for text in assignments if "=" in text)
    lengths = [n for n in ("steps", "epochs") if given.get(f"optim.{n}", "null") not in _UNSET]
    if len(lengths) == 2:
        raise RecipeError(
            f"got optim.steps={given['optim.steps']} and optim.epochs={given['optim.epochs']}, "
            "which are two lengths of one run. Give one of them"
        )
    optim = values.get("optim")
    if not lengths or not isinstance(optim, dict):
        return []
    other = "epochs" if lengths == ["steps"] else "steps"
    old = optim.pop(other, None)
    if old in (None, Optim.model_fields[other].default):
        return []
    name = f"optim.{lengths[0]}"
    return [f"{name}={given[name]} replaces optim.{other}={old} of the recipe"]


_UNSET = ("null", "None")


def differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """`optim.lr: 0.0002 -> 0.0001` for every setting that differs."""
    found: list[str] = []
    for name in dict.fromkeys([*old, *new]):
        where = f"{path}{name}"
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{where}.")
        elif before != after:
            found.append(f"{where}: {before!r} -> {after!r}")
    return found
