"""A conversation in the terminal or through a pipe: each input line is one user turn."""

import sys
from typing import TYPE_CHECKING

from rich.console import Console

from qlora_lite.foundation.console import visible
from qlora_lite.foundation.errors import DataError

if TYPE_CHECKING:
    from qlora_lite.run.chat import ChatSession

HELP = "/reset clears the history, /exit or Ctrl-D ends, /help prints this"


def converse(console: Console, session: "ChatSession") -> None:
    """Answer turn by turn until the input ends."""
    is_person = sys.stdin.isatty()
    if is_person:
        console.print(HELP, style="dim", markup=False)
    while (text := _next_turn(console, is_person)) is not None:
        if text in ("/exit", "/quit"):
            break
        if text == "/reset":
            session.reset()
            console.print("(history cleared)", style="dim")
        elif text == "/help":
            console.print(HELP, style="dim", markup=False)
        elif text:
            try:
                print_answer(console, session, text)
            except DataError as error:  # the prompt is too long; the conversation goes on
                console.print(str(error), style="yellow", markup=False, soft_wrap=True)


def print_answer(console: Console, session: "ChatSession", text: str) -> None:
    """Stream one answer to the console.

    Raises:
        DataError: if the prompt does not fit the context.
    """
    for piece in session.ask(text):
        console.file.write(visible(piece))
        console.file.flush()
    console.print()
    if session.num_dropped:
        console.print(
            f"(the context is full: the oldest {session.num_dropped} turns were dropped)",
            style="dim",
        )


def _next_turn(console: Console, is_person: bool) -> str | None:
    """The next input line; None at the end of the input."""
    try:
        return console.input("[bold cyan]> [/]" if is_person else "").strip()
    except EOFError:
        return None
