"""The data sets of the study: the embedded rows, E2E and GSM8K."""

from dataclasses import dataclass
from pathlib import Path

from qlora_lite.demo import HELDOUT, TRAIN
from qlora_lite.foundation.errors import DataError


@dataclass(frozen=True)
class Material:
    """Training and held-out rows, as settings of a recipe."""

    name: str
    settings: tuple[str, ...]


EMBEDDED = Material(
    "embedded", (f"data.train={TRAIN}", f"data.heldout={HELDOUT}", "data.max_tokens=256")
)


FEWER = ("data.max_heldout_rows=100",)
"""The rows of E2E and GSM8K are long, so fewer are held out."""


def e2e(folder: Path) -> Material:
    """Descriptions of restaurants from their attributes: `train.csv` and `test.csv`."""
    fields = 'data.fields={"prompt": "mr", "completion": "ref"}'
    return Material("e2e", (*_files(folder, "csv"), fields, "data.max_tokens=256", *FEWER))


def gsm8k(folder: Path) -> Material:
    """Arithmetic word problems with their reasoning: `train.jsonl` and `test.jsonl`."""
    fields = 'data.fields={"prompt": "question", "completion": "answer"}'
    return Material("gsm8k", (*_files(folder, "jsonl"), fields, "data.max_tokens=1024", *FEWER))


def _files(folder: Path, suffix: str) -> tuple[str, str]:
    train, test = folder / f"train.{suffix}", folder / f"test.{suffix}"
    for file in (train, test):
        if not file.is_file():
            raise DataError(f"{file} does not exist. Give the folder of train and test.{suffix}")
    return f"data.train={train.resolve()}", f"data.heldout={test.resolve()}"
