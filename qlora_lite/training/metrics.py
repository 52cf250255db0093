"""`metrics.jsonl`: one line per logged event. After a resume it is cut back to the checkpoint."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from qlora_lite.foundation.files import parse_json, write_text
from qlora_lite.foundation.json_files import Count, JsonFile, NonNegative, check_as

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Step(JsonFile):
    """What readers need of a step. The gradient norm of a skipped one may be infinite."""

    model_config = ConfigDict(allow_inf_nan=True)

    step: Count
    loss: Finite
    tokens: Count
    seconds: NonNegative


class _Scoring(JsonFile):
    """What they need of a scoring of held-out rows."""

    model_config = ConfigDict(allow_inf_nan=True)

    step: Count
    heldout_loss: Finite
    seconds: NonNegative


class MetricsLog:
    """Appends lines; `rewind` drops those after a step.

    Args:
        writes: False in a process that leaves the file to another one.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes

    def append(self, event: dict[str, Any]) -> None:
        if not self.writes:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def sync(self) -> None:
        """Sync to disk, so that a checkpoint is never newer than the log."""
        if self.writes and self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def clear(self) -> None:
        """Delete the log."""
        if self.writes:
            self.path.unlink(missing_ok=True)

    def rewind(self, step: int) -> None:
        """Keep the events of the first `step` steps; a half-written last line is dropped too."""
        if self.writes and self.path.exists():
            lines = [json.dumps(event) for event in read(self.path) if event["step"] <= step]
            write_text(self.path, "".join(line + "\n" for line in lines))


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a log; none if there is no log. Incomplete or damaged lines are skipped."""
    return [event for _, event in _lines(path) if event is not None]


def problems(path: Path, step: int) -> list[str]:
    """What is wrong with the log of a run that continues from `step`, as lines for the user."""
    lines = list(_lines(path))
    if lines and lines[-1][1] is None:
        del lines[-1]  # a kill may cut the last one short
    damaged = [number for number, event in lines if event is None]
    logged = {event["step"] for _, event in lines if event is not None and "loss" in event}
    missing = [number for number in range(1, step + 1) if number not in logged]
    found = [
        *([f"line {damaged[0]} of {len(damaged)} damaged ones"] if damaged else []),
        *([f"step {missing[0]} of {len(missing)} missing ones"] if missing else []),
    ]
    if not found:
        return []
    return [f"{path} is incomplete ({', '.join(found)}), so the curves of the report are too"]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The numbered lines of a log: events, or None for a damaged line."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            event = parse_json(line)
            check_as(event, _Step if "loss" in event else _Scoring)
        except (TypeError, ValueError):
            yield number, None
        else:
            yield number, event
