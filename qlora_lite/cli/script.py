"""A recipe file as a command: `python recipes/qwen3_8b.py optim.lr=1e-4`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_lite.cli.display import Display
from qlora_lite.cli.several import one_of_several, start_processes, without_local_rank
from qlora_lite.cli.status import status_of
from qlora_lite.foundation.errors import RecipeError
from qlora_lite.foundation.interrupts import interruptible
from qlora_lite.foundation.peer_names import own_name
from qlora_lite.foundation.processes import current, end_process, is_launched_as_other

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


ProcessCount = Annotated[
    int,
    typer.Option(
        "--processes", min=1, help="Train in so many processes on this machine: one for each card."
    ),
]


def main(recipe: "Recipe") -> None:
    """Do what `qlora-lite train FILE` does for the file that calls this. Does not return."""

    def train(
        settings: Assignments = None, extend: Extend = False, processes: ProcessCount = 1
    ) -> None:
        """Train this recipe. The same command continues an interrupted run."""
        from qlora_lite.recipe import vary

        if processes > 1:
            raise typer.Exit(start_processes(processes, [sys.argv[0], *without_count()]))
        train_recipe(*vary(recipe, settings or []), extend)

    def run() -> None:
        sys.argv[1:] = without_local_rank(sys.argv[1:])
        with one_of_several():
            refuse_options_as_settings(["train", *sys.argv[1:]])
            typer.run(train)

    end_process(interruptible(lambda: status_of(run), is_launched_as_other()))


def without_count() -> list[str]:
    """The words of this command without `--processes N`."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word == "--processes":
            next(words, None)
        elif not word.startswith("--processes="):
            kept.append(word)
    return kept


def refuse_options_as_settings(arguments: Sequence[str]) -> None:
    """Refuse `--lr 1e-4` where a recipe is used, and say that it is `optim.lr=1e-4` here.

    Raises:
        RecipeError: for an option that is a setting, here or in another trainer.
    """
    if not arguments or arguments[0] not in ("train", "plan", "preview"):
        return
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, _, value = argument.partition("=")
        own = own_name(option) if option.startswith("--") else None
        if own is not None:
            value = value or ("" if following.startswith("-") else following)
            written = own if "=" in own else f"{own}={value or 'VALUE'}"
            raise RecipeError(
                f"got {option}, and settings are written as key=value. Write {written}"
            )


def train_recipe(recipe: "Recipe", notes: list[str], extend: bool) -> None:
    """Train, and print the notes and the progress."""
    from qlora_lite.run.training import run_recipe

    if not current().is_main:
        run_recipe(recipe, extend=extend)
        return
    with Display() as display:
        for note in notes:
            display.note(note)
        result = run_recipe(recipe, extend=extend, watcher=display)
    display.finished(result)
