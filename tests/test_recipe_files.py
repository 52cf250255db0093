"""Recipes as files: Python, JSON, a run's folder, and the messages about mistakes."""

import json

import pytest

from qlora_lite.data.settings import Data
from qlora_lite.foundation.errors import RecipeError
from qlora_lite.model.settings import Base
from qlora_lite.recipe import Recipe
from qlora_lite.recipe_files import load_recipe, with_absolute_paths

RECIPE = Recipe(base=Base(model="some/model"), data=Data(train="rows.jsonl"), output="runs/x")


def test_the_recipe_json_of_a_run_is_a_recipe(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": RECIPE.to_dict(), "threads": 2}))
    assert load_recipe(tmp_path) == RECIPE.but(f"output={tmp_path}")
    assert load_recipe(tmp_path / "recipe.json") == RECIPE


def test_a_python_recipe_may_import_another_in_its_folder(tmp_path):
    (tmp_path / "small_one.py").write_text(
        "from qlora_lite import Base, Data, Recipe\n"
        "recipe = Recipe(base=Base(model='a/b'), data=Data(train='t.jsonl'), output='o')\n"
    )
    (tmp_path / "large_one.py").write_text(
        "from small_one import recipe as small\nrecipe = small.but('base.model=c/d')\n"
    )
    assert load_recipe(tmp_path / "large_one.py").base.model == "c/d"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recipe = 3\n", r"defines no `recipe = Recipe"),
        ("import no_such_module\n", r"line 1: ModuleNotFoundError"),
        ("x = 1\ny = 1 / 0\n", r"line 2: ZeroDivisionError"),
        ("recipe = Recipe(\n", r"line 1: SyntaxError"),
        (
            "from qlora_lite import LoRA\nrecipe = LoRA(rnk=3)\n",
            r"LoRA\(\.\.\.\): rnk: .*Did you mean 'rank'",
        ),
        ("import sys\nsys.exit(0)\n", r"line 2 ends the program while it is read"),
    ],
)
def test_a_recipe_that_does_not_load_says_where(tmp_path, text, words):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_recipe(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.py", None, "is not a file"),
        ("recipe.yaml", "a: 1", "a .py file or"),
        ("recipe.json", "{", "not readable JSON"),
        ("recipe.json", "[]", "a recipe is an object"),
        ("recipe.json", '{"base": {}}', "a value is needed"),
    ],
)
def test_files_that_are_not_recipes_are_refused(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=words):
        load_recipe(tmp_path / name)


def test_the_line_is_reported_for_a_relative_path_too(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("x = 1\ny = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"mine\.py, line 2: ZeroDivisionError"):
        load_recipe("mine.py")


def test_a_model_or_an_adapter_is_not_a_recipe(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match=f"{tmp_path} is a model.*init {tmp_path}`$"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"describes a model"):
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        load_recipe(tmp_path / "config.json")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"is an adapter.*set adapter\.start=.*adapter in"):
        load_recipe(tmp_path / "adapter")
    with pytest.raises(RecipeError, match=r"gone\.py is not a file"):
        load_recipe(tmp_path / "gone.py")


def test_a_gguf_file_or_its_folder_is_not_a_recipe(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    for path in (file, tmp_path):
        with pytest.raises(RecipeError, match=f"{path} is a model.*init {path}`$"):
            load_recipe(path)


def test_existing_paths_become_absolute_and_hub_ids_stay(tmp_path, monkeypatch):
    names = ("base.model", "data.train", "data.heldout", "data.template", "adapter.start")
    (tmp_path / "here").mkdir()
    for name in names:
        (tmp_path / "here" / name).touch()
    monkeypatch.chdir(tmp_path)
    local = with_absolute_paths(RECIPE.but(*(f"{name}=here/{name}" for name in names)))
    assert local == RECIPE.but(*(f"{name}={tmp_path / 'here' / name}" for name in names))
    hub = RECIPE.but(*(f"{name}=owner/{name}" for name in names))
    assert with_absolute_paths(hub) == hub
    (tmp_path / "chatml").write_text("")
    named = RECIPE.but("data.template=chatml")
    assert with_absolute_paths(named).data.template == "chatml"
