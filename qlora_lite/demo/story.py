"""The demo: a full run on the embedded model, by the same code as for a large one.

    plan and train -> SIGKILL in the middle -> resume -> merge and verify -> sample answers

The demo checks what it claims; `run_demo` raises `BrokenClaim` if a claim does not hold.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from qlora_lite.data.settings import Data
from qlora_lite.demo import BASE, HELDOUT, TRAIN
from qlora_lite.foundation.files import write_json
from qlora_lite.foundation.units import format_seconds
from qlora_lite.methods.lora import LoRA
from qlora_lite.model.quant import NF4
from qlora_lite.model.settings import Base
from qlora_lite.recipe import Recipe
from qlora_lite.report.page import read as read_report
from qlora_lite.run.merging import MergeResult, merge
from qlora_lite.training import metrics
from qlora_lite.training.settings import Checkpoints, Evaluation, Optim

STEPS = 60
CHECKPOINT_EVERY = 15
KILL_AFTER = 35
"""Between two checkpoints, so that some steps are lost and repeated."""

MIN_LOSS_DROP = 0.1
"""Relative drop of the held-out loss that the demo claims."""
MIN_AGREEMENT = 0.95
"""Claimed top-1 agreement of the bf16 files with the trained model."""

_TIMES = {"seconds", "tokens_per_second", "peak_bytes"}


class BrokenClaim(AssertionError):
    """A claim of the demo does not hold."""


def recipe(output: Path) -> Recipe:
    """NF4 base, LoRA on every linear layer, bf16 adapters: the defaults for any model.

    Compute is fp32 on every processor, as the merge is only proved exact in fp32.
    """
    return Recipe(
        base=Base(model=BASE, quant=NF4(), compute="fp32"),
        adapter=LoRA(rank=16, alpha=32),
        data=Data(train=TRAIN, heldout=HELDOUT, max_tokens=256),
        optim=Optim(lr=2e-3, tokens_per_step=2048, steps=STEPS),
        evaluation=Evaluation(every=30),
        checkpoints=Checkpoints(every=CHECKPOINT_EVERY),
        output=str(output),
    )


def run_demo(console: Console, parent: Path = Path("runs")) -> Path:
    """Run the demo in a new folder under `parent`, and return that folder.

    Raises:
        BrokenClaim: if the held-out loss did not fall, the resumed run differs from the killed
            one, or the merged model differs from the trained one.
    """
    start = time.perf_counter()
    folder = _new_folder(parent)
    run = folder / "run"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "recipe.json"
        write_json(file, {"recipe": recipe(run).to_dict()})
        _title(console, "1. Plan, train, and kill the process in the middle")
        before = _train_and_kill(console, file, run)
        _title(console, "2. Resume with the same command")
        _train(file)
    _check_resume(console, before, metrics.read(run / "metrics.jsonl"))
    _check_learning(console, metrics.read(run / "metrics.jsonl"))
    _title(console, "3. Merge and verify")
    _check_merge(console, merge(run, folder / "merged"))
    _title(console, "4. Answers to held-out questions")
    _show_samples(console, run / "report.html")
    console.print(f"\nevery check passed, in {format_seconds(time.perf_counter() - start)}")
    console.print(f"run:    {run}\nreport: {run / 'report.html'}\nmerged: {folder / 'merged'}")
    console.print(f"now try: qlora-lite chat {folder / 'merged'}", style="bold")
    return folder


def _new_folder(parent: Path) -> Path:
    """A new folder `story`, `story-2` and so on: nothing is overwritten."""
    names = itertools.chain(["story"], (f"story-{n}" for n in itertools.count(2)))
    folder = next(parent / name for name in names if not (parent / name).exists())
    folder.mkdir(parents=True)
    return folder


def _command(recipe_file: Path) -> list[str]:
    return [sys.executable, "-m", "qlora_lite", "train", str(recipe_file)]


def _train_and_kill(console: Console, file: Path, run: Path) -> list[dict[str, Any]]:
    """Train in a subprocess and send it SIGKILL; return the metrics that it had logged."""
    log = run / "metrics.jsonl"
    with subprocess.Popen(_command(file)) as process:
        while _last_step(log) < KILL_AFTER:
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


def _check_resume(
    console: Console, before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> None:
    """The steps after the last checkpoint of the killed process were repeated bit for bit."""
    checkpoint = KILL_AFTER // CHECKPOINT_EVERY * CHECKPOINT_EVERY
    lost = [_numbers(event) for event in before if event["step"] > checkpoint]
    again = [_numbers(event) for event in after if event["step"] > checkpoint][: len(lost)]
    if not lost or lost != again:
        raise BrokenClaim(f"the resumed run differs from the killed one: {lost} became {again}")
    console.print(
        f"steps {checkpoint + 1} to {lost[-1]['step']} were lost and repeated: the same losses and "
        "gradient norms to the last bit",
        style="green",
    )


def _numbers(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in _TIMES}


def _check_learning(console: Console, events: list[dict[str, Any]]) -> None:
    losses = [event["heldout_loss"] for event in events if "heldout_loss" in event]
    first, last = losses[0], losses[-1]
    if last > (1 - MIN_LOSS_DROP) * first:
        raise BrokenClaim(
            f"the held-out loss fell too little: from {first:.3f} to {last:.3f}, "
            f"needed is {MIN_LOSS_DROP:.0%}"
        )
    console.print(f"held-out loss {first:.3f} -> {last:.3f}", style="green")


def _check_merge(console: Console, result: MergeResult) -> None:
    table = Table("model", "held-out loss", "top-1 agreement", "written")
    for row in result.table:
        agreement = "" if row.agreement is None else f"{row.agreement:.1%}"
        written = "yes" if row.written else ""
        table.add_row(row.candidate, f"{row.loss:.4f}", agreement, written)
    console.print(table)
    if result.exact is None or not result.exact.is_exact:
        raise BrokenClaim(f"the fp32 merge differs from the trained model: {result.exact}")
    if result.written is None or result.written.top1 < MIN_AGREEMENT:
        raise BrokenClaim(f"the written files differ from the trained model: {result.written}")
    console.print(
        f"merged in fp32, the logits equal those of base and adapter to "
        f"{result.exact.relative_error:.0e}; the written bf16 files predict the same token at "
        f"{result.written.top1:.1%} of the positions",
        style="green",
    )


def _show_samples(console: Console, report: Path) -> None:
    for sample in read_report(report).samples:
        console.print(Text(sample.prompt.removeprefix("user").strip(), style="bold"))
        for name, text in (("before", sample.before), ("after", sample.after)):
            console.print(Text(f"  {name:8} {json.dumps(text, ensure_ascii=False)[1:-1][:160]}"))
        console.print(Text(f"  expected {sample.expected}", style="dim"))


def _title(console: Console, text: str) -> None:
    console.print()
    console.print(Rule(text, align="left"))
