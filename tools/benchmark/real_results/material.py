"""The data sets: how each is trained, which rows are asked, and how answers are scored.

Settings are assignments on `recipes/demo.py`, with `$DATA` for the folder of data sets, so that the
page can print the command that was run.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

from qlora_lite.demo import HELDOUT
from qlora_lite.foundation.errors import DataError
from qlora_lite.recipe import Recipe
from qlora_lite.recipe_files import load_recipe

ROOT = Path(__file__).resolve().parents[3]
RECIPE = "recipes/demo.py"
TOKENS_PER_STEP = 1024

Metric = Literal["bleu", "accuracy", "exact match"]


@dataclass(frozen=True)
class Material:
    """A data set and its task."""

    name: str
    title: str
    task: str
    """One sentence for the page."""
    settings: tuple[str, ...]
    """Assignments that read and train it."""
    heldout: str
    """The file of which questions are chosen; rows that are also trained on are left out."""
    num_questions: int
    steps: int
    answer_tokens: int
    """The largest length of an answer."""
    metric: Metric | None = None
    num_answered: int | None = None
    """Questions that are answered; all unless given."""


EMBEDDED = Material(
    name="embedded",
    title="Questions about Python's standard library",
    task="The embedded rows: describe an object of the standard library in one sentence.",
    settings=("data.max_tokens=256", "optim.lr=1e-3"),
    heldout=HELDOUT,
    num_questions=214,
    steps=100,
    answer_tokens=48,
    num_answered=3,
)

E2E = Material(
    name="e2e",
    title="E2E",
    task="Describe a restaurant from its attributes. BLEU is against all references.",
    settings=(
        "data.train=$DATA/e2e/train.csv",
        'data.fields={"completion": "ref"}',
        "data.prompt=Describe this restaurant: {mr}",
        "data.max_tokens=256",
        "optim.lr=1e-3",
    ),
    heldout="$DATA/e2e/test.csv",
    num_questions=200,
    steps=100,
    answer_tokens=72,
    metric="bleu",
)

SST2 = Material(
    name="sst2",
    title="SST-2",
    task="Whether a sentence of a film review is positive. The first 0 or 1 of the answer counts.",
    settings=(
        "data.train=$DATA/sst2/train.tsv",
        'data.columns=["text", "label"]',
        'data.fields={"completion": "label"}',
        "data.prompt=Is this review positive (1) or negative (0)? Answer with a digit.\\n\\n{text}",
        "data.max_tokens=256",
        "optim.lr=1e-3",
    ),
    heldout="$DATA/sst2/dev.tsv",
    num_questions=300,
    steps=100,
    answer_tokens=8,
    metric="accuracy",
)

GSM8K = Material(
    name="gsm8k",
    title="GSM8K",
    task=(
        "Arithmetic word problems with their solutions. The number after `####` counts, or the "
        "last one of an answer without `####`."
    ),
    settings=(
        "data.train=$DATA/gsm8k/train.jsonl",
        'data.fields={"prompt": "question", "completion": "answer"}',
        "data.max_tokens=768",
        "optim.lr=1e-3",
    ),
    heldout="$DATA/gsm8k/test.jsonl",
    num_questions=100,
    steps=100,
    answer_tokens=256,
    metric="exact match",
)

MATERIALS = (EMBEDDED, E2E, SST2, GSM8K)


@dataclass(frozen=True)
class Places:
    """Where things are on this machine."""

    model: Path
    data: Path
    work: Path

    def expand(self, text: str) -> str:
        """Replace `$MODEL` and `$DATA`.

        Raises:
            DataError: if the file is not there.
        """
        expanded = Template(text).safe_substitute(MODEL=self.model, DATA=self.data)
        path = Path(expanded.partition("=")[2] or expanded)
        if expanded != text and not path.exists():
            raise DataError(
                f"{path} does not exist. Give the model with --model, and the folder of e2e/, "
                "sst2/ and gsm8k/ with --data"
            )
        return expanded


def assignments(material: Material, steps: int, seed: int, compute: str) -> list[str]:
    """The settings of a run on `recipes/demo.py`, without its output."""
    return [
        "base.model=$MODEL",
        f"base.compute={compute}",
        *material.settings,
        "data.heldout=null",
        "data.heldout_share=0",
        f"optim.tokens_per_step={TOKENS_PER_STEP}",
        f"optim.micro_batch_tokens={TOKENS_PER_STEP}",
        # two thirds of the time, for memory that this model does not need to save
        "optim.checkpointing=false",
        f"optim.steps={steps}",
        f"seed={seed}",
        "device=cpu",
    ]


def recipe_of(words: list[str], places: Places, output: Path) -> Recipe:
    """The recipe of these assignments on this machine."""
    given = [places.expand(word) for word in words]
    return load_recipe(ROOT / RECIPE).but(*given, f"output={output}")


def command(words: list[str]) -> str:
    """What to type for the same run; `$MODEL` and `$DATA` are variables of the shell."""
    plain = re.compile(r"[\w.=$/-]+")
    shown = [word if plain.fullmatch(word) else shlex.quote(word) for word in words]
    return " ".join(["qlora-lite train", RECIPE, *shown])
