"""What `import qlora_lite` and `qlora-lite --help` promise."""

import subprocess
import sys
import time

import pytest

import qlora_lite
from qlora_lite.recipe_files import load_recipe
from tests.cli.workplace import run_command

HELP = """
import sys
from qlora_lite.cli import main
try:
    main(["--help"])
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def test_help_lists_every_command_within_a_second_and_without_importing_torch():
    seconds = []
    while not seconds or (min(seconds) > 1 and len(seconds) < 5):  # repeat on a busy machine
        start = time.perf_counter()
        ended = subprocess.run(
            [sys.executable, "-c", HELP], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1
    assert ended.stderr.strip() == "False"
    for command in ("init", "plan", "preview", "train", "merge", "eval", "chat", "demo"):
        assert f" {command} " in ended.stdout


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, qlora_lite; print({'torch', 'pydantic', 'rich', 'typer'} & {*sys.modules})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"


@pytest.mark.parametrize("name", sorted(set(qlora_lite.__all__) - {"__version__"}))
def test_every_public_name_can_be_imported(name):
    value = getattr(qlora_lite, name)
    assert value.__module__.startswith("qlora_lite.")
    assert name in dir(qlora_lite)


def test_the_version_is_that_of_the_installed_package():
    assert run_command("--version").out.strip() == qlora_lite.__version__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="LoRAX"):
        _ = qlora_lite.LoRAX


def test_the_functions_print_nothing_and_return_values(trained, capfd):
    recipe = load_recipe(trained.recipe)
    plan = qlora_lite.plan(recipe)
    result = qlora_lite.train(recipe)
    model, tokenizer = qlora_lite.load(trained.run)
    prompt = tokenizer("What is seven times 3?", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=4)
    assert plan.fits
    assert result.already_finished
    assert output.shape[1] > prompt.input_ids.shape[1]
    assert not model.training
    assert capfd.readouterr().out == ""
