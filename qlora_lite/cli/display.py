"""A run as it goes: bars on a terminal, plain lines anywhere else.

What is said once (device, plan, a training row, scores) is printed; what moves goes to a `Meter`.
"""

import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from qlora_lite.cli.rows import show_row
from qlora_lite.cli.tables import merge_table, plan_lines, plan_table, show
from qlora_lite.foundation.console import console as default_console
from qlora_lite.foundation.console import sparkline
from qlora_lite.foundation.units import format_bytes, format_count, format_seconds
from qlora_lite.foundation.watch import Watcher

LINES = 20
"""About so many plain lines show a training run."""
PATIENCE = 20.0
"""Seconds after which a plain line is due in any case."""


class Meter(Protocol):
    """Shows something that goes from 0 to a total; `lines` is how many plain ones it is worth."""

    def begin(self, what: str, total: int, lines: int) -> None: ...

    def move(self, done: int, text: str) -> None: ...

    def end(self) -> None: ...


class Bars:
    """One bar that moves, on a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def begin(self, what: str, total: int, lines: int) -> None:
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
            self._progress.update(self._task, completed=done, text=text)

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Lines:
    """A line now and then, without control codes: for a pipe or a log file."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._what = ""
        self._every: int | None = None
        self._next, self._last_line = 0, 0.0

    def begin(self, what: str, total: int, lines: int) -> None:
        self._what = what
        self._every = max(1, total // lines) if lines else None
        self._next, self._last_line = 0, time.monotonic()

    def move(self, done: int, text: str) -> None:
        now = time.monotonic()
        is_due = self._every is not None and done >= self._next
        if is_due or now - self._last_line > PATIENCE:
            self.console.print(f"{self._what} {text}", markup=False, soft_wrap=True)
            self._last_line = now
            if self._every is not None:
                self._next = (done // self._every + 1) * self._every

    def end(self) -> None:
        pass


class Display(Watcher):
    """Shows a run to a person. Use it as a context, so that no bar outlives an error."""

    def __init__(self, console: Console = default_console) -> None:
        self.console = console
        self.meter: Meter = Bars(console) if console.is_terminal else Lines(console)
        self._losses: list[float] = []
        self._loading = False
        self._began = (0.0, 0)
        self._total = 0

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *error: object) -> None:
        self.meter.end()

    def note(self, text: str) -> None:
        self.say(text)

    def say(self, text: str, style: str = "") -> None:
        """A line of plain text, not wrapped where nobody's terminal asks for it."""
        # styled as text of its own: a style of the print would colour the bar below it too
        self.console.print(Text(text, style), soft_wrap=not self.console.is_terminal)

    def planned(self, plan: Any) -> None:
        show(self.console, plan_table(plan))
        for line in plan_lines(plan):
            self.say(line)

    def prepared(self, data: Any) -> None:
        from qlora_lite.data.preview import preview_row

        stats, train = data.stats, data.train
        self.say(
            f"{len(train):,} rows to train on, {len(data.heldout):,} held out: "
            f"{format_count(train.num_tokens)} tokens, {train.num_targets / train.num_tokens:.0%} "
            f"of them trained; lengths p50 {stats.p50}, p95 {stats.p95}, max {stats.longest}"
        )
        if lost := lost_rows(stats):
            self.say(lost, style="yellow")
        show_row(self.console, preview_row(train[0], data.train_source, data.template.tokenizer))

    def loading(self, done_bytes: int, total_bytes: int) -> None:
        self._bytes("reading the base", done_bytes, total_bytes)

    def writing(self, done_bytes: int, total_bytes: int) -> None:
        self._bytes("writing weights", done_bytes, total_bytes)

    def _bytes(self, what: str, done: int, total: int) -> None:
        if not self._loading:
            self.meter.begin(what, total, lines=0)
            self._loading = True
        self.meter.move(done, f"{format_bytes(done)} of {format_bytes(total)}")
        if done >= total:
            self.meter.end()
            self._loading = False

    def started(self, step: int, total: int) -> None:
        if step:
            self.say(f"going on after step {step:,}")
        self._began, self._total = (time.monotonic(), step), total
        self.meter.begin("training", total, LINES)

    def stepped(self, metrics: dict[str, Any]) -> None:
        self._losses.append(metrics["loss"])
        step = metrics["step"]
        began, first = self._began
        left = (time.monotonic() - began) / (step - first) * (self._total - step)
        parts = [
            f"step {step:,}/{self._total:,}",
            f"loss {metrics['loss']:.3f}",
            sparkline(self._losses, 16),
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
            format_bytes(metrics["peak_bytes"]),
            f"{format_seconds(left)} left",
        ]
        self.meter.move(step, "  ".join(parts))

    def evaluated(self, metrics: dict[str, Any]) -> None:
        scores = f"held-out loss {metrics['heldout_loss']:.3f}"
        if "heldout_accuracy" in metrics:
            scores += f", accuracy {metrics['heldout_accuracy']:.1%}"
        self.say(f"after step {metrics['step']:,}: {scores}", style="cyan")

    def ended(self) -> None:
        self.meter.end()

    def finished(self, result: Any) -> None:
        """What a run came to: scores, memory against the plan, and where it is."""
        if result.already_finished:
            self.say(f"{result.directory} is finished after {result.steps:,} steps")
        if result.scores:
            before, after = result.scores["loss_before"], result.scores["loss"]
            self.say(f"held-out loss {before:.3f} (at the start) -> {after:.3f}", style="bold")
        share = result.peak_bytes / result.predicted_peak_bytes - 1
        self.say(
            f"peak memory {format_bytes(result.peak_bytes)} measured, "
            f"{format_bytes(result.predicted_peak_bytes)} predicted ({share:+.0%})"
        )
        self.say(f"adapter: {result.directory / 'adapter'}")
        self.say(f"report:  {result.directory / 'report.html'}")

    def merged(self, result: Any) -> None:
        """What a merge wrote, and the candidates that it chose from."""
        if result.table:
            show(self.console, merge_table(result.table))
        dtype = str(result.dtype).removeprefix("torch.")
        base = "the base as trained" if result.base == "trained" else "the original base"
        size = format_bytes(result.num_bytes)
        self.say(f"{result.out}: {size} in {dtype}, merged on {base}", style="bold")


def lost_rows(stats: Any) -> str:
    """What became of rows that were too long; nothing if none was."""
    counts = {
        "dropped": stats.dropped_rows,
        "split": stats.split_rows,
        "cut": stats.truncated_rows,
    }
    told = [f"{count:,} {what}" for what, count in counts.items() if count]
    if not told:
        return ""
    return f"rows longer than data.max_tokens: {', '.join(told)} ({stats.lost_share:.1%} of tokens)"
