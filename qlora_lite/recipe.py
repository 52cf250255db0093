"""The typed recipe: one object that says everything about a run.

A recipe is a Python file that builds a `Recipe`, or the `recipe.json` that every run writes. The
command line lays `key=value` over it; `recipe.but("optim.lr=1e-4")` does the same in Python.
"""

import importlib.util
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from qlora_lite.adapters.catalogue import Adapter
from qlora_lite.adapters.lora import LoRA
from qlora_lite.data.settings import Data
from qlora_lite.foundation.errors import RecipeError
from qlora_lite.foundation.explain import explain
from qlora_lite.foundation.overrides import check, overlay, set_values
from qlora_lite.foundation.settings import Settings
from qlora_lite.foundation.units import parse_bytes
from qlora_lite.model.load import Base
from qlora_lite.training.loop import Checkpoints, Evaluation
from qlora_lite.training.optimizer import Optim

FREE_SETTINGS = ("output", "budget", "tracking", "checkpoints", "evaluation.samples")
"""Settings that change no number of a run's result, so they may differ when it is continued."""


class Recipe(Settings):
    """A base, an adapter, data, and how to train."""

    base: Base
    """The frozen model and how it is held."""

    adapter: Adapter = LoRA()
    """What is trained: any method of the catalogue, by `kind`."""

    data: Data
    """What is read."""

    optim: Optim = Optim()
    """How parameters move, and how much data a step sees."""

    evaluation: Evaluation = Evaluation()
    """Scoring during training."""

    checkpoints: Checkpoints = Checkpoints()
    """Saved states to continue from."""

    budget: str | None = None
    """Memory that may be used, such as "22GiB"; what the device has unless given."""

    output: str = Field(min_length=1)
    """The run's folder."""

    seed: int = Field(default=0, ge=0)
    """Every random number comes from it."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""

    tracking: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Trackers that metrics are sent to; none unless asked for."""

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
        """A variant: `recipe.but("optim.lr=1e-4", "adapter=rslora")`, checked as a whole.

        Raises:
            RecipeError: naming every path that is wrong, and what is allowed there.
        """
        return vary(self, assignments)[0]

    def as_values(self) -> dict[str, Any]:
        """Every setting as plain JSON values."""
        return self.model_dump(mode="json")


def vary(recipe: Recipe, assignments: Sequence[str]) -> tuple[Recipe, list[str]]:
    """`recipe.but`, with what a reader should be told about it."""
    values, notes = overlay(set_values(recipe), assignments, Recipe)
    return check(Recipe, values), notes


def load_recipe(path: str | Path) -> Recipe:
    """A recipe from a Python file, a `recipe.json`, or a run's folder.

    The folder of a Python recipe is importable while it loads, so recipes may build on neighbours.
    A run's recipe has the run's folder as its output, wherever that was moved to.

    Raises:
        RecipeError: if there is none, or it does not say what a recipe must say.
    """
    path = Path(path)
    run = path if path.is_dir() else path.parent if is_run(path.parent) else None
    if path.is_dir():
        if not (path / "recipe.json").is_file():
            _refuse_other_folders(path)
        path = path / "recipe.json"
    if not path.is_file():
        raise RecipeError(
            f"{path} is not a file. Give a recipe (recipes/*.py), a run's folder or its "
            "recipe.json; `qlora-lite init MODEL` writes a new one"
        )
    if path.suffix == ".json":
        recipe = _from_json(path)
        return recipe if run is None else recipe.model_copy(update={"output": str(run)})
    if path.suffix != ".py":
        raise RecipeError(f"{path}: a recipe is a .py file or a run's recipe.json")
    return _from_python(path)


def _refuse_other_folders(path: Path) -> None:
    if (path / "config.json").is_file():
        raise RecipeError(
            f"{path} is a model, and a recipe is needed. `qlora-lite init {path}` writes one"
        )
    if (path / "adapter_config.json").is_file() or (path / "native.safetensors").is_file():
        raise RecipeError(
            f"{path} is an adapter, and a recipe is needed. adapter.start={path} begins from it"
        )


def is_run(folder: Path) -> bool:
    """Whether a recipe was begun in this folder, not only copied to it."""
    return any((folder / name).exists() for name in ("checkpoints", "adapter", "metrics.jsonl"))


def _from_json(path: Path) -> Recipe:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not readable JSON ({error}). Give another recipe") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds a {type(values).__name__}; a recipe is an object")
    if "model_type" in values or "peft_type" in values:
        raise RecipeError(f"{path} describes a model or an adapter, and a recipe is needed")
    return check(Recipe, values.get("recipe", values))


def _from_python(path: Path) -> Recipe:
    spec = importlib.util.spec_from_file_location(f"_recipe_{path.stem}", path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except ValidationError as error:
        settings = {model.__name__: model for model in _all_settings(Settings)}
        problems = explain(error, settings.get(error.title, Recipe))
        raise RecipeError(f"{path}, {error.title}(...): {problems}") from None
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    except SystemExit as error:
        raise RecipeError(
            f"{path}{_line_in(path, error)} ends the program while it is read. Take that line out, "
            'or put it under `if __name__ == "__main__":`'
        ) from None
    except Exception as error:
        # whatever a recipe raises is in the user's file, so its place is told instead of ours
        raise RecipeError(
            f"{path}{_line_in(path, error)}: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(folder)
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{path} defines no `recipe = Recipe(...)`. See recipes/demo.py for the shape of one"
        )
    return recipe


def _all_settings(parent: type[Settings]) -> Iterator[type[Settings]]:
    for model in parent.__subclasses__():
        yield model
        yield from _all_settings(model)


def _line_in(path: Path, error: BaseException) -> str:
    """The line of the recipe that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.resolve()]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""


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
