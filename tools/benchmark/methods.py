"""Train every method under the same budget, and test the claims of its paper.

    python tools/benchmark/methods.py WORK
    python tools/benchmark/methods.py WORK --e2e DIR --gsm8k DIR --write docs

Uses the embedded base with the embedded rows and, if their folders are given, E2E (train.csv,
test.csv) and GSM8K (train.jsonl, test.jsonl). Every measurement is stored: the same command resumes
where it was stopped, and with more seeds, data or methods it measures only the new ones. Runs are
executed in parallel, one per core; timings are taken one at a time.

`--write docs` writes the table, the figures and the claims between the markers of docs/methods.md,
and every number to docs/benchmarks/methods.json. Claims that are not confirmed at this size are
listed too. Each stage is a file in `tools/benchmark/method_study`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from method_study import figures, page
from method_study.budget import Budget
from method_study.claims import findings
from method_study.contenders import contenders
from method_study.material import EMBEDDED, Material, e2e, gsm8k
from method_study.processes import run_in_parallel
from method_study.readings import Readings
from method_study.record import record, this_machine
from method_study.results import Results
from method_study.schedule import Study, stages

from qlora_lite.cli.status import status_of
from qlora_lite.foundation.files import lock, write_json
from qlora_lite.foundation.units import format_seconds


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write the page."""
    options = arguments(words)
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
    target = docs / "methods.md"
    parts = [
        page.introduction(study.budget, study.results.core_seconds, this_machine()),
        page.table(readings, methods, names),
        page.stopped(readings, methods, names),
        page.pictures(figures.draw(readings, methods, docs / "methods"), target),
        page.RULE,
        page.claims_table(found),
    ]
    page.update(target, "\n\n".join(part for part in parts if part))
    (docs / "benchmarks").mkdir(exist_ok=True)
    write_json(
        docs / "benchmarks" / "methods.json", record(study.results, study.budget, methods, found)
    )


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Train every method under the same budget.")
    parser.add_argument("work", type=Path, help="folder of runs and results; resumes in it")
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
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(status_of(main))
