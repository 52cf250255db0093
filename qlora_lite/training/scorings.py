"""How often held-out rows are scored during a run, and how many of them.

Unless the recipe asks for more, scoring takes at most a tenth of the run: first it is done less
often, down to the first and the last step, then with fewer rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_lite.training.settings import Evaluation

MAX_SHARE = 0.1
"""Of the run's arithmetic that goes into scoring."""

MOST = 11
"""Scorings of a run: at the start, and after every tenth."""


@dataclass(frozen=True)
class Scorings:
    """Which rows are scored when."""

    every: int
    """Steps between two scorings; the start and the last step are scored as well."""

    rows: Sequence[int]
    """Positions of the scored rows among the held-out rows."""


def choose_scorings(
    evaluation: Evaluation,
    lengths: Sequence[int],
    *,
    steps: int,
    tokens_per_step: int,
    checkpointing: bool,
    num_rows: int | None = None,
) -> Scorings:
    """Choose so that the run's time is spent on training.

    A trained token costs a forward and a backward of about the same size (the base is frozen), and
    with checkpointing a second forward; a scored token costs one forward.

    Args:
        lengths: tokens of each held-out row.
        num_rows: how many rows an earlier process of this run scored.
    """
    every = evaluation.every
    forwards = steps * tokens_per_step * (3 if checkpointing else 2)
    budget = forwards * MAX_SHARE / (1 - MAX_SHARE)  # tokens that may be scored
    total = max(sum(lengths), 1)
    times = min(max(int(budget / total), 2), MOST, steps + 1)
    if num_rows is None:
        is_asked_for = every is not None
        share = 1.0 if is_asked_for else min(budget / (times * total), 1.0)
        num_rows = evaluation.rows or max(int(share * len(lengths)), 1)
    num_rows = min(num_rows, len(lengths))
    rows = [i * len(lengths) // num_rows for i in range(num_rows)]
    return Scorings(every or math.ceil(steps / (times - 1)), rows)
