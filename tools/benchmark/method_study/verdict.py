"""When a difference counts.

Runs of one seed see the same rows in the same order and are scored on the same held-out rows, so
methods are compared seed by seed. A claim shows if the mean of these differences is larger than
their spread (the standard deviation over the seeds); "no worse" shows unless the mean is worse by
more than the spread.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["shows", "does not show at this size", "one seed has no spread"]


@dataclass(frozen=True)
class Finding:
    """A claim of a paper, and what became of it here."""

    claim: str
    data: str
    measured: str
    verdict: Verdict


def is_above(values: Sequence[float], limit: float = 0.0) -> Verdict:
    """Whether the mean is above the limit by more than the spread."""
    return _verdict(values, limit, sign=-1)


def is_not_below(values: Sequence[float], limit: float = 0.0) -> Verdict:
    """Whether the mean is above the limit, or below it by no more than the spread."""
    return _verdict(values, limit, sign=1)


def _verdict(values: Sequence[float], limit: float, sign: int) -> Verdict:
    if len(values) < 2:
        return "one seed has no spread"
    margin = statistics.mean(values) - limit + sign * statistics.stdev(values)
    holds = margin > 0 if sign < 0 else margin >= 0
    return "shows" if holds else "does not show at this size"


def differences(higher: Sequence[float], lower: Sequence[float]) -> list[float]:
    """Seed by seed."""
    return [h - low for h, low in zip(higher, lower, strict=True)]


def spoken(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """`3.412 ± 0.010`: mean and spread."""
    text = f"{statistics.mean(values):{sign}.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"
