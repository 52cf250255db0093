"""When a difference counts.

Runs of one seed see the same rows in the same order and are scored on the same held-out rows, so
methods are compared seed by seed, and the mean difference is held against its error: it lies within

    mean +- t s / sqrt(n)          s over the n seeds, t of Student's distribution, one-sided 95 %

"Better" shows if all of that is on the good side, "as good as" if all of it is above a loss of
`MARGIN`. What is on the other side altogether fails; everything else is undecided. Of twenty
"better" claims that are not true, one shows by chance.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["shows", "does not show at this size", "undecided", "one seed has no spread"]

LEAST = 0.001
"""Nats a token by which something must be better: with no noise at all, less would show."""

MARGIN = 0.01
"""Nats a token that count as nothing."""

STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)
"""t of 1, 2, ... degrees of freedom at 95 %, one-sided; with more it is a little less."""


@dataclass(frozen=True)
class Finding:
    """A claim of a paper, and what became of it here."""

    claim: str
    data: str
    measured: str
    verdict: Verdict


def is_above(values: Sequence[float], limit: float = 0.0) -> Verdict:
    """Whether the mean is above the limit, for all that is known of it."""
    if len(values) < 2:
        return "one seed has no spread"
    student = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    error = student * statistics.stdev(values) / math.sqrt(len(values))
    above = statistics.mean(values) - limit
    if above > error:
        return "shows"
    return "undecided" if above + error > 0 else "does not show at this size"


def is_not_below(values: Sequence[float]) -> Verdict:
    """Whether the mean is above a loss that counts as nothing."""
    return is_above(values, -MARGIN)


def differences(higher: Sequence[float], lower: Sequence[float]) -> list[float]:
    """Seed by seed."""
    return [h - low for h, low in zip(higher, lower, strict=True)]


def spoken(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """`3.412 ± 0.010`: mean and spread."""
    text = f"{statistics.mean(values):{sign}.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"
