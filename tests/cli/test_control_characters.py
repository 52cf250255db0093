"""Whatever rows, files, models and settings contain, no terminal obeys it."""

import io
import json
import re
import sys

import pytest
from rich.table import Table

from qlora_lite.cli import status
from qlora_lite.cli.chat import converse, print_answer
from qlora_lite.cli.display import Display
from qlora_lite.cli.meter import Bars, Lines
from qlora_lite.cli.rows import show_row
from qlora_lite.cli.tables import show
from qlora_lite.data.load import load_data
from qlora_lite.data.preview import PreviewRow, preview
from qlora_lite.data.settings import Data
from qlora_lite.data.token_display import Piece
from qlora_lite.foundation.console import Terminal
from qlora_lite.foundation.errors import DataError, Interrupted
from tests.tiny import tiny_tokenizer

EVIL = "a\x1b]0;title\x07\x1b[2Jb\x9b31mc\rd\x08e\u202ef\x7fg"
SHOWN = r"a\x1b]0;title\x07\x1b[2Jb\x9b31mc\x0dd\x08e\u202ef\x7fg"
RAW = set(EVIL) - set(SHOWN)


class Session:
    num_dropped = 0

    def ask(self, text):
        if text == "long":
            raise DataError(EVIL)
        yield from EVIL


def row(console):
    show_row(console, PreviewRow(EVIL, [Piece(EVIL, True), Piece(EVIL, False)], 2, 1))


def table(console):
    rows = Table("name")
    rows.add_row(EVIL)
    show(console, rows)


def bars(console):
    meter = Bars(console)
    meter.begin("training", 2, 2)
    meter.move(1, EVIL)
    meter.end()


def lines(console):
    meter = Lines(console)
    meter.begin("training", 2, 2)
    meter.move(1, EVIL)


def refused_question(console):
    sys.stdin = io.StringIO("long\n")
    converse(console, Session())


PRINTERS = {
    "row": row,
    "table": table,
    "bars": bars,
    "lines": lines,
    "note": lambda console: Display(console).note(EVIL),
    "answer": lambda console: print_answer(console, Session(), "hi"),
    "refused question": refused_question,
    "text": lambda console: console.print(EVIL),
}


@pytest.mark.parametrize("printer", PRINTERS.values(), ids=PRINTERS)
@pytest.mark.parametrize("colour", [None, "truecolor"])
def test_control_characters_are_shown_as_escapes(monkeypatch, printer, colour):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    console = Terminal(file=io.StringIO(), width=300, color_system=colour, highlight=False)
    printer(console)
    text = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue())  # colours
    assert not RAW & set(text)
    assert r"\x1b]0;title" in text
    assert r"\x1b[2Jb\x9b31mc" in text


@pytest.mark.parametrize(
    "error", [DataError(EVIL), Interrupted(EVIL), OSError(13, "no", EVIL), ZeroDivisionError(EVIL)]
)
def test_errors_show_control_characters_as_escapes(monkeypatch, capsys, error):
    def fail():
        raise error

    console = Terminal(file=io.StringIO(), width=300)
    monkeypatch.setattr(status, "errors", console)
    monkeypatch.setattr(status, "prepare_process", lambda: None)
    monkeypatch.setattr(status, "report", sys.stderr.write)
    monkeypatch.setattr(status, "is_ending", lambda: False)
    status.status_of(fail)
    text = console.file.getvalue() + capsys.readouterr().err
    assert SHOWN in text
    assert not RAW & set(text)


def test_the_texts_of_rows_are_unchanged_and_only_shown_with_escapes(tmp_path):
    from qlora_lite.cli.rows import show_preview

    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": EVIL, "completion": EVIL}) + "\n")
    tokenizer = tiny_tokenizer()
    data = load_data(Data(train=str(path), heldout_share=0), tokenizer, 0)
    assert EVIL in tokenizer.decode(data.train.ids.tolist())
    console = Terminal(file=io.StringIO(), width=300)
    show_preview(console, preview(data))
    text = console.file.getvalue()
    assert SHOWN in text
    assert not RAW & set(text)
