"""The study as one JSON file: settings, versions, the machine, and every measurement."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from method_study import rates
from method_study.budget import TOKENS_PER_STEP, Budget
from method_study.results import Results
from method_study.verdict import Finding

PACKAGES = ("qlora-lite", "torch", "transformers", "bitsandbytes")


@dataclass(frozen=True)
class Machine:
    """The machine of the measurements."""

    cores: int
    architecture: str


def this_machine() -> Machine:
    """The machine of this process."""
    return Machine(len(os.sched_getaffinity(0)), platform.machine())


def record(
    results: Results, budget: Budget, methods: Sequence[str], findings: Sequence[Finding]
) -> dict[str, Any]:
    """The content of docs/benchmarks/methods.json."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "settings": {
            **asdict(budget),
            "tokens_per_step": TOKENS_PER_STEP,
            "rates": {method: rates.best_rate(results, method) for method in methods},
            "rates_tried": {method: rates.rates_of(method) for method in methods},
        },
        "versions": versions | {"python": platform.python_version()},
        "machine": asdict(this_machine()),
        "core_seconds": results.core_seconds,
        "findings": [asdict(finding) for finding in findings],
        "results": list(results.lines.values()),
    }


def with_findings(stored: dict[str, Any], findings: Sequence[Finding]) -> dict[str, Any]:
    """A stored record with other findings: the measurements and their circumstances are kept."""
    return stored | {"findings": [asdict(finding) for finding in findings]}
