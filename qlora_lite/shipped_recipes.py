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


def shipped_file(path: Path) -> Path | None:
    """The shipped recipe that `path` names.

    None if `path` exists, or is not a bare name: a file or folder of the user's comes first.
    """
    if len(path.parts) != 1 or path.suffix or path.exists():
        return None
    return shipped_recipes().get(path.name)


def near_names(path: Path) -> str:
    """A question with the names that are close to that of `path`, which does not exist."""
    near = difflib.get_close_matches(path.stem, list(shipped_recipes()), n=2)
    return f"Did you mean {' or '.join(near)}? " if near else ""
