"""docs/results.md from the stored measurements alone."""

from collections.abc import Iterable, Sequence
from typing import Any

from method_study.verdict import mean_and_spread

from qlora_lite.foundation.units import format_bytes, format_seconds
from real_results.material import MATERIALS, TOKENS_PER_STEP, Material

Record = dict[str, Any]
TOOL = "tools/benchmark/results.py"
EMPTY = "not measured"
DIGITS = {"loss": 3, "bleu": 1, "accuracy": 3, "exact match": 3}
NEAR_ZERO = 0.05
MERGED = {
    "merged-trained": "merged to bf16 on the trained base",
    "merged-original": "merged to bf16 on the original base",
}


def render(records: Sequence[Record]) -> str:
    """The whole page."""
    parts = ["# Results of a real model"]
    if records:
        parts += [_introduction(records), _circumstances(records)]
    else:
        parts.append(f"Nothing is measured yet: run `{TOOL}`.")
    for material in MATERIALS:
        if own := [record for record in records if record["key"]["data"] == material.name]:
            parts += _section(material, own)
    return "\n\n".join(parts) + "\n"


def _introduction(records: Sequence[Record]) -> str:
    models = ", ".join(sorted({record["settings"]["model"] for record in records}))
    text = (
        f"{models}, quantised to NF4, before and after training an adapter (LoRA of rank 16 on all "
        f"linear layers, about {TOKENS_PER_STEP:,} tokens per step). Questions are chosen from the "
        "held-out files by a fixed seed, and none of them is in the training rows. Losses are in "
        "nats per token of the first reference, including its end. "
        "Answers are the most likely ones (greedy). Figures after training are mean ± standard "
        "deviation over the seeds. The merged models are those of seed 0, loaded by plain "
        "`transformers`."
    )
    if any(record["settings"]["is_short"] for record in records):
        text += (
            "\n\n**A short trial of the tool, not results:** fewer steps or questions than planned."
        )
    return text


def _circumstances(records: Sequence[Record]) -> str:
    """Machines, versions and total time."""
    machines, versions = [], []
    for record in records:
        machine = record["machine"]
        flags = ", ".join(machine["flags"]) or "no known flags"
        machines.append(
            f"{machine['cores']} CPU cores ({machine['processor']}, {machine['architecture']}; "
            f"{flags})"
        )
        versions.append(", ".join(f"{name} {v}" for name, v in record["versions"].items()))
    threads = " or ".join(str(n) for n in sorted({r["settings"]["threads"] for r in records}))
    total = sum(record["values"]["cpu_seconds"] for record in records)
    computes = sorted({record["values"]["compute"] for record in records})
    return (
        f"Measured by `{TOOL}` in {format_seconds(total)} of CPU time, with "
        f"{threads} {'thread' if threads == '1' else 'threads'} per process, computed in "
        f"{' or '.join(computes)}, on "
        f"{'; '.join(dict.fromkeys(machines))}. Versions: {'; '.join(dict.fromkeys(versions))}. "
        "Every number is in [benchmarks/results](benchmarks/results)."
    )


def _section(material: Material, records: Sequence[Record]) -> list[str]:
    """One data set: figures, cost, command and answers."""
    runs = sorted(_of_kind(records, "run"), key=lambda record: record["key"]["seed"])
    settings = records[0]["settings"]
    title = material.title + (" (a short trial)" if settings["is_short"] else "")
    parts = [f"## {title}", f"{material.task} {settings['questions']} held-out questions."]
    parts.append(_table(material, records, runs))
    if material.metric == "exact match" and runs and _is_near_zero(runs):
        parts.append(
            "Exact match stays near zero: a model of this size learns the form of a solution, "
            "which the loss shows, but rarely computes the right number."
        )
    if runs:
        parts.append(_cost(runs))
    parts.append(_command(settings))
    parts.append(_samples(records, runs))
    return parts


def _table(material: Material, records: Sequence[Record], runs: Sequence[Record]) -> str:
    names = ["loss", *([material.metric] if material.metric else [])]
    heads = ["BLEU" if name == "bleu" else name for name in names]
    seeds = f"{len(runs)} seed" + ("s" if len(runs) != 1 else "")
    rows: list[tuple[str, Sequence[Record]]] = [
        ("before training", _of_kind(records, "base")),
        (f"after training ({seeds})", runs),
        ("after training, seed 0", [run for run in runs if run["key"]["seed"] == 0]),
        *((f"seed 0 {label}", _of_kind(records, kind)) for kind, label in MERGED.items()),
    ]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for label, found in rows:
        cells = [_figure(found, name) for name in names]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(records: Sequence[Record], name: str) -> str:
    if not records:
        return EMPTY
    return mean_and_spread([record["values"][name] for record in records], DIGITS[name])


def _is_near_zero(runs: Sequence[Record]) -> bool:
    return max(run["values"]["exact match"] for run in runs) < NEAR_ZERO


def _cost(runs: Sequence[Record]) -> str:
    """Time and memory of the training runs."""
    training = [run["values"]["training"] for run in runs]
    cpu = [t["cpu_seconds"] for t in training if t["cpu_seconds"] is not None]
    time = f"{_range(t['seconds'] for t in training)} of wall-clock time"
    if cpu:
        time += f" and {_range(cpu)} of CPU time"
    one = training[0]
    return (
        f"{one['steps']} steps ({one['tokens']:,} tokens) of {one['trained_parameters']:,} trained "
        f"parameters: {time} per run. Peak memory "
        f"{format_bytes(max(t['peak_bytes'] for t in training))}, predicted "
        f"{format_bytes(one['predicted_peak_bytes'])}."
    )


def _command(settings: Record) -> str:
    return f"```\nMODEL=path/to/{settings['model']} DATA=path/to/data\n{settings['command']}\n```"


def _samples(records: Sequence[Record], runs: Sequence[Record]) -> str:
    """The first answers before and after training."""
    before, after = _first_samples(_of_kind(records, "base")), _first_samples(runs)
    lines = ["| question | before | after (first seed) | reference |", "|---|---|---|---|"]
    for i, sample in enumerate(before or after):
        answers = [found[i]["answer"] if found else EMPTY for found in (before, after)]
        cells = [sample["question"], *answers, sample["reference"]]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _first_samples(records: Sequence[Record]) -> list[Record]:
    return records[0]["values"]["samples"] if records else []


def _cell(text: str) -> str:
    """Text inside a table of Markdown: no line breaks, no markup."""
    for mark in "\\|<>*_`[":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split()) or "(empty)"


def _of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if record["key"]["kind"] == kind]


def _range(seconds: Iterable[float]) -> str:
    """`12 min` or `11 min to 13 min`."""
    ordered = sorted(seconds)
    ends = dict.fromkeys([format_seconds(ordered[0]), format_seconds(ordered[-1])])
    return " to ".join(ends)
