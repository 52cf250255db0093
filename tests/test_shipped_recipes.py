"""Recipes of the package, found by name."""

import json
from pathlib import Path

import pytest

from qlora_lite.data.settings import Data
from qlora_lite.foundation.errors import RecipeError
from qlora_lite.model.settings import Base
from qlora_lite.recipe import Recipe
from qlora_lite.recipe_files import load_recipe
from qlora_lite.shipped_recipes import shipped_recipes, summary

ROOT = Path(__file__).parents[1]


def test_every_recipe_of_the_repository_is_shipped_and_has_a_summary():
    files = shipped_recipes()
    assert files.keys() == {file.stem for file in (ROOT / "recipes").glob("*.py")}
    assert all(summary(file) for file in files.values())


def test_a_summary_is_read_without_running_the_recipe(tmp_path):
    (tmp_path / "mine.py").write_text('"""One.\n\nTwo."""\nraise SystemExit\n')
    (tmp_path / "plain.py").write_text("x = 1\n")
    assert summary(tmp_path / "mine.py") == "One."
    assert summary(tmp_path / "plain.py") == ""


def test_a_shipped_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("qwen3_8b").base.model == "Qwen/Qwen3-8B"  # it builds on qwen3_0_6b
    assert load_recipe("demo").output == "runs/demo"


def test_a_file_or_folder_in_the_working_directory_comes_before_a_shipped_recipe(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(base=Base(model="some/model"), data=Data(train="rows.jsonl"), output="runs/x")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    assert load_recipe("gpt2").base.model == "some/model"
    (tmp_path / "qwen3_8b.py").write_text(
        "from qlora_lite import Base, Data, Recipe\n"
        "recipe = Recipe(base=Base(model='a/b'), data=Data(train='t.jsonl'), output='o')\n"
    )
    assert load_recipe("qwen3_8b").base.model == "a/b"
    (tmp_path / "demo").write_text("")
    with pytest.raises(RecipeError, match=r"demo: a recipe must be a \.py file"):
        load_recipe("demo")


@pytest.mark.parametrize("name", ["lama3_1_8b", "recipes/llama3_1_8b.py", "llama3.1_8b"])
def test_an_unknown_name_is_an_error_with_the_closest_and_all_shipped_names(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"mean llama3_1_8b\?.*one of demo, gpt2, .*init MODEL"):
        load_recipe(name)
