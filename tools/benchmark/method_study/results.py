"""`results.jsonl`: one line per measurement, so that nothing is measured twice."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_lite.foundation.errors import RunError
from qlora_lite.foundation.files import write_text
from qlora_lite.recipe import differences

Values = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """Identifies a measurement."""

    kind: str
    method: str
    data: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.kind}: {self.method} on {self.data}, seed {self.seed}"


@dataclass(frozen=True)
class Task:
    """A measurement to make."""

    key: Key
    settings: Values
    """What the result depends on, besides the key."""
    measure: Callable[[], Values]


class Results:
    """All measurements in a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.jsonl"
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        self.lines: dict[Key, Values] = {}
        self.add(json.loads(line) for line in text.splitlines())

    def add(self, lines: Iterable[Values]) -> None:
        """Use measurements that were stored elsewhere; they are not written."""
        self.lines.update({Key(**line["key"]): line for line in lines})

    def has(self, task: Task) -> bool:
        """Whether this task has a result.

        Raises:
            RunError: if it was measured with other settings.
        """
        if task.key not in self.lines:
            return False
        if changed := differences(self.lines[task.key]["settings"], task.settings):
            raise RunError(
                f"{self.path} has '{task.key}' with other settings: {'; '.join(changed)}. "
                "Use these settings, or another folder"
            )
        return True

    def record(self, task: Task, values: Values, seconds: float, threads: int) -> None:
        """Store the values of a task and its time."""
        self.lines[task.key] = {
            "key": asdict(task.key),
            "settings": task.settings,
            "seconds": seconds,
            "threads": threads,
            "values": values,
        }
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines.values()))

    def values(self, key: Key) -> Values | None:
        """The values of a measurement; None if it was not made."""
        line = self.lines.get(key)
        return None if line is None else line["values"]

    @property
    def core_seconds(self) -> float:
        """Total of seconds times threads, over all calls."""
        return sum(line["seconds"] * line["threads"] for line in self.lines.values())
