"""The watcher of the commands: prints the stages of a run, and its progress through a `Meter`."""

import time
from typing import Any

from rich.console import Console
from rich.text import Text

from qlora_lite.cli.meter import Bars, Lines, Meter
from qlora_lite.cli.rows import odd_rows, show_row
from qlora_lite.cli.tables import merge_table, plan_lines, plan_table, show
from qlora_lite.foundation.console import console as default_console
from qlora_lite.foundation.console import sparkline
from qlora_lite.foundation.units import format_bytes, format_count, format_seconds
from qlora_lite.foundation.watcher import Watcher

TRAINING_LINES = 20
"""About how many plain lines a training run prints."""


class Display(Watcher):
    """Prints what a run reports. Use it in a `with` block: an error then stops the bar."""

    def __init__(self, console: Console = default_console) -> None:
        self.console = console
        self.meter: Meter = Bars(console) if console.is_terminal else Lines(console)
        self._losses: list[float] = []
        self._loading = False
        self._reading_since: float | None = None
        self._start = (0.0, 0)
        """Clock and step at which this process started to train."""
        self._total = 0

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *error: object) -> None:
        self.meter.end()

    def note(self, text: str) -> None:
        self.print_line(text)

    def print_line(self, text: str, style: str = "") -> None:
        """Print one line of plain text. Do not wrap it when stdout is not a terminal."""
        # a style passed to print() would also colour the bar below
        self.console.print(Text(text, style), soft_wrap=not self.console.is_terminal)

    def planned(self, plan: Any) -> None:
        show(self.console, plan_table(plan))
        for line in plan_lines(plan):
            self.print_line(line)

    def prepared(self, data: Any) -> None:
        from qlora_lite.data.preview import preview_row

        stats, train = data.stats, data.train
        self.print_line(
            f"{len(train):,} rows to train on, {len(data.heldout):,} held out: "
            f"{format_count(train.num_tokens)} tokens, {train.num_targets / train.num_tokens:.0%} "
            f"of them trained; lengths p50 {stats.p50}, p95 {stats.p95}, max {stats.longest}"
        )
        if lost := lost_rows(stats):
            self.print_line(lost, style="yellow")
        for line in odd_rows(stats):
            self.print_line(line, style="yellow")
        show_row(self.console, preview_row(train[0], data.train_source, data.template.tokenizer))

    def reading(self, done_rows: int, total_rows: int | None) -> None:
        now = time.monotonic()
        if self._reading_since is None:
            self.meter.begin("reading rows", None, lines=0)
            self._reading_since = now
        rate = done_rows / max(now - self._reading_since, 1e-3)
        self.meter.move(done_rows, f"{done_rows:,} rows  {rate:,.0f} rows/s")
        if total_rows is not None:
            self.meter.end()
            self._reading_since = None

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
            self.print_line(f"resuming after step {step:,}")
        self._start, self._total = (time.monotonic(), step), total
        self.meter.begin("training", total, TRAINING_LINES)

    def stepped(self, metrics: dict[str, Any]) -> None:
        self._losses.append(metrics["loss"])
        step = metrics["step"]
        start, first = self._start
        left = (time.monotonic() - start) / (step - first) * (self._total - step)
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
        self.print_line(f"after step {metrics['step']:,}: {scores}", style="cyan")

    def ended(self) -> None:
        self.meter.end()

    def finished(self, result: Any) -> None:
        """Scores, measured memory against the plan, and where the results are."""
        if result.already_finished:
            self.print_line(f"{result.directory} is finished after {result.steps:,} steps")
        if result.scores:
            before, after = result.scores["loss_before"], result.scores["loss"]
            self.print_line(
                f"held-out loss {before:.3f} (at the start) -> {after:.3f}", style="bold"
            )
        share = result.peak_bytes / result.predicted_peak_bytes - 1
        self.print_line(
            f"peak memory {format_bytes(result.peak_bytes)} measured, "
            f"{format_bytes(result.predicted_peak_bytes)} predicted ({share:+.0%})"
        )
        self.print_line(f"adapter: {result.directory / 'adapter'}")
        self.print_line(f"report:  {result.directory / 'report.html'}")

    def merged(self, result: Any) -> None:
        """What a merge wrote, and the candidates it chose from."""
        if result.already_finished:
            self.print_line(f"{result.out} was written before, and its files are intact")
        if result.table:
            show(self.console, merge_table(result.table))
        dtype = str(result.dtype).removeprefix("torch.")
        base = "the base as trained" if result.base == "trained" else "the original base"
        size = format_bytes(result.num_bytes)
        self.print_line(f"{result.out}: {size} in {dtype}, merged on {base}", style="bold")


def lost_rows(stats: Any) -> str:
    """How many rows were too long, and what was done with them; empty if there were none."""
    counts = {
        "dropped": stats.dropped_rows,
        "split": stats.split_rows,
        "cut": stats.truncated_rows,
    }
    parts = [f"{count:,} {what}" for what, count in counts.items() if count]
    if not parts:
        return ""
    return (
        f"rows longer than data.max_tokens: {', '.join(parts)} ({stats.lost_share:.1%} of tokens)"
    )
