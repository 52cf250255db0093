"""`metrics.jsonl`: one line per logged event. After a resume it is cut back to the checkpoint."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from qlora_lite.foundation.files import parse_json, write_text
from qlora_lite.foundation.json_files import JsonFile, check_as


class _Event(JsonFile):
    """What the readers of a log rely on. A gradient norm may be infinite in a skipped step."""

    model_config = ConfigDict(allow_inf_nan=True)

    step: Annotated[int, Field(ge=0)]
    loss: float = 0.0
    heldout_loss: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


class MetricsLog:
    """Appends lines; `rewind` drops those after a step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def sync(self) -> None:
        """Sync to disk, so that a checkpoint is never newer than the log."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def clear(self) -> None:
        """Delete the log."""
        self.path.unlink(missing_ok=True)

    def rewind(self, step: int) -> None:
        """Keep the events of the first `step` steps; a half-written last line is dropped too."""
        if self.path.exists():
            lines = [json.dumps(event) for event in read(self.path) if event["step"] <= step]
            write_text(self.path, "".join(line + "\n" for line in lines))


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a log; none if there is no log. Incomplete or damaged lines are skipped."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            event = parse_json(line)
            check_as(event, _Event)
            events.append(event)
    return events
