"""The two runs of the demo: the real chat model, and the small one inside the package.

Both learn from the same questions. The real model is fluent before and after: it learns to answer
in one sentence. The embedded one has 1.2 M parameters and learns to form sentences.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_lite.data.settings import Data
from qlora_lite.demo import BASE, HELDOUT, TRAIN
from qlora_lite.demo.real_base import INSTALL, find_real_base
from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.foundation.files import write_text
from qlora_lite.methods.lora import LoRA
from qlora_lite.model.quant import NF4
from qlora_lite.model.settings import Base
from qlora_lite.recipe import Recipe
from qlora_lite.training.settings import Checkpoints, Evaluation, Optim

Choice = Literal["auto", "real", "embedded"]

SHOWN = (
    "What does math.sqrt do?",
    "What is os.path.dirname for?",
    "Describe set.clear in one sentence.",
    "In Python, what is PendingDeprecationWarning?",
)
"""Held-out questions whose answers the real model shows."""
SCORED_ROWS = 48
"""Held-out rows that the real model is scored on. A scoring is about one training step."""


@dataclass(frozen=True)
class Lesson:
    """A base, and how it is trained."""

    base: str
    """A folder or a GGUF file."""
    is_real: bool
    """It is a chat model: its answers become short, and the number of steps is measured."""

    @property
    def name(self) -> str:
        return Path(self.base).stem if self.is_real else "the embedded model (1.2 M parameters)"

    def recipe(self, folder: Path, steps: int) -> Recipe:
        """NF4 base, LoRA on every linear layer, bf16 adapters: the defaults for any model.

        Args:
            folder: of the story. The run is `run/` in it. The rows of the real model are written
                into it.
        """
        adapter, output = LoRA(rank=16, alpha=32), str(folder / "run")
        if not self.is_real:
            return Recipe(
                base=Base(model=self.base, quant=NF4(), compute="fp32"),
                adapter=adapter,
                data=Data(train=TRAIN, heldout=HELDOUT, max_tokens=256),
                optim=Optim(lr=2e-3, tokens_per_step=2048, steps=steps),
                evaluation=Evaluation(every=-(-steps // 2)),
                checkpoints=Checkpoints(every=checkpoint_every(steps)),
                output=output,
            )
        return Recipe(
            base=Base(model=self.base, quant=NF4()),
            adapter=adapter,
            data=Data(train=_write_train(folder), heldout=_write_heldout(folder), max_tokens=1024),
            optim=Optim(lr=1e-3, tokens_per_step=1024, micro_batch_tokens=1024, steps=steps),
            evaluation=Evaluation(every=steps, samples=len(SHOWN)),
            checkpoints=Checkpoints(every=checkpoint_every(steps)),
            output=output,
        )


def choose_lesson(choice: Choice) -> tuple[Lesson, str]:
    """The lesson, and one line that says why if it is not the real one; "" otherwise.

    Raises:
        BaseModelError: if the real base is required and not installed.
    """
    embedded = Lesson(BASE, is_real=False)
    if choice == "embedded":
        return embedded, ""
    if (file := find_real_base()) is not None:
        return Lesson(str(file), is_real=True), ""
    if choice == "real":
        raise BaseModelError(f"--base real: the real chat model is not installed. Type {INSTALL}")
    return embedded, (
        "the real chat model is not installed, so the embedded one of 1.2 M parameters is used. "
        f"To get the real one: {INSTALL}"
    )


def checkpoint_every(steps: int) -> int:
    """Four checkpoints in a run."""
    return max(1, steps // 4)


def kill_after(steps: int) -> int:
    """The step after which the process is killed: between the second checkpoint and the third."""
    every = checkpoint_every(steps)
    return 2 * every + max(1, every // 3)


def _write_train(folder: Path) -> str:
    """Write every fifth training row, more than the steps need, and return the file.

    Preparing all 5,761 rows takes 6 s a process.
    """
    rows = _lines(TRAIN)[::5]
    return _write(folder / "train.jsonl", rows)


def _write_heldout(folder: Path) -> str:
    """Write `SCORED_ROWS` held-out rows, those of `SHOWN` first, and return the file."""
    rows = _lines(HELDOUT)
    questions = [json.loads(row)["messages"][0]["content"] for row in rows]
    shown = [rows[questions.index(question)] for question in SHOWN]
    others = [row for row in rows if row not in shown]
    num_others = SCORED_ROWS - len(shown)
    spread = others[:: len(others) // num_others][:num_others]
    return _write(folder / "heldout.jsonl", [*shown, *spread])


def _lines(file: str) -> list[str]:
    return Path(file).read_text(encoding="utf-8").splitlines(keepends=True)


def _write(file: Path, rows: Sequence[str]) -> str:
    write_text(file, "".join(rows))
    return str(file)
