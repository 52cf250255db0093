"""What a run prints on a terminal and through a pipe."""

import io

import pytest
from rich.console import Console

from qlora_lite.cli.display import TRAINING_LINES, Display


def console(is_terminal):
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=120, highlight=False)


def train_with(display, steps, first=0):
    """Report a run of so many steps to the display; return what it printed."""
    display.started(first, steps)
    for step in range(first + 1, steps + 1):
        display.stepped(
            {"step": step, "loss": 5 - step / steps, "tokens_per_second": 1234.5, "peak_bytes": 2e9}
        )
    display.ended()
    return display.console.file.getvalue()


def test_a_pipe_gets_lines_at_even_intervals_without_control_codes():
    text = train_with(Display(console(is_terminal=False)), 1000)
    lines = text.splitlines()
    assert len(lines) == TRAINING_LINES + 1
    assert lines[0].startswith("training step 1/1,000  loss 4.999  ")
    assert "1,234 tokens/s  1.86 GiB" in lines[0]
    assert lines[-1].startswith("training step 1,000/1,000")
    assert lines[-1].endswith("0.0 s left")
    assert "\x1b" not in text
    assert "\r" not in text


@pytest.mark.parametrize("steps", [1, 7])
def test_a_short_run_prints_one_line_per_step(steps):
    text = train_with(Display(console(is_terminal=False)), steps)
    assert len(text.splitlines()) == steps


def test_a_terminal_shows_one_moving_bar():
    text = train_with(Display(console(is_terminal=True)), 100)
    assert "\x1b[" in text
    assert "100/100" in text
    assert text.count("\n") < 5


def test_a_resumed_run_prints_its_first_step():
    text = train_with(Display(console(is_terminal=False)), 30, first=20)
    assert text.splitlines()[0] == "resuming after step 20"


def test_an_error_stops_the_bar():
    screen = console(is_terminal=True)
    with pytest.raises(ValueError, match="stop"), Display(screen) as display:
        display.loading(1, 100)
        raise ValueError("stop")
    assert not screen._live_stack


def test_notes_are_printed_as_text_and_not_as_markup():
    display = Display(console(is_terminal=False))
    display.note("rows[/x] [bold]" + "x" * 200)
    assert display.console.file.getvalue() == "rows[/x] [bold]" + "x" * 200 + "\n"


def test_reading_shows_rows_and_their_rate():
    for has_terminal in (False, True):
        out = console(has_terminal)
        with Display(out) as display:
            for done, total in ((0, None), (3000, None), (4000, 4000), (0, None), (7, 7)):
                display.reading(done, total)
        text = out.file.getvalue()
        assert ("4,000 rows  " in text) == ("rows/s" in text) == has_terminal


def test_reading_for_long_prints_lines_in_a_pipe(monkeypatch):
    monkeypatch.setattr("qlora_lite.cli.meter.MAX_SILENCE", 0.0)
    out = console(False)
    display = Display(out)
    display.reading(3000, None)
    display.reading(4000, 4000)
    assert "reading rows 3,000 rows  " in out.file.getvalue()
