"""`offload` on the command line, and which combinations are refused."""

import json

import pytest

from qlora_lite.foundation.errors import RecipeError
from qlora_lite.offload.settings import NoOffload, ZeRO3
from tests.end_to_end.small_run import small_recipe


@pytest.fixture
def recipe(tmp_path):
    return small_recipe(tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "run")


def write(folder, config):
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(config))
    return path


def test_nothing_is_divided_unless_asked_for(recipe):
    assert recipe.offload == NoOffload()


def test_a_stage_is_named_with_its_places(recipe):
    changed = recipe.but("offload=zero3", "offload.parameters=cpu", "offload.optimizer=cpu")
    assert changed.offload == ZeRO3(parameters="cpu", optimizer="cpu")
    assert changed.offload.stage == 3


def test_the_stage_of_an_own_file_is_used(recipe, tmp_path):
    path = write(tmp_path, {"zero_optimization": {"stage": 2}})
    offload = recipe.but(f"offload.config={path}").offload
    assert (offload.kind, offload.config) == ("zero2", str(path))


@pytest.mark.parametrize(
    "config", [{}, {"zero_optimization": {}}, {"zero_optimization": {"stage": 0}}, [1], "zero"]
)
def test_an_own_file_without_a_stage_is_refused(recipe, tmp_path, config):
    path = write(tmp_path, config)
    with pytest.raises(RecipeError, match="zero_optimization"):
        recipe.but(f"offload.config={path}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["offload=zero2", "offload.parameters=cpu"], "offload.parameters"),
        (["offload=zero1", "offload.optimizer=nvme"], "offload.optimizer"),
        (["offload=zero3", "offload.parameters=nvme"], "offload.nvme_path"),
        (["offload=zero4"], "zero3"),
        (["offload.config=missing.json"], "missing.json"),
    ],
)
def test_what_a_stage_does_not_have_is_refused(recipe, changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe.but(*changes)


def test_a_config_that_is_not_a_path_is_refused(recipe):
    with pytest.raises(RecipeError, match=r"offload\.config"):
        recipe.but("offload.config=3")
