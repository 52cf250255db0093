"""Recipes that `init` writes for any model."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qlora_lite.foundation.errors import BaseModelError, RecipeError
from qlora_lite.memory.known import known_models
from qlora_lite.recipe_files import load_recipe
from qlora_lite.run.initialising import PLACEHOLDER, recipe_text, settings_for, write_recipe
from tests.tiny import save_tiny

KNOWN = [known.models[0] for known in known_models()]


def is_formatted(file, *options):
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--check", *options, str(file)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("model", KNOWN)
def test_a_known_model_needs_no_network_and_its_recipe_loads_and_is_formatted(model, tmp_path):
    file, plan = write_recipe(model, tmp_path / "mine.py")
    recipe = load_recipe(file)
    assert recipe.base.model == model
    assert recipe.data.train == PLACEHOLDER
    assert recipe.adapter.alpha == 2 * recipe.adapter.rank
    assert plan.num_parameters > 1e8
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 45
    assert is_formatted(file)
    assert is_formatted(file, "--line-length=100")


@pytest.mark.parametrize("name", ["it's", 'say "hi"', "back\\slash", "long-" * 20, "ünï cödé"])
def test_any_name_of_a_directory_gives_a_python_file(name, tmp_path):
    base = save_tiny(tmp_path / name, "llama", vocab_size=400)
    file, _ = write_recipe(str(base), tmp_path / "mine.py")
    assert load_recipe(file).base.model == str(base)
    assert is_formatted(file)


def test_rows_are_no_longer_than_the_context(tmp_path):
    text, _ = recipe_text(str(save_tiny(tmp_path / "base", "llama")), Path("x.py"))
    assert "max_tokens=512," in text


def test_larger_models_get_lower_rates_and_no_higher_rank():
    settings = [settings_for(size) for size in (10**8, 8 * 10**9, 70 * 10**9)]
    ranks, rates = zip(*settings, strict=True)
    assert list(rates) == sorted(rates, reverse=True)
    assert list(ranks) == sorted(ranks, reverse=True)


def test_nothing_is_overwritten(tmp_path):
    file, link = tmp_path / "mine.py", tmp_path / "link.py"
    file.write_text("precious", encoding="utf-8")
    link.symlink_to(tmp_path / "nothing.py")
    for taken in (file, link):
        with pytest.raises(RecipeError, match=r"exists already.*--output"):
            write_recipe(KNOWN[0], taken)
    assert link.is_symlink()
    assert file.read_text(encoding="utf-8") == "precious"


def test_a_path_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(BaseModelError):
        write_recipe(str(tmp_path / "nothing"), tmp_path / "mine.py")
    assert not (tmp_path / "mine.py").exists()


def test_a_model_that_lacks_a_tensor_gets_no_recipe(tmp_path, tiny_llama):
    shutil.copytree(tiny_llama, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, weights)
    with pytest.raises(BaseModelError, match=r"layers\.0\.self_attn\.q_proj"):
        write_recipe(str(tmp_path / "cut"), tmp_path / "mine.py")
    assert not (tmp_path / "mine.py").exists()


def test_the_same_call_accepts_its_own_file_and_no_other(tmp_path, tiny_llama):
    file, _ = write_recipe(str(tiny_llama), tmp_path / "mine.py")
    text = file.read_text(encoding="utf-8")
    assert write_recipe(str(tiny_llama), file)[0] == file
    file.write_text(text.replace("rank=32", "rank=8"), encoding="utf-8")
    with pytest.raises(RecipeError, match="exists already"):
        write_recipe(str(tiny_llama), file)
    assert "rank=8" in file.read_text(encoding="utf-8")
