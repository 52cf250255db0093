"""A conversation in the terminal, or through a pipe: one line is one turn of the user's."""

import sys
from typing import TYPE_CHECKING

from rich.console import Console

from qlora_lite.foundation.errors import DataError

if TYPE_CHECKING:
    from qlora_lite.run.chat import ChatSession

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, /help says this"


def converse(console: Console, talk: "ChatSession") -> None:
    """Turn by turn until the input ends."""
    is_person = sys.stdin.isatty()
    if is_person:
        console.print(HELP, style="dim", markup=False)
    while (text := _next_turn(console, is_person)) is not None:
        if text in ("/exit", "/quit"):
            break
        if text == "/reset":
            talk.reset()
            console.print("(forgotten)", style="dim")
        elif text == "/help":
            console.print(HELP, style="dim", markup=False)
        elif text:
            try:
                say_answer(console, talk, text)
            except DataError as error:  # a question that does not fit ends no conversation
                console.print(str(error), style="yellow", markup=False, soft_wrap=True)


def say_answer(console: Console, talk: "ChatSession", text: str) -> None:
    """One answer, piece by piece.

    Raises:
        DataError: if the question does not fit.
    """
    for piece in talk.ask(text):
        console.file.write(piece)
        console.file.flush()
    console.print()
    if talk.num_dropped:
        console.print(
            f"(the context is full: the oldest {talk.num_dropped} turns were dropped)", style="dim"
        )


def _next_turn(console: Console, is_person: bool) -> str | None:
    """What the user says next; None at the end."""
    try:
        return console.input("[bold cyan]> [/]" if is_person else "").strip()
    except EOFError:
        return None
