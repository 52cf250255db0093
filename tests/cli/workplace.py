"""A workplace of data and a recipe file, and the commands run in this process."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

from qlora_lite.cli import main

RECIPE = '''\
"""A run of seconds."""

from qlora_lite import NF4, Base, Data, LoRA, Optim, Recipe, main

recipe = Recipe(
    base=Base(model={base!r}, quant=NF4()),
    adapter=LoRA(rank=4, alpha=8),
    data=Data(train={train!r}, max_tokens=128),
    optim=Optim(lr=1e-2, tokens_per_step=512, steps=6),
    output={output!r},
    device="cpu",
)

if __name__ == "__main__":
    main(recipe)
'''


@dataclass(frozen=True)
class Ended:
    """A command that came to its end."""

    status: int
    out: str
    err: str


def run_command(*arguments: object) -> Ended:
    """`qlora-lite ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = ended.code
    assert isinstance(status, int)
    return Ended(status, out.getvalue(), err.getvalue())


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
