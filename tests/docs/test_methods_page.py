"""The page that a user chooses a method from: complete, and every command on it is valid."""

import re
import shlex
from pathlib import Path

import pytest

from qlora_lite.demo import BASE, TRAIN
from qlora_lite.methods.catalogue import METHODS
from qlora_lite.recipe import Recipe

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
KINDS = [settings.model_fields["kind"].default for settings in METHODS]
OVERRIDES = [
    line
    for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("adapter")
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_has_a_line_a_section_and_something_to_copy(kind):
    assert f"| [{kind}](#{kind}) |" in PAGE
    section = re.search(
        rf"^## {kind}\n\n    .+?\n\n.+?```\n(.+?)```", PAGE, re.DOTALL | re.MULTILINE
    )
    assert section is not None
    assert kind == "lora" or f"adapter={kind}" in section[1]


def test_the_page_names_no_method_that_is_not_there():
    assert sorted(re.findall(r"^\| \[(\w+)\]", PAGE, re.MULTILINE)) == sorted(KINDS)


@pytest.mark.parametrize(("kind", "rank"), [("xgblora", 1), ("melora", 2)])
def test_methods_that_count_their_rank_otherwise_say_it(kind, rank):
    lines = [line for line in OVERRIDES if f"adapter={kind} " in line]
    assert lines
    assert all(f"adapter.rank={rank} " in f"{line} " for line in lines)


@pytest.mark.parametrize("line", OVERRIDES)
def test_every_override_is_valid(line):
    recipe = Recipe.model_validate(
        {
            "base": {"model": BASE},
            "adapter": {"kind": "lora", "rank": 3, "alpha": 3},
            "data": {"train": TRAIN},
            "output": "runs/x",
        }
    )
    changed = recipe.but(*shlex.split(line))
    assert changed != recipe
