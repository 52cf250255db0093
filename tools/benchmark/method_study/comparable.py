"""When the runs of a claim may be compared, so that it gets a verdict.

The loss depends on the learning rate, often more than on the method. Two runs are compared if

    both have the same rate, or
    each has the best of the rates that were tried for it on these rows, and that rate is neither
    the lowest nor the highest of them (a better one may lie beyond an edge),

and if both were measured with the settings that the study would use now. All other measurements are
kept and printed without a verdict.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from method_study import rates
from method_study.budget import Budget, recipe_of
from method_study.contenders import contenders, extras
from method_study.material import EMBEDDED
from method_study.readings import Missing, Readings


def obstacle(readings: Readings, data: str, methods: Sequence[str]) -> str:
    """Why the runs of these methods must not be compared; empty if they may be."""
    changed = [method for method in methods if is_outdated(readings, method, data)]
    if changed:
        return f"{changed[0]} was measured with other settings"
    used = list(dict.fromkeys(readings.lr(method, data) for method in methods))
    if len(used) == 1:
        return ""
    different = "rates " + " and ".join(f"{lr:g}" for lr in used)
    if data != EMBEDDED.name:
        return different
    beyond = [method for method in methods if not is_bracketed(readings, method)]
    return f"{different}, that of {beyond[0]} is not bracketed" if beyond else ""


def is_bracketed(readings: Readings, method: str) -> bool:
    """Whether its rate is the best of those tried for it, and not at their edge."""
    tried = rates.tried(readings.results, method)
    lr = readings.lr(method, EMBEDDED.name)
    if not tried or lr != rates.best_rate(readings.results, method):
        return False
    return min(tried) < lr < max(tried)


def is_outdated(readings: Readings, method: str, data: str) -> bool:
    """Whether it was measured with settings that the study would not use now."""
    return readings.adapter(method, data) != current_settings()[method]


def outdated(readings: Readings, methods: Sequence[str], data: str) -> list[str]:
    """The methods that were measured with other settings than the study would use now."""
    found = []
    for method in methods:
        try:
            if is_outdated(readings, method, data):
                found.append(method)
        except Missing:
            continue
    return found


@cache
def current_settings() -> dict[str, dict[str, Any]]:
    """The adapter settings of every run of the study, by name."""
    chosen = contenders([])
    return {
        c.name: recipe_of(c, EMBEDDED, Budget.steps, 0, rates.CENTRE, Path("unused")).to_dict()[
            "adapter"
        ]
        for c in (*chosen, *extras(chosen))
    }
