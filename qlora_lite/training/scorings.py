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

FEWEST, MOST = 2, 11
"""Scorings of a run: before and after it, or at its start and after every tenth."""


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
    if num_rows is None:
        num_rows = evaluation.rows or (len(lengths) if every is not None else None)
    if num_rows is None:
        rows = _within(lengths, budget / FEWEST)
    else:
        rows = _spread(len(lengths), num_rows)
    total = max(sum(lengths[i] for i in rows), 1)
    times = min(max(int(budget / total), FEWEST), MOST, steps + 1)
    return Scorings(every or math.ceil(steps / (times - 1)), rows)


def _spread(num: int, chosen: int) -> list[int]:
    """`chosen` of `num` positions, evenly spread; all if there are fewer."""
    chosen = min(chosen, num)
    return [(2 * i + 1) * num // (2 * chosen) for i in range(chosen)]


def _within(lengths: Sequence[int], max_tokens: float) -> list[int]:
    """About as many rows as have at most so many tokens; at least one."""
    rows = _spread(len(lengths), len(lengths))
    while len(rows) > 1 and sum(lengths[i] for i in rows) > max_tokens:
        rows = _spread(len(lengths), len(rows) * 19 // 20)
    return rows
