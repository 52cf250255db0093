"""The sparkline, and a closed stdout."""

import io

import pytest

from qlora_lite.foundation.console import Terminal, sparkline


def test_a_sparkline_has_the_lowest_bar_at_the_minimum_and_the_highest_at_the_maximum():
    assert sparkline([0, 7, 3.5, 1]) == "▁█▅▂"
    assert sparkline([2, 2]) == "▁▁"
    assert sparkline([]) == ""


def test_a_long_series_is_averaged_down():
    assert sparkline([0, 0, 7, 7, 0, 14], width=3) == "▁██"


def test_a_closed_stdout_raises_instead_of_exiting():
    class Closed(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Terminal(file=Closed()).print("text")
