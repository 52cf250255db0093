"""A folder with data and a recipe file, and commands that run in this process."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from qlora_lite.cli import main

RECIPE = '''\
"""A run of seconds."""

from qlora_lite import NF4, Base, Data, Evaluation, LoRA, Optim, Recipe, main

recipe = Recipe(
    base=Base(model={base!r}, quant=NF4(), compute="fp32"),
    adapter=LoRA(rank=4, alpha=8),
    data=Data(train={train!r}, max_tokens=128),
    optim=Optim(lr=1e-2, tokens_per_step=512, steps=6),
    evaluation=Evaluation(samples=1),
    output={output!r},
    device="cpu",
)

if __name__ == "__main__":
    main(recipe)
'''


@dataclass(frozen=True)
class Ended:
    """The outcome of a command."""

    status: int
    out: str
    err: str


def run_command(*arguments: object, typed: str = "") -> Ended:
    """`qlora-lite ARGUMENTS` in this process; `typed` is its standard input."""
    return _ended(lambda: main([str(argument) for argument in arguments]), typed)


def run_file(file: Path, *arguments: object) -> Ended:
    """`python FILE ARGUMENTS` in this process."""
    with mock.patch.object(sys, "argv", [str(file), *map(str, arguments)]):
        return _ended(lambda: runpy.run_path(str(file), run_name="__main__"))


def _ended(command: Callable[[], object], typed: str = "") -> Ended:
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "stdin", io.StringIO(typed)),
        pytest.raises(SystemExit) as ended,
    ):
        command()
    assert isinstance(ended.value.code, int)
    return Ended(ended.value.code, out.getvalue(), err.getvalue())


def write_recipe(folder: Path, base: Path) -> Path:
    """A recipe file and its data in `folder`."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is seven times {i}?"},
                {"role": "assistant", "content": f"It is {7 * i}."},
            ]
        }
        for i in range(80)
    ]
    data = folder / "train.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    recipe = folder / "recipe.py"
    text = RECIPE.format(base=str(base), train=str(data), output=str(folder / "run"))
    recipe.write_text(text, encoding="utf-8")
    return recipe


def start_process(*arguments: object) -> subprocess.Popen[str]:
    """Python in a subprocess, with unbuffered output and one thread."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )
