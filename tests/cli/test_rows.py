"""Printed rows and their trained tokens."""

import io

from rich.console import Console

from qlora_lite.cli.rows import LONGEST_TEXT, row_text, show_row
from qlora_lite.data.preview import PreviewRow
from qlora_lite.data.token_display import Piece

PIECES = [Piece("ask ", False), Piece("an", True), Piece("swer", True), Piece(" [/b]", False)]


def test_without_colours_trained_spans_are_in_brackets():
    assert row_text(PIECES, has_colour=False).plain == "ask [[answer]] [/b]"


def test_with_colours_the_text_is_unchanged_and_trained_tokens_are_styled():
    text = row_text(PIECES, has_colour=True)
    assert text.plain == "ask answer [/b]"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert "green" in styles["an"]
    assert "green" not in styles["ask "]


def test_a_long_row_is_cut_and_ends_in_dots():
    text = row_text([Piece("x" * (LONGEST_TEXT + 5), False)], has_colour=False).plain
    assert text == "x" * LONGEST_TEXT + " ..."


def test_a_row_is_printed_below_its_source_and_counts():
    console = Console(file=io.StringIO(), width=20)
    show_row(console, PreviewRow("[a].jsonl, line 3", PIECES, 4, 2))
    first, second = console.file.getvalue().splitlines()
    assert first == "[a].jsonl, line 3: 4 tokens, 2 of them trained"
    assert second == "ask [[answer]] [/b]"
