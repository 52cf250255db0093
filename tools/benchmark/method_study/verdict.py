"""When a difference is significant.

Runs with the same seed see the same rows in the same order and are scored on the same held-out
rows, so methods are compared seed by seed. The confidence interval of the mean difference is

    mean +- t s / sqrt(n)          s over the n seeds, t of Student's distribution, one-sided 95 %

"Better" is confirmed if the whole interval is on the good side, "as good as" if all of it is above
a loss of `MARGIN`. A claim is not confirmed if the whole interval is on the other side, and
undecided otherwise. Of twenty false "better" claims, one is confirmed by chance. Runs that must not
be compared (comparable.py) get no verdict.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal[
    "confirmed", "not confirmed at this size", "undecided", "one seed has no spread", "no verdict"
]

MIN_DIFFERENCE = 0.001
"""Nats per token that "better" requires; without noise any smaller difference would be enough."""

MARGIN = 0.01
"""Nats per token that are negligible."""

STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)
"""t at 1, 2, ... degrees of freedom, one-sided 95 %; the last value is used beyond that."""


@dataclass(frozen=True)
class Finding:
    """A claim of a paper, and its result here."""

    claim: str
    data: str
    measured: str
    verdict: Verdict
    reason: str = ""
    """Why there is no verdict."""


def is_above(values: Sequence[float], limit: float = 0.0) -> Verdict:
    """Whether the mean is significantly above the limit."""
    if len(values) < 2:
        return "one seed has no spread"
    student = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    error = student * statistics.stdev(values) / math.sqrt(len(values))
    above = statistics.mean(values) - limit
    if above > error:
        return "confirmed"
    return "undecided" if above + error > 0 else "not confirmed at this size"


def is_not_below(values: Sequence[float]) -> Verdict:
    """Whether the mean is significantly above a negligible loss."""
    return is_above(values, -MARGIN)


def differences(higher: Sequence[float], lower: Sequence[float]) -> list[float]:
    """Seed by seed."""
    return [h - low for h, low in zip(higher, lower, strict=True)]


def mean_and_spread(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """`3.412 ± 0.010`: mean and standard deviation."""
    text = f"{statistics.mean(values):{sign}.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"
