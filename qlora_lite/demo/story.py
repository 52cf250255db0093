"""The demo: a full run on a real chat model, by the same code as for a large one.

    measure a step -> plan, train, SIGKILL -> resume -> merge and verify -> answers

The demo checks what it claims; `run_demo` raises `BrokenClaim` if a claim does not hold. Without
the file of the real model, it runs on the embedded one, whose number of steps is fixed.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from qlora_lite.demo import claims
from qlora_lite.demo.claims import BrokenClaim
from qlora_lite.demo.lessons import Choice, Lesson, choose_lesson, kill_after
from qlora_lite.demo.pace import affordable_steps, measure_step
from qlora_lite.foundation.files import write_json
from qlora_lite.foundation.units import format_seconds
from qlora_lite.report.contents import Sample
from qlora_lite.report.page import read as read_report
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.merging import MergeResult, merge
from qlora_lite.training import metrics
from qlora_lite.training.checkpoint import all_checkpoints, step_of

EMBEDDED_STEPS = 60
SHOWN_CHARACTERS = 230


def run_demo(
    console: Console,
    choice: Choice = "auto",
    parent: Path = Path("runs"),
    steps: int | None = None,
) -> Path:
    """Run the demo in a new folder under `parent`, and return that folder.

    Args:
        choice: the base; `auto` is the real one if it is installed.
        steps: of training, at least 8; by default 60 for the embedded base, and for the real one
            as many as fit into the time.

    Raises:
        BaseModelError: if the real base is required and not installed.
        BrokenClaim: if the held-out loss did not fall, the resumed run differs from the killed
            one, training needed more memory than planned, the merged model differs from the
            trained one, or the answers of the real model did not become short.
    """
    start = time.perf_counter()
    lesson, why = choose_lesson(choice)
    if why:
        console.print(Text(why, "yellow"), soft_wrap=not console.is_terminal)
    folder = _new_folder(parent)
    console.print(f"base: {lesson.name}", style="bold")
    steps = steps or _steps(console, lesson)
    recipe = lesson.recipe(folder, steps)
    run = RunFolder(folder / "run")
    _title(console, "1. Plan, train, and kill the process in the middle")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "recipe.json"
        write_json(file, {"recipe": recipe.to_dict()})
        before = _train_and_kill(console, file, run.metrics, kill_after(steps))
        saved = max(map(step_of, all_checkpoints(run.checkpoints)), default=0)
        _title(console, "2. Resume with the same command")
        _train(file)
    events = metrics.read(run.metrics)
    _hold(console, claims.check_resume(before, events, saved))
    _hold(console, claims.check_learning(events))
    _hold(console, claims.check_memory(run.read_sidecar()))
    _title(console, "3. Merge and verify")
    _merge(console, run, folder / "merged")
    _title(console, "4. Answers to held-out questions")
    samples = read_report(run.report).samples
    _show(console, samples)
    if lesson.is_real:
        _hold(console, claims.check_answers(samples))
    console.print(f"\nevery check passed, in {format_seconds(time.perf_counter() - start)}")
    console.print(f"processor time: {format_seconds(_processor_seconds())}")
    console.print(f"run:    {run.path}\nreport: {run.report}\nmerged: {folder / 'merged'}")
    console.print(f"now try: qlora-lite chat {folder / 'merged'}", style="bold")
    return folder


def _new_folder(parent: Path) -> Path:
    """A new folder `story`, `story-2` and so on: nothing is overwritten."""
    names = itertools.chain(["story"], (f"story-{n}" for n in itertools.count(2)))
    folder = next(parent / name for name in names if not (parent / name).exists())
    folder.mkdir(parents=True)
    return folder


def _steps(console: Console, lesson: Lesson) -> int:
    """How many steps to train. For the real base a step is measured, and the choice printed."""
    if not lesson.is_real:
        return EMBEDDED_STEPS
    with tempfile.TemporaryDirectory() as scratch:
        seconds, compute = measure_step(lesson, Path(scratch))
    steps = affordable_steps(seconds, compute)
    console.print(
        f"a step of 1,024 tokens takes {seconds:.1f} s here in {compute}: training {steps} steps, "
        f"about {format_seconds(steps * seconds)}"
    )
    return steps


def _command(recipe_file: Path) -> list[str]:
    return [sys.executable, "-m", "qlora_lite", "train", str(recipe_file)]


def _train_and_kill(console: Console, file: Path, log: Path, step: int) -> list[dict[str, Any]]:
    """Train in a subprocess, send it SIGKILL after a step, and return what it had logged."""
    with subprocess.Popen(_command(file)) as process:
        while _last_step(log) < step:
            if process.poll() is not None:
                raise BrokenClaim(
                    f"training ended with status {process.returncode} before it was killed"
                )
            time.sleep(0.02)
        process.kill()
    console.show_cursor(True)
    events = metrics.read(log)
    console.print(f"\nSIGKILL to process {process.pid} after step {_last_step(log)}", style="red")
    return events


def _last_step(log: Path) -> int:
    return max((e["step"] for e in metrics.read(log)), default=0) if log.exists() else 0


def _train(file: Path) -> None:
    status = subprocess.run(_command(file), check=False).returncode
    if status:
        raise BrokenClaim(f"the resumed run ended with status {status}")


def _merge(console: Console, run: RunFolder, out: Path) -> None:
    result = merge(run.path, out)
    console.print(_merge_table(result))
    is_fp32 = run.read_sidecar()["base"]["compute"] == "fp32"
    _hold(console, claims.check_merge(result, is_fp32=is_fp32))


def _merge_table(result: MergeResult) -> Table:
    table = Table("model", "held-out loss", "top-1 agreement", "written")
    for row in result.table:
        agreement = "" if row.agreement is None else f"{row.agreement:.1%}"
        written = "yes" if row.written else ""
        table.add_row(row.candidate, f"{row.loss:.4f}", agreement, written)
    return table


def _show(console: Console, samples: Sequence[Sample]) -> None:
    for sample in samples:
        console.print(Text(_question(sample.prompt), style="bold"))
        for name, text in (("before", sample.before), ("after", sample.after)):
            console.print(Text(f"  {name:8} {_cut(' '.join(text.split()))}"))
        console.print(Text(f"  expected {sample.expected}", style="dim"))


def _question(prompt: str) -> str:
    """The user's turn of a rendered prompt, whose role names are lines of their own."""
    lines = prompt.splitlines()
    start = max((i + 1 for i, line in enumerate(lines) if line == "user"), default=0)
    return " ".join(line for line in lines[start:] if line != "assistant").strip()


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."


def _processor_seconds() -> float:
    """User and system time of this process and of those that it has started."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _hold(console: Console, claim: str) -> None:
    console.print(claim, style="green")


def _title(console: Console, text: str) -> None:
    console.print()
    console.print(Rule(text, align="left"))
