"""Train every method under the same budget, and test the claims of its paper.

    python tools/benchmark/methods.py WORK
    python tools/benchmark/methods.py WORK --e2e DIR --gsm8k DIR --write docs
    python tools/benchmark/methods.py --rewrite docs

Uses the embedded base with the embedded rows and, if their folders are given, E2E (train.csv,
test.csv) and GSM8K (train.jsonl, test.jsonl). Every measurement is stored: the same command resumes
where it was stopped, and with more seeds, data or methods it measures only the new ones. Runs are
executed in parallel, one per core; timings are taken one at a time.

`--write docs` writes the table, the figures and the claims between the markers of docs/methods.md,
and every number to docs/benchmarks/methods.json. Claims that are not confirmed at this size are
listed too. `--rewrite docs` judges the claims again from docs/benchmarks/methods.json and writes
the page; nothing is measured. Each stage is a file in `tools/benchmark/method_study`.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from method_study import figures, page
from method_study.budget import Budget
from method_study.claims import findings
from method_study.comparable import outdated
from method_study.contenders import contenders
from method_study.material import EMBEDDED, Material, e2e, gsm8k
from method_study.processes import run_in_parallel
from method_study.readings import Readings
from method_study.record import Machine, record, this_machine, with_findings
from method_study.results import Results
from method_study.schedule import Study, stages
from method_study.verdict import Finding

from qlora_lite.cli.status import status_of
from qlora_lite.foundation.files import lock, write_json
from qlora_lite.foundation.units import format_seconds

RECORD = Path("benchmarks", "methods.json")
"""Every number, in the folder of the docs."""


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write the page; or only write it again."""
    options = arguments(words)
    if options.rewrite:
        rewrite(options.rewrite)
        return
    if options.write:
        figures.require_matplotlib()
    options.work.mkdir(parents=True, exist_ok=True)
    with lock(options.work):
        study = Study(
            work=options.work,
            budget=Budget(options.steps, options.seeds),
            materials=materials(options.e2e, options.gsm8k),
            contenders=contenders(options.only),
            results=Results(options.work),
        )
        measure(study, options.cores)
    if options.write:
        write(study, options.write)


def materials(e2e_folder: Path | None, gsm8k_folder: Path | None) -> list[Material]:
    """The embedded rows and the given data sets."""
    found = [EMBEDDED]
    if e2e_folder:
        found.append(e2e(e2e_folder))
    if gsm8k_folder:
        found.append(gsm8k(gsm8k_folder))
    return found


def measure(study: Study, cores: int) -> None:
    """Run every task that has no result yet; print one line for each."""
    results = study.results
    for stage in stages(study):
        missing = [task for task in stage.tasks if not results.has(task)]
        left = len(missing)
        print(f"{stage.name}: {len(stage.tasks)}, {len(stage.tasks) - left} done", flush=True)
        jobs, threads = (1, cores) if stage.is_timed else (cores, 1)
        for task, values, seconds in run_in_parallel(missing, jobs, threads):
            results.record(task, values, seconds, threads)
            left -= 1
            print(f"{task.key}: {format_seconds(seconds)}; {left} left", flush=True)
    print(f"{format_seconds(results.core_seconds)} of core time in total, over all calls")


def write(study: Study, docs: Path) -> None:
    """The page, its figures, and the JSON file."""
    methods = [contender.name for contender in study.contenders]
    names = [material.name for material in study.materials]
    readings = Readings(study.results, study.budget.seeds)
    found = findings(readings, names)
    pictures = figures.draw(readings, methods, docs / "methods")
    machine = this_machine()
    write_page(docs, readings, study.budget, machine, methods, names, found, pictures)
    (docs / "benchmarks").mkdir(exist_ok=True)
    write_json(docs / RECORD, record(study.results, study.budget, methods, found))


def rewrite(docs: Path) -> None:
    """Judge the claims again from the stored measurements, and write the page and the findings."""
    stored = json.loads((docs / RECORD).read_text(encoding="utf-8"))
    results = Results(docs)
    results.add(stored["results"])
    budget = Budget(stored["settings"]["steps"], stored["settings"]["seeds"])
    methods = list(stored["settings"]["rates"])
    names = list(dict.fromkeys(key.data for key in results.lines if key.kind == "run"))
    readings = Readings(results, budget.seeds)
    found = findings(readings, names)
    pictures = figures.drawn(docs / "methods")
    machine = Machine(**stored["machine"])
    write_page(docs, readings, budget, machine, methods, names, found, pictures)
    write_json(docs / RECORD, with_findings(stored, found))


def write_page(
    docs: Path,
    readings: Readings,
    budget: Budget,
    machine: Machine,
    methods: Sequence[str],
    names: Sequence[str],
    found: Sequence[Finding],
    pictures: Sequence[Path],
) -> None:
    """The table, the figures and the claims, between the markers of the page."""
    target = docs / "methods.md"
    parts = [
        page.introduction(budget, readings.results.core_seconds, machine),
        page.table(readings, methods, names),
        page.other_settings(outdated(readings, methods, names[0])),
        page.stopped(readings, methods, names),
        page.pictures(pictures, target),
        page.RULE,
        page.NO_VERDICT,
        page.claims_table(found),
    ]
    page.update(target, "\n\n".join(part for part in parts if part))


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Train every method under the same budget.")
    parser.add_argument(
        "work", type=Path, nargs="?", help="folder of runs and results; resumes in it"
    )
    parser.add_argument("--e2e", type=Path, metavar="DIR", help="with train.csv and test.csv")
    parser.add_argument("--gsm8k", type=Path, metavar="DIR", help="with train.jsonl and test.jsonl")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps per run (40)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of every run (3)")
    num_cores = len(os.sched_getaffinity(0))
    parser.add_argument("--cores", type=int, default=num_cores, help=f"cores ({num_cores})")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="METHOD", help="these methods and LoRA"
    )
    parser.add_argument("--write", type=Path, metavar="DOCS", help="folder of methods.md")
    parser.add_argument(
        "--rewrite", type=Path, metavar="DOCS", help="write the page from its JSON file again"
    )
    options = parser.parse_args(words)
    if options.work is None and options.rewrite is None:
        parser.error("give WORK, the folder of runs and results, or --rewrite DOCS")
    return options


if __name__ == "__main__":
    sys.exit(status_of(main))
