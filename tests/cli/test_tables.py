"""Tables on a narrow terminal and in a pipe."""

import io

from rich.console import Console

from qlora_lite.cli.tables import merge_table, show, time_line
from qlora_lite.report.contents import MergeRow

ROWS = [
    MergeRow("a candidate with a long name that a narrow terminal has to fold", 2.0, None, False),
    MergeRow("merged", 2.00006, 0.9994, True),
]


def printed(is_terminal):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=60, color_system=None)
    show(console, merge_table(ROWS))
    return [line.strip() for line in console.file.getvalue().splitlines() if "2.0" in line]


def test_a_table_in_a_pipe_has_one_line_per_row():
    first, second = printed(is_terminal=False)
    assert first.startswith(ROWS[0].candidate)
    assert first.endswith("2.0000")
    assert second.split() == ["merged", "2.0001", "99.94%", "written"]


def test_a_table_on_a_narrow_terminal_folds_text_and_no_numbers():
    first, second = printed(is_terminal=True)
    assert ROWS[0].candidate not in first
    assert "2.0000" in first
    assert "99.94%" in second


def test_the_time_of_a_run_is_given_only_if_its_steps_are_known():
    by_steps = time_line(1e12, 1e6, 1_000_000, 100)
    assert by_steps.startswith("time: at best 1,000,000 tokens/s here")
    assert "1.0 s per step of 1,000,000 tokens" in by_steps
    assert by_steps.endswith("1 min 40 s in all")
    assert "in all" not in time_line(1e12, 1e6, 1_000_000, None)


def test_a_rate_below_one_token_per_second_is_not_printed_as_none():
    assert "at best 0.25 tokens/s" in time_line(1e12, 4e12, 1024, None)
