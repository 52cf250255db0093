"""Plans, scores and merges as tables."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_lite.foundation.console import Terminal
from qlora_lite.foundation.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from qlora_lite.memory.plan import Plan
    from qlora_lite.report.contents import MergeRow
    from qlora_lite.run.scoring import ScoreRow
    from qlora_lite.run.stages import Stage

PIPE_WIDTH = 200
"""Width of a table when stdout is not a terminal."""


def show(console: Console, table: Table) -> None:
    """Print a table. Do not fold cells when stdout is not a terminal."""
    if not console.is_terminal:
        console = Terminal(file=console.file, width=PIPE_WIDTH, color_system=None)
    console.print(table)


def plan_table(plan: "Plan") -> Table:
    """The rows of the plan with their formulas, and the peak as footer."""
    table = _table("memory", ">bytes", "formula", show_footer=True)
    for name, num_bytes, formula in plan.rows():
        table.add_row(name, format_bytes(num_bytes), formula)
    colour = "green" if plan.fits else "red"
    table.columns[0].footer = "peak"
    table.columns[1].footer = format_bytes(plan.peak_bytes)
    table.columns[2].footer = f"[{colour}]{plan.verdict}[/]"
    return table


def plan_lines(plan: "Plan") -> list[str]:
    """The rest of a plan: parameter counts, host memory, and settings that save memory."""
    lines = [
        f"{format_count(plan.num_trained)} parameters trained, on a base of "
        f"{format_count(plan.num_parameters)}; micro-batches of "
        f"{plan.micro_batch_tokens:,} tokens, {format_count(plan.flops_per_token)}FLOP per token",
    ]
    if plan.ledger.host_bytes:
        lines.append(f"host memory: {format_bytes(plan.ledger.host_bytes)}")
    if plan.ledger.disk_bytes:
        lines.append(f"disk: {format_bytes(plan.ledger.disk_bytes)}")
    if plan.savings:
        ways = [f"  {way.setting}  -{format_bytes(way.saved_bytes)}" for way in plan.savings]
        lines += ["settings that save memory, each on its own:", *ways]
    if plan.sufficient_settings:
        lines.append(f"fits with: {' '.join(plan.sufficient_settings)}")
    return lines


def stage_table(stages: Sequence["Stage"]) -> Table:
    """One line per ZeRO stage: what a card and the host need."""
    table = _table("setting", ">per card", ">per host", "")
    for stage in stages:
        if stage.plan is None:
            table.add_row(stage.setting, "", "", Text(stage.problem))
            continue
        card = format_bytes(stage.card_bytes) if stage.card_bytes else "-"
        verdict = "[green]fits[/]" if stage.fits else "[red]does not fit[/]"
        table.add_row(stage.setting, card, format_bytes(stage.host_bytes), verdict)
    return table


def stage_line(stage: "Stage | None", num_processes: int) -> str:
    """The recommended stage."""
    where = f"{num_processes} process{'es' if num_processes > 1 else ''}"
    if stage is None:
        return f"no stage fits in {where}. Use more processes, or the settings above"
    return f"recommended for {where}: {stage.setting}"


def time_line(
    flops_per_second: float, flops_per_token: float, step_tokens: int, steps: int | None
) -> str:
    """Lower bound of the training time: matrix products alone, at the measured rate."""
    rate = flops_per_second / flops_per_token
    step = step_tokens / rate
    line = (
        f"time: at best {rate:,.{0 if rate >= 10 else 2}f} tokens/s here (matrix products measured "
        f"at {flops_per_second / 1e12:.3g} TFLOP/s), {format_seconds(step)} per step of "
        f"{step_tokens:,} tokens"
    )
    return line + (f", {format_seconds(step * steps)} in all" if steps else "")


def score_table(rows: Iterable["ScoreRow"]) -> Table:
    """One line per model."""
    table = _table("model", "", ">loss", ">perplexity", ">accuracy", ">tokens")
    for row in rows:
        score = row.score
        table.add_row(
            Text(row.target),
            row.what,
            f"{score.loss:.4f}",
            f"{score.perplexity:.2f}",
            f"{score.accuracy:.2%}",
            f"{score.num_targets:,}",
        )
    return table


def merge_table(rows: Sequence["MergeRow"]) -> Table:
    """Merge candidates, scored on the held-out rows."""
    table = _table("candidate", ">held-out loss", ">top-1 agreement with the adapter", "")
    for row in rows:
        agreement = "" if row.agreement is None else f"{row.agreement:.2%}"
        written = "written" if row.written else ""
        table.add_row(row.candidate, f"{row.loss:.4f}", agreement, written)
    return table


def _table(*columns: str, show_footer: bool = False) -> Table:
    """A plain table; a heading that starts with > marks a right-aligned column of numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=show_footer, pad_edge=False)
    for column in columns:
        is_number = column.startswith(">")
        table.add_column(
            column.removeprefix(">"),
            justify="right" if is_number else "left",
            no_wrap=is_number,
            overflow="fold",
        )
    return table
