"""Load a recipe: from a Python file, a `recipe.json`, a run's folder, or by a shipped name."""

import importlib.util
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from qlora_lite.data.template_shelf import SHELF
from qlora_lite.foundation.errors import RecipeError
from qlora_lite.foundation.files import parse_json
from qlora_lite.foundation.json_files import shown
from qlora_lite.foundation.overrides import validate
from qlora_lite.foundation.sealed import is_unchanged
from qlora_lite.foundation.settings import Settings
from qlora_lite.foundation.validation_messages import explain
from qlora_lite.recipe import Recipe, vary
from qlora_lite.shards.gguf.header import find_gguf
from qlora_lite.shipped_recipes import find_recipe, near_names, shipped_recipes

TRUST = "base.trust_remote_code"
"""The setting that lets the base's own Python code run."""

CHANGED = "changed since the run wrote it"
"""Said of a `recipe.json` that was edited or damaged."""


def load_recipe(path: str | Path, *, trust_remote_code: bool = False) -> Recipe:
    """Load a Python file, a `recipe.json` or that of a run's folder, or a shipped recipe by name.

    `load_recipe("qwen3_8b")` is the recipe of that name that comes with the package, unless the
    working directory has a `qwen3_8b` or a `qwen3_8b.py`.
    The folder of a Python recipe is importable while it loads, so recipes may import each other.
    The output of a run's recipe is the run's folder, even if that was moved.

    Args:
        trust_remote_code: let the base of a JSON recipe run its own Python code. A JSON file is
            data, so what it says about this is not enough.

    Raises:
        RecipeError: if there is no such recipe, or it is not valid.
    """
    path = find_recipe(Path(path))
    run = path if path.is_dir() else path.parent if is_run(path.parent) else None
    if path.is_dir():
        if not (path / "recipe.json").is_file():
            _refuse_other_folders(path)
        path = path / "recipe.json"
    if not path.is_file():
        raise RecipeError(
            f"{path} is not a file. {near_names(path)}Give a recipe (.py), a run's folder or its "
            f"recipe.json, or one of {', '.join(shipped_recipes())}; `qlora-lite init MODEL` "
            "writes a new one"
        )
    if path.suffix == ".json":
        recipe = _from_json(path, trust_remote_code)
        return recipe if run is None else recipe.model_copy(update={"output": str(run)})
    if path.suffix != ".py":
        _refuse_models(path)
        raise RecipeError(f"{path}: a recipe must be a .py file or a run's recipe.json")
    return _from_python(path)


def load_with_settings(path: str | Path, assignments: Sequence[str]) -> tuple[Recipe, list[str]]:
    """`load_recipe` with the settings of the command line, and notes about what else changed.

    Raises:
        RecipeError: if the recipe or a setting is not valid.
    """
    given = {assignment.partition("=")[0] for assignment in assignments}
    recipe = load_recipe(path, trust_remote_code=not given.isdisjoint({"base", TRUST}))
    return vary(recipe, assignments)


def _refuse_other_folders(path: Path) -> None:
    _refuse_models(path)
    if (path / "adapter_config.json").is_file() or (path / "native.safetensors").is_file():
        raise RecipeError(
            f"{path} is an adapter, and a recipe is needed. To start from it, set "
            f"adapter.start={path} in a recipe"
        )


def _refuse_models(path: Path) -> None:
    if (path / "config.json").is_file() or find_gguf(path) is not None:
        raise RecipeError(
            f"{path} is a model, and a recipe is needed. Write one with `qlora-lite init {path}`"
        )


def is_run(folder: Path) -> bool:
    """Whether a run was started in this folder, not only a recipe.json copied to it."""
    return any((folder / name).exists() for name in ("checkpoints", "adapter", "metrics.jsonl"))


def _from_json(path: Path, trust_remote_code: bool) -> Recipe:
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} is not readable JSON ({error}). Give another recipe") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} contains a {type(values).__name__}, and a recipe is an object")
    if "model_type" in values or "peft_type" in values:
        raise RecipeError(f"{path} describes a model or an adapter, and a recipe is needed")
    settings = values.get("recipe", values)
    if not isinstance(settings, dict):
        raise RecipeError(f"{path}: recipe is {shown(settings)}, and an object is needed")
    try:
        recipe = validate(Recipe, settings)
    except RecipeError as error:
        if "recipe" in values and not is_unchanged(values):
            raise RecipeError(f"{path} {CHANGED}: {error}") from None
        raise
    if trust_remote_code:
        base = recipe.base.model_copy(update={"trust_remote_code": True})
        return recipe.model_copy(update={"base": base})
    if recipe.base.trust_remote_code:
        raise RecipeError(
            f"{path} has {TRUST}=true: Python code of {recipe.base.model} would run on this "
            f"machine, and a JSON file cannot allow that. Read the code, then add {TRUST}=true to "
            "the command (in Python: trust_remote_code=True)"
        )
    return recipe


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
            f"{path}{_line_in(path, error)} ends the program while it is read. Remove that line, "
            'or put it under `if __name__ == "__main__":`'
        ) from None
    except Exception as error:
        # whatever a recipe raises is in the user's file, so report its line
        raise RecipeError(
            f"{path}{_line_in(path, error)}: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(folder)
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{path} defines no `recipe = Recipe(...)`. See recipes/demo.py for an example"
        )
    return recipe


def _all_settings(parent: type[Settings]) -> Iterator[type[Settings]]:
    for model in parent.__subclasses__():
        yield model
        yield from _all_settings(model)


def _line_in(path: Path, error: BaseException) -> str:
    """The line of the recipe file in which `error` was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.resolve()]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with existing paths made absolute, so that it works from any directory."""

    def absolute(name: str | None) -> str | None:
        return str(Path(name).resolve()) if name and Path(name).exists() else name

    data = {name: absolute(getattr(recipe.data, name)) for name in ("train", "heldout")}
    if recipe.data.template not in SHELF:
        data["template"] = absolute(recipe.data.template)
    return recipe.model_copy(
        update={
            "base": recipe.base.model_copy(update={"model": absolute(recipe.base.model)}),
            "data": recipe.data.model_copy(update=data),
            "adapter": recipe.adapter.model_copy(update={"start": absolute(recipe.adapter.start)}),
        }
    )
