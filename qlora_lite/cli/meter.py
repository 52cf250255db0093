"""Progress from 0 to a total: a bar on a terminal, plain lines in a pipe or a log file."""

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from qlora_lite.foundation.console import visible

MAX_SILENCE = 20.0
"""Seconds after which a plain line is printed in any case."""


class Meter(Protocol):
    """Shows progress. `lines` is about how many plain lines the whole of it may take."""

    def begin(self, what: str, total: int | None, lines: int) -> None: ...

    def move(self, done: int, text: str) -> None: ...

    def end(self) -> None: ...


class Bars:
    """One moving bar, for a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def begin(self, what: str, total: int | None, lines: int) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            console=self.console,
        )
        self._task = self._progress.add_task(what, total=total, text="")
        self._progress.start()

    def move(self, done: int, text: str) -> None:
        if self._progress is not None:
            # escaped here too, so that the width of its column is right
            self._progress.update(self._task, completed=done, text=visible(text))

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Lines:
    """A plain line at even intervals, without control codes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._what = ""
        self._every: int | None = None
        self._next, self._last_line = 0, 0.0

    def begin(self, what: str, total: int | None, lines: int) -> None:
        self._what = what
        self._every = max(1, total // lines) if lines and total else None
        self._next, self._last_line = 0, time.monotonic()

    def move(self, done: int, text: str) -> None:
        now = time.monotonic()
        is_due = self._every is not None and done >= self._next
        if is_due or now - self._last_line > MAX_SILENCE:
            self.console.print(f"{self._what} {text}", markup=False, soft_wrap=True)
            self._last_line = now
            if self._every is not None:
                self._next = (done // self._every + 1) * self._every

    def end(self) -> None:
        pass
