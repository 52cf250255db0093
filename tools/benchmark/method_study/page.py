"""The table, the figures and the findings, between two markers of docs/methods.md."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from method_study import rates
from method_study.budget import HELDOUT_ROWS, TOKENS_PER_STEP, Budget
from method_study.readings import Missing, Readings
from method_study.record import Machine
from method_study.verdict import MARGIN, MIN_DIFFERENCE, Finding, mean_and_spread
from qlora_lite.foundation.files import write_text
from qlora_lite.foundation.units import format_bytes, format_seconds

BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"
TOOL = "tools/benchmark/methods.py"
EMPTY = "–"


def update(page: Path, content: str) -> None:
    """Put `content` between the markers, which are appended to a page without them."""
    page.parent.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n".lstrip()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    write_text(page, f"{before}{BEGIN}\n{content.strip()}\n{END}{after}")


def introduction(budget: Budget, core_seconds: float, machine: Machine) -> str:
    """What was measured, and how long it took."""
    seeds = f"{budget.seeds} seeds" if budget.seeds > 1 else "1 seed"
    return (
        f"Measured by `{TOOL}` in {format_seconds(core_seconds)} of core time (on {machine.cores} "
        "CPU cores, one run per core): the embedded base in NF4, all linear layers, "
        f"{budget.steps} steps of about {TOKENS_PER_STEP:,} tokens, rank 8 or about the same "
        f"size, no dropout, {seeds}, at most {HELDOUT_ROWS} held-out rows, chosen by the seed.\n\n"
        "The learning rate is the best of three, a factor of 4 apart, around "
        f"{rates.CENTRE:g} ({_exceptions()}), on embedded rows set aside from training. It is "
        "also used for the other data and for runs at other ranks. Where it is the highest or "
        "lowest of the three, a better one may lie beyond. E2E and GSM8K are far from the "
        "pretraining data of the base and need higher rates than the embedded rows: there the "
        "loss depends more on the rate than on the method, so compare methods with equal rates. "
        "Losses are of the held-out rows, mean ± standard deviation over the seeds. Seconds are "
        "per step, relative to LoRA on the same batches (median over alternating pairs; the row "
        "of LoRA shows the error of this measurement). Peak bytes are of all tensors in the "
        "second step, including the base, with empty banks. Exported is the file of PEFT, or our "
        "own (native) if PEFT has no such format."
    )


def _exceptions() -> str:
    return ", ".join(f"{kind} {centre:g}" for kind, centre in rates.CENTRES.items())


def table(readings: Readings, methods: Sequence[str], materials: Sequence[str]) -> str:
    """One row per method."""
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
        return [EMPTY, EMPTY, EMPTY, *losses, EMPTY, EMPTY]
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
        return mean_and_spread(readings.losses(method, data))
    except Missing:
        return EMPTY


def stopped(readings: Readings, methods: Sequence[str], materials: Sequence[str]) -> str:
    """Why runs stopped; empty if all finished."""
    lines = [
        f"- {method} on {data}: {failures[0]}"
        for method in methods
        for data in materials
        if (failures := readings.failures(method, data))
    ]
    return "\n".join(["Stopped runs:", "", *lines]) if lines else ""


def claims_table(findings: Sequence[Finding]) -> str:
    """One row per claim and data set."""
    lines = ["| claim of the paper | data | measured | here |", "|---|---|---|---|"]
    for found in findings:
        verdict = f"{found.verdict}: {found.reason}" if found.reason else found.verdict
        lines.append(f"| {found.claim} | {found.data} | {found.measured} | {verdict} |")
    return "\n".join(lines)


def other_settings(methods: Sequence[str]) -> str:
    """Which methods were measured with settings that are not theirs any more."""
    if not methods:
        return ""
    return f"Measured with other settings than the methods have now: {', '.join(methods)}."


RULE = (
    "Methods are compared seed by seed, on the same rows. A claim is confirmed if the mean "
    "difference exceeds its error (one-sided 95 % of Student's t over the seeds), not confirmed if "
    'it exceeds the error in the other direction, and undecided otherwise. "Better" means by '
    f'more than {MIN_DIFFERENCE:g} nats; "as good as" and "no worse" allow {MARGIN:g}. One in '
    "twenty false claims is confirmed by chance. Differences are the loss of the method minus the "
    "loss of the other, ± their standard deviation. A high rank is 64; other ranks are 8."
)

NO_VERDICT = (
    "There is a verdict only if the compared runs have the same learning rate, or if each has the "
    "best of the rates tried for it on these rows and that rate is neither the lowest nor the "
    "highest of them. All other claims are listed with their measurements and without a verdict, "
    "because the rate can matter more than the method: at equal rates (3 seeds), AdaLoRA's "
    "advantage over LoRA on E2E reverses. The start of LoftQ has no verdict because a gap between "
    "two losses is no distance between models. A new study on a real model follows."
)


def pictures(files: Sequence[Path], page: Path) -> str:
    """The figures, by paths relative to the page."""
    return "\n\n".join(
        f"![{file.stem.replace('_', ' ')}]({file.relative_to(page.parent).as_posix()})"
        for file in files
    )
