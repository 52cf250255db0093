"""Printed rows and their trained tokens."""

import io

from rich.console import Console

from qlora_lite.cli.display import Display
from qlora_lite.cli.rows import LONGEST_TEXT, odd_rows, row_text, show_preview, show_row
from qlora_lite.data.load import load_data
from qlora_lite.data.preview import PreviewRow, preview
from qlora_lite.data.settings import Data
from qlora_lite.data.token_display import Piece
from tests.tiny import tiny_tokenizer

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


def test_equal_rows_and_blank_records_are_counted_aloud(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "one\n\n" * 30 + "two\n" * 10)
    data = load_data(Data(train=str(path), heldout_share=0), tiny_tokenizer(), 0)
    console = Console(file=io.StringIO(), width=200)
    show_preview(console, preview(data))
    Display(console).prepared(data)
    text = console.file.getvalue()
    assert text.count("38 of 40 rows (95.0%) are equal to an earlier row") == 2
    assert text.count("30 blank records are skipped") == 2


def test_rows_that_differ_are_not_mentioned(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,n\none,1\n\ntwo,2\n")
    data = load_data(Data(train=str(path), heldout_share=0), tiny_tokenizer(), 0)
    assert odd_rows(data.stats) == []
