"""The recipes that are part of the package, found by name.

`recipes/` at the top of the repository is where to read them. `qlora_lite/recipes` is a link to it,
so that they are in the wheel too.
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
    """The file that a bare name stands for; any other path, and an unknown name, as it is.

    The user's files come first: `path` itself, then `path.py` in the working directory, where
    `qlora-lite init` writes it, then the recipe that comes with the package.
    """
    if len(path.parts) != 1 or path.suffix or path.exists():
        return path
    own = path.with_suffix(".py")
    return own if own.exists() else shipped_recipes().get(path.name, path)


def near_names(path: Path) -> str:
    """A question with the names that are close to that of `path`, which does not exist."""
    near = difflib.get_close_matches(path.stem, list(shipped_recipes()), n=2)
    return f"Did you mean {' or '.join(near)}? " if near else ""
