"""Plain progress lines: at even intervals, and after a long silence."""

import io

import pytest
from rich.console import Console

from qlora_lite.cli import meter
from qlora_lite.cli.meter import MAX_SILENCE, Lines


@pytest.fixture
def clock(monkeypatch):
    """A settable clock: `clock[0]` is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    return now


def printed(lines):
    return lines.console.file.getvalue().splitlines()


def test_lines_are_printed_at_even_intervals(clock):
    lines = Lines(Console(file=io.StringIO(), width=80))
    lines.begin("training", total=10, lines=2)
    for done in range(11):
        lines.move(done, f"step {done}")
    assert printed(lines) == ["training step 0", "training step 5", "training step 10"]


def test_without_intervals_a_line_is_printed_only_after_a_long_silence(clock):
    lines = Lines(Console(file=io.StringIO(), width=80))
    lines.begin("reading", total=10, lines=0)
    for done in range(11):
        clock[0] += MAX_SILENCE / 4
        lines.move(done, f"{done} bytes")
    assert printed(lines) == ["reading 4 bytes", "reading 9 bytes"]
