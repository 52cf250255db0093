"""Train every method under the same budget, and hold the claims of its paper against the result.

    python tools/benchmark/methods.py WORK
    python tools/benchmark/methods.py WORK --e2e DIR --gsm8k DIR --write docs

On the embedded base, with the embedded rows and, where their folders are given, E2E (train.csv,
test.csv) and GSM8K (train.jsonl, test.jsonl). Everything is measured once: the same command goes on
where it was stopped, and with more seeds, data or methods it measures what is new. Runs go side by
side, one on each core; what is timed goes alone.

`--write docs` puts the table, the figures and the claims between the markers of docs/methods.md,
and every number into docs/benchmarks/methods.json. A claim that does not show at this size is
reported as such. Each stage is a file in `tools/benchmark/method_study`.
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
from method_study.processes import side_by_side
from method_study.readings import Readings
from method_study.record import record, this_machine
from method_study.results import Results
from method_study.schedule import Study, stages

from qlora_lite.cli.status import status_of
from qlora_lite.foundation.files import lock, write_json
from qlora_lite.foundation.units import format_seconds


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write what is known."""
    asked = arguments(words)
    if asked.write:
        figures.require_matplotlib()
    asked.work.mkdir(parents=True, exist_ok=True)
    with lock(asked.work):
        study = Study(
            work=asked.work,
            budget=Budget(asked.steps, asked.seeds),
            materials=materials(asked.e2e, asked.gsm8k),
            contenders=contenders(asked.only),
            results=Results(asked.work),
        )
        measure(study, asked.cores)
    if asked.write:
        write(study, asked.write)


def materials(e2e_folder: Path | None, gsm8k_folder: Path | None) -> list[Material]:
    """The embedded rows, and what was given beside them."""
    found = [EMBEDDED]
    if e2e_folder:
        found.append(e2e(e2e_folder))
    if gsm8k_folder:
        found.append(gsm8k(gsm8k_folder))
    return found


def measure(study: Study, cores: int) -> None:
    """Carry out every task that has no result yet, a line for each."""
    results = study.results
    for stage in stages(study):
        missing = [task for task in stage.tasks if not results.has(task)]
        left = len(missing)
        print(f"{stage.name}: {len(stage.tasks)}, {len(stage.tasks) - left} done", flush=True)
        jobs, threads = (1, cores) if stage.is_timed else (cores, 1)
        for task, values, seconds in side_by_side(missing, jobs, threads):
            results.record(task, values, seconds, threads)
            left -= 1
            print(f"{task.key}: {format_seconds(seconds)}; {left} left", flush=True)
    print(f"{format_seconds(results.core_seconds)} of core time in all, over every call")


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
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description="Train every method under the same budget.")
    parser.add_argument("work", type=Path, help="folder of runs and results; goes on in it")
    parser.add_argument("--e2e", type=Path, metavar="DIR", help="has train.csv and test.csv")
    parser.add_argument("--gsm8k", type=Path, metavar="DIR", help="has train.jsonl and test.jsonl")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run (40)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of everything (3)")
    here = len(os.sched_getaffinity(0))
    parser.add_argument("--cores", type=int, default=here, help=f"to use ({here})")
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="and LoRA")
    parser.add_argument("--write", type=Path, metavar="DOCS", help="where methods.md is")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(status_of(main))
