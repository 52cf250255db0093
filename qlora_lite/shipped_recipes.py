"""The recipes that are part of the package, found by name.

`qlora_lite/recipes` is a link to `recipes/` at the top of the repository, so that the wheel has the
recipes too.
"""

import ast
import difflib
from pathlib import Path

import qlora_lite

FOLDER = Path(qlora_lite.__file__).parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """The file of each recipe, by its name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.py"))}


def summary(file: Path) -> str:
    """The first line of a recipe's docstring, read without running the recipe."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def find_recipe(path: Path) -> Path:
    """The file of a recipe given by name. Other paths and unknown names are returned unchanged.

    The user's files come first: `path` itself, then `path.py` in the working directory, where
    `qlora-lite init` writes it, then the recipe that comes with the package.
    """
    if len(path.parts) != 1 or path.suffix or path.exists():
        return path
    own = path.with_suffix(".py")
    return own if own.exists() else shipped_recipes().get(path.name, path)


def near_names(path: Path) -> str:
    """A question with shipped names that are close to `path`, for an error message."""
    near = difflib.get_close_matches(path.stem, list(shipped_recipes()), n=2)
    return f"Did you mean {' or '.join(near)}? " if near else ""
