"""A recipe file as a command: `python recipes/qwen3_8b.py optim.lr=1e-4`."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_lite.cli.display import Display
from qlora_lite.cli.status import status_of

if TYPE_CHECKING:
    from qlora_lite.recipe import Recipe

Assignments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Override settings of the recipe: optim.lr=1e-4 adapter=rslora base.quant=int8",
        show_default=False,
    ),
]
Extend = Annotated[
    bool,
    typer.Option("--extend", help="Train a finished run longer; raise optim.steps or epochs."),
]


def main(recipe: "Recipe") -> None:
    """Do what `qlora-lite train FILE` does for the file that calls this. Does not return."""

    def train(settings: Assignments = None, extend: Extend = False) -> None:
        """Train this recipe. The same command continues an interrupted run."""
        from qlora_lite.recipe import vary

        train_recipe(*vary(recipe, settings or []), extend)

    sys.exit(status_of(lambda: typer.run(train)))


def train_recipe(recipe: "Recipe", notes: list[str], extend: bool) -> None:
    """Train, and print the notes and the progress."""
    from qlora_lite.run.training import run_recipe

    with Display() as display:
        for note in notes:
            display.note(note)
        result = run_recipe(recipe, extend=extend, watcher=display)
    display.finished(result)
