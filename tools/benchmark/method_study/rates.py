"""The learning rate of a method: the best of three, on rows that are not scored later.

These rows are set aside from the training rows, with a separate seed.
"""

import math

from method_study.material import EMBEDDED
from method_study.results import Key, Results

SEED = 1000
SET_ASIDE = ("data.heldout=null", "data.heldout_share=0.04")
CENTRE = 4e-3
FACTORS = (0.25, 1.0, 4.0)

CENTRES = {
    # B has 16 times the rate: loss 3.348 at 1e-3, 3.527 at 4e-3
    "lora_plus": 1e-3,
    # its singular values start at zero, between small factors: 3.429 at 4e-3, 3.332 at 1.6e-2
    "adalora": 1.6e-2,
}
"""For methods whose best rate is far from that of LoRA (loss 3.386 at 1e-3, 3.330 at 4e-3, 3.384 at
1.6e-2, after 40 steps)."""


def rates_of(kind: str) -> tuple[float, ...]:
    """The rates to try, ascending."""
    return tuple(CENTRES.get(kind, CENTRE) * factor for factor in FACTORS)


def rate_key(kind: str, lr: float) -> Key:
    """The run that tries a rate."""
    return Key(f"rate {lr:g}", kind, EMBEDDED.name, SEED)


def tried(results: Results, kind: str) -> dict[float, float]:
    """Held-out loss by rate; infinite where the run failed."""
    found: dict[float, float] = {}
    for lr in rates_of(kind):
        values = results.values(rate_key(kind, lr))
        if values is not None:
            found[lr] = values.get("loss", math.inf)
    return found


def best_rate(results: Results, kind: str) -> float:
    """The rate with the lowest held-out loss."""
    losses = tried(results, kind)
    return min(losses, key=losses.__getitem__)
