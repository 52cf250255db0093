"""`docs/benchmarks/results/`: one JSON file per finished measurement, so that none is repeated."""

import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from method_study.results import Key, Task

from qlora_lite.foundation.errors import RunError
from qlora_lite.foundation.files import write_json
from qlora_lite.recipe import differences

PACKAGES = ("qlora-lite", "torch", "transformers", "bitsandbytes", "tokenizers")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
"""Features of a processor that decide how fast it multiplies matrices."""
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Store:
    """The files of all measurements."""

    folder: Path

    def path(self, key: Key) -> Path:
        return self.folder / f"{key.data}-{key.kind}-{key.seed}.json"

    def has(self, task: Task) -> bool:
        """Whether this task is measured.

        Raises:
            RunError: if it was measured with other settings.
        """
        path = self.path(task.key)
        if not path.is_file():
            return False
        stored = json.loads(path.read_text(encoding="utf-8"))["settings"]
        if changed := differences(stored, task.settings):
            raise RunError(
                f"{path} was measured with other settings: {'; '.join(changed)}. Use these "
                "settings, or another --docs"
            )
        return True

    def write(self, task: Task, values: dict[str, Any], seconds: float) -> None:
        """Store a measurement with its circumstances."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {
            "key": asdict(task.key),
            "settings": task.settings,
            "machine": this_machine(),
            "versions": versions(),
            "seconds": seconds,
            "values": values,
        }
        write_json(self.path(task.key), record)

    def read(self) -> list[dict[str, Any]]:
        """Every measurement."""
        files = sorted(self.folder.glob("*.json"))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


@lru_cache
def this_machine() -> dict[str, Any]:
    """Cores, architecture, processor and its flags; the last two on Linux only."""
    facts: dict[str, str] = {}
    if CPUINFO.is_file():
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
        pairs = (line.partition(":") for line in reversed(lines) if ":" in line)
        facts = {name.strip(): value.strip() for name, _, value in pairs}
    flags = set(facts.get("flags", "").split())
    return {
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "processor": facts.get("model name", "unknown"),
        "flags": [flag for flag in FLAGS if flag in flags],
    }


@lru_cache
def versions() -> dict[str, str]:
    """Versions of Python and the libraries."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return found | {"python": platform.python_version()}
