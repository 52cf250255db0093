"""A tiny base, a recipe that has not run, and one that has."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.workplace import Ended, run_command, write_recipe
from tests.tiny import save_tiny


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A Llama in fp32. Do not write into it."""
    return save_tiny(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture
def recipe(tmp_path, tiny_base):
    """A recipe that has not run."""
    return write_recipe(tmp_path, tiny_base)


@dataclass(frozen=True)
class Trained:
    """A finished run, and the outcome of the command that trained it."""

    recipe: Path
    run: Path
    ended: Ended


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_base):
    """Trained once. Do not write into it."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, tiny_base)
    ended = run_command("train", recipe)
    assert ended.status == 0, ended.err
    return Trained(recipe, folder / "run", ended)
