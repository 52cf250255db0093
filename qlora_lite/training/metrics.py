"""`metrics.jsonl`: one line a logged event, which continues from the checkpoint after a resume."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_lite.foundation.files import write_text


class MetricsLog:
    """Appends lines; `rewind` drops what came after a step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def sync(self) -> None:
        """Make what was appended durable: a checkpoint must not outlive the steps before it."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def clear(self) -> None:
        """Begin anew."""
        self.path.unlink(missing_ok=True)

    def rewind(self, step: int) -> None:
        """Keep the events of the first `step` steps; a half-written last line goes too."""
        if self.path.exists():
            kept = [json.dumps(event) for event in read(self.path) if event["step"] <= step]
            write_text(self.path, "".join(line + "\n" for line in kept))


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a log, none if there is no log. A line that a kill cut short, or that is
    damaged, is left out."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return [event for event in events if isinstance(event, dict) and "step" in event]
