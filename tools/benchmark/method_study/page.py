"""The table, the figures and the findings, between two markers of docs/methods.md."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from method_study import rates
from method_study.budget import HELDOUT_ROWS, TOKENS_PER_STEP, Budget
from method_study.readings import Missing, Readings
from method_study.record import Machine
from method_study.verdict import LEAST, MARGIN, Finding, spoken
from qlora_lite.foundation.files import write_text
from qlora_lite.foundation.units import format_bytes, format_seconds

BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"
TOOL = "tools/benchmark/methods.py"
NOTHING = "–"


def update(page: Path, content: str) -> None:
    """Put `content` between the markers; a page without them gets them at its end."""
    page.parent.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n".lstrip()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    write_text(page, f"{before}{BEGIN}\n{content.strip()}\n{END}{after}")


def introduction(budget: Budget, core_seconds: float, machine: Machine) -> str:
    """What was done, and how long it took."""
    seeds = f"{budget.seeds} seeds" if budget.seeds > 1 else "1 seed"
    return (
        f"Measured by `{TOOL}` in {format_seconds(core_seconds)} of core time (of {machine.cores} "
        "CPU cores, a run on each): the embedded base in NF4, all linear layers, "
        f"{budget.steps} steps of about {TOKENS_PER_STEP:,} tokens, rank 8 or about as much, "
        f"no dropout, {seeds}, at most {HELDOUT_ROWS} held-out rows, drawn by the seed.\n\n"
        "The learning rate is the best of three, each 4 times the one before, around "
        f"{rates.CENTRE:g} ({_exceptions()}), on embedded rows set aside from training; it is "
        "kept for the other data and for runs at other ranks, and where it is the highest or "
        "lowest tried, the best of all may lie beyond. E2E and GSM8K are far from what the "
        "base was trained on and want higher rates than the embedded rows: there the rate "
        "says more than the method, so compare methods of one rate. Losses are of the held-"
        "out rows, mean ± standard deviation over the seeds. Seconds are those of a step "
        "relative to LoRA's, in turns with it on the same batches (the median of the pairs; "
        "LoRA beside itself shows how exact that is). Peak bytes are those of all tensors in "
        "the second step, the base's included and banks still empty. Exported is PEFT's file,"
        " or our own (native) where PEFT has none."
    )


def _exceptions() -> str:
    return ", ".join(f"{kind} {centre:g}" for kind, centre in rates.CENTRES.items())


def table(readings: Readings, methods: Sequence[str], materials: Sequence[str]) -> str:
    """One row a method."""
    losses = [f"loss, {data}" for data in materials]
    heads = ["method", "rate", "trained", "exported", *losses, "seconds", "peak bytes"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for method in methods:
        cells = [method, *_cells(readings, method, materials)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(readings: Readings, method: str, materials: Sequence[str]) -> list[str]:
    losses = [_loss(readings, method, data) for data in materials]
    try:
        run, cost = readings.runs(method, materials[0])[0], readings.cost(method)
    except Missing:
        return [NOTHING, NOTHING, NOTHING, *losses, NOTHING, NOTHING]
    trained = f"{run['trained']:,}"
    if cost["trained_at_a_time"] != run["trained"]:
        trained += f" ({cost['trained_at_a_time']:,} at a time)"
    size = format_bytes(run["exported_bytes"])
    if run["exported"].startswith("native"):
        size += " (native)"
    seconds = f"{statistics.median(cost['ratios']):.2f}"
    peak = format_bytes(cost["rest_bytes"] + cost["peak_bytes"])
    return [_rate(readings, method), trained, size, *losses, seconds, peak]


def _rate(readings: Readings, method: str) -> str:
    rate, tried = readings.rate(method), rates.rates_of(method)
    edges = {tried[0]: " (lowest)", tried[-1]: " (highest)"}
    return f"{rate:g}{edges.get(rate, '')}"


def _loss(readings: Readings, method: str, data: str) -> str:
    if readings.failures(method, data):
        return "stopped"
    try:
        return spoken(readings.losses(method, data))
    except Missing:
        return NOTHING


def stopped(readings: Readings, methods: Sequence[str], materials: Sequence[str]) -> str:
    """Why runs had to stop; empty if all went to the end."""
    lines = [
        f"- {method} on {data}: {failures[0]}"
        for method in methods
        for data in materials
        if (failures := readings.failures(method, data))
    ]
    return "\n".join(["Stopped runs:", "", *lines]) if lines else ""


def claims_table(findings: Sequence[Finding]) -> str:
    """One row a claim and data set."""
    lines = ["| the paper's claim | data | measured | here |", "|---|---|---|---|"]
    for found in findings:
        lines.append(f"| {found.claim} | {found.data} | {found.measured} | {found.verdict} |")
    return "\n".join(lines)


RULE = (
    "Methods are compared seed by seed, on the same rows. A claim shows if the mean difference is "
    "beyond its error (one-sided 95 % of Student's t over the seeds), does not show if it is "
    'beyond it the other way, and is undecided otherwise; "better" is by more than '
    f'{LEAST:g} nats, "as good as" and "no worse" allow {MARGIN:g}. One in twenty claims that '
    "are not true shows by chance. Differences are the "
    "method's loss less the other's, ± their standard deviation. Ranks of claims are 64 where "
    "they are called high, else 8."
)


def pictures(files: Sequence[Path], page: Path) -> str:
    """The figures, by paths relative to the page."""
    return "\n\n".join(
        f"![{file.stem.replace('_', ' ')}]({file.relative_to(page.parent).as_posix()})"
        for file in files
    )
