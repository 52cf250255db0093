"""`results.jsonl`: one line a measurement. What is there is not measured again."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_lite.foundation.errors import RunError
from qlora_lite.foundation.files import write_text
from qlora_lite.recipe import differences

Values = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """What was measured."""

    kind: str
    method: str
    data: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.kind}: {self.method} on {self.data}, seed {self.seed}"


@dataclass(frozen=True)
class Task:
    """Something to measure."""

    key: Key
    settings: Values
    """What the result depends on beside the key."""
    measure: Callable[[], Values]


class Results:
    """All measurements in a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.jsonl"
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        self.lines: dict[Key, Values] = {Key(**line["key"]): line for line in lines}

    def has(self, task: Task) -> bool:
        """Whether this is measured already.

        Raises:
            RunError: if it was measured with other settings.
        """
        if task.key not in self.lines:
            return False
        if changed := differences(self.lines[task.key]["settings"], task.settings):
            raise RunError(
                f"{self.path} has '{task.key}' with other settings: {'; '.join(changed)}. "
                "Give the settings that it has, or another folder"
            )
        return True

    def record(self, task: Task, values: Values, seconds: float, threads: int) -> None:
        """Write down what was measured, and what it took."""
        self.lines[task.key] = {
            "key": asdict(task.key),
            "settings": task.settings,
            "seconds": seconds,
            "threads": threads,
            "values": values,
        }
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines.values()))

    def values(self, key: Key) -> Values | None:
        """What was measured, if it was."""
        line = self.lines.get(key)
        return None if line is None else line["values"]

    @property
    def core_seconds(self) -> float:
        """What all measurements took together, over all calls: seconds times threads."""
        return sum(line["seconds"] * line["threads"] for line in self.lines.values())
