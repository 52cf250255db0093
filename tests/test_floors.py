"""Imports go to a lower floor, or stay inside their own package."""

import ast
from pathlib import Path

import qlora_lite

ROOT = Path(qlora_lite.__file__).parent

FLOORS = {
    "foundation": 0,
    "shards": 1,
    "kernels": 1,
    "model": 2,
    "adapters": 3,
    "data": 3,
    "offload": 3,
    "methods": 4,
    "memory": 5,
    "export": 5,
    "analysis": 5,
    "training": 6,
    "evaluation": 6,
    "recipe": 7,
    "report": 7,
    "run": 8,
    "inspection": 9,
    "demo": 9,
    "cli": 10,
}

ONE_ROOM = {"recipe_files": "recipe", "shipped_recipes": "recipe"}
"""Top-level modules that count as one room."""

FILES = sorted(file for file in ROOT.rglob("*.py") if not file.is_relative_to(ROOT / "recipes"))
"""Without the recipes, which import the package as users do."""


def _imports(file: Path) -> list[tuple[int, str]]:
    """Line and room of everything that a file imports from this package."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            names = [node.module or ""]
            if node.module == "qlora_lite":
                names = [f"qlora_lite.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        rooms = [n.split(".")[1] for n in names if n.startswith("qlora_lite.")]
        found += [(node.lineno, ONE_ROOM.get(room, room)) for room in rooms]
    return found


def _room(file: Path) -> str:
    room = file.relative_to(ROOT).parts[0].removesuffix(".py")
    return ONE_ROOM.get(room, room)


def test_every_room_has_a_floor():
    rooms = {_room(file) for file in FILES}
    assert rooms - {"__init__", "__main__"} == set(FLOORS)


def test_imports_go_down_or_stay_in_their_room():
    wrong = []
    for file in FILES:
        room = _room(file)
        if room in ("__init__", "__main__"):
            continue  # they import lazily, from every floor
        for line, other in _imports(file):
            if other != room and FLOORS.get(other, 99) >= FLOORS[room]:
                wrong.append(f"{file.relative_to(ROOT)}:{line}: {room} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_deepspeed_is_imported_only_by_a_run_that_asks_for_it():
    """At the top of one module, which no module imports at its top."""
    for forbidden, allowed in (("deepspeed", {"training/zero_engine.py"}), ("zero_engine", set())):
        found = {
            file.relative_to(ROOT).as_posix()
            for file in FILES
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom) and forbidden in ast.unparse(node)
        }
        assert found == allowed
