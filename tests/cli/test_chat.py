"""A conversation through a pipe."""

import io
import sys

from rich.console import Console

from qlora_lite.cli.chat import converse
from qlora_lite.foundation.errors import DataError


class Session:
    """Repeats the prompt; refuses one that is too long."""

    num_dropped = 0

    def ask(self, text):
        if text == "long":
            raise DataError("the prompt is too long")
        yield from (text.upper(), "!")
        self.num_dropped = 3 if text == "many" else 0

    def reset(self):
        pass


def output_of(monkeypatch, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    console = Console(file=io.StringIO(), width=120)
    converse(console, Session())
    return console.file.getvalue().splitlines()


def test_a_prompt_that_is_too_long_does_not_end_the_conversation(monkeypatch):
    assert output_of(monkeypatch, "a", "long", "b") == ["A!", "the prompt is too long", "B!"]


def test_dropped_turns_are_reported(monkeypatch):
    answer, note = output_of(monkeypatch, "many")
    assert answer == "MANY!"
    assert "the oldest 3 turns were dropped" in note


def test_empty_lines_are_skipped_and_exit_ends(monkeypatch):
    assert output_of(monkeypatch, "", "a", "/exit", "b") == ["A!"]
