"""Learning rates as pure functions of the step, so that a resumed run follows the same curve."""

import math
from typing import Literal

ScheduleName = Literal["cosine", "linear", "constant"]


def warmup_steps(warmup: float, total: int) -> int:
    """A share of the run if below 1, a number of steps otherwise."""
    return round(warmup * total) if warmup < 1 else min(int(warmup), total)


def lr_factor(step: int, total: int, warmup: int, schedule: ScheduleName, floor: float) -> float:
    """The factor on the learning rate in optimizer step `step` of `total`, both from 0.

    Rises linearly over `warmup` steps, then falls towards `floor`, which only the step after the
    last one would have. So no step has a rate of 0.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * min(1.0, done))) if schedule == "cosine" else 1 - done
    return floor + (1 - floor) * max(0.0, shape)
