"""The recipes of the project."""

import re
from pathlib import Path

import pytest
import torch

from qlora_lite.demo import BASE
from qlora_lite.foundation.device import DeviceRule, choose
from qlora_lite.foundation.units import parse_bytes
from qlora_lite.recipe_files import load_recipe
from qlora_lite.run.planning import plan_recipe
from tests.cli.workplace import run_command, run_file

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.py"))
BF16 = torch.bfloat16
CUDA = DeviceRule(torch.device("cuda"), BF16, BF16, BF16, BF16, "8bit")
"""A card with bf16; planning does not need to have it."""


@pytest.fixture(params=RECIPES, ids=lambda file: file.stem)
def file(request):
    return request.param


def test_every_promised_model_has_a_recipe():
    names = {file.stem for file in RECIPES}
    assert names >= {"gpt2", "qwen3_0_6b", "qwen3_8b", "llama3_1_8b", "mistral_7b", "demo"}


def test_init_lists_recipes_with_the_first_lines_of_their_docstrings():
    listed = run_command("init", "--list")
    assert listed.status == 0
    for file in RECIPES:
        first = file.read_text(encoding="utf-8").removeprefix('"""').partition("\n")[0]
        assert re.search(rf"^{file.stem} +{re.escape(first)}$", listed.out, re.MULTILINE)


@pytest.mark.parametrize("command", ["plan", "preview", "train"])
def test_commands_find_recipes_by_name(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = run_command(command, "llama3_1_8b", "optim.lrr=1")
    assert wrong.status == 2
    assert "optim.lrr" in wrong.err
    unknown = run_command(command, "llama3_8b")
    assert unknown.status == 2
    assert "mean llama3_1_8b" in unknown.err


def test_plan_of_a_recipe_by_name_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = run_command("plan", "qwen3_8b", "device=cuda")
    assert planned.status == 0
    assert "fits" in planned.out
    assert "22.0 GiB" in planned.out


def test_a_recipe_loads_and_is_at_most_60_lines(file):
    assert load_recipe(file).output.startswith("runs/")
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 60


def test_the_numbers_in_its_docstring_are_those_of_the_planner(file):
    recipe = load_recipe(file)
    if recipe.base.model == BASE and not Path(BASE).is_dir():
        pytest.skip("the embedded base is not built")
    rule = choose("cpu") if recipe.base.model == BASE else CUDA
    docstring = file.read_text(encoding="utf-8").split('"""')[1].replace("\n", " ")
    peak, tokens, smallest, row, flops = re.search(
        r"Needs ([\d.]+ .iB) .* with ([\d,]+) tokens at a time, ([\d.]+ .iB) with one row of "
        r"([\d,]+).* ([\d.]+) GFLOP a token",
        docstring,
    ).groups()
    plan = plan_recipe(recipe, rule)
    one_row = plan_recipe(recipe.but(f"optim.micro_batch_tokens={recipe.data.max_tokens}"), rule)
    assert plan.fits
    assert parse_bytes(peak) == pytest.approx(plan.peak_bytes, rel=0.01)
    assert int(tokens.replace(",", "")) == plan.micro_batch_tokens
    assert parse_bytes(smallest) == pytest.approx(one_row.peak_bytes, rel=0.01)
    assert int(row.replace(",", "")) == recipe.data.max_tokens
    assert float(flops) == pytest.approx(plan.flops_per_token / 1e9, rel=0.01)


def test_running_the_file_is_the_train_command(file, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parent))
    arguments = [
        "base.model=a/folder/that/is/not/there",
        f"output={tmp_path / 'run'}",
        "device=cpu",
    ]
    by_command = run_command("train", file, *arguments)
    assert run_file(file, *arguments) == by_command
    assert by_command.status == 2
    assert "a/folder/that/is/not/there" in by_command.err
