"""The results by method and data set, as lists with one value per seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from method_study import rates
from method_study.material import EMBEDDED
from method_study.results import Key, Results, Values

FIRST_SHARE = 0.25
"""Share of the steps in the mean loss of the first steps."""


class Missing(LookupError):
    """A value was not measured or its run failed; claims that need it are left out."""


@dataclass(frozen=True)
class Readings:
    """Typed access to the results."""

    results: Results
    seeds: int

    def cost(self, method: str) -> Values:
        """Seconds and bytes of a step."""
        return self._one(Key("cost", method, EMBEDDED.name))

    def runs(self, method: str, data: str) -> list[Values]:
        """The runs of a method, by seed."""
        return [self._one(Key("run", method, data, seed)) for seed in range(self.seeds)]

    def lr(self, method: str, data: str) -> float:
        """The learning rate of the runs of a method."""
        lr: float = self._settings(method, data)["lr"]
        return lr

    def adapter(self, method: str, data: str) -> Values:
        """The adapter settings of the runs of a method."""
        adapter: Values = self._settings(method, data)["adapter"]
        return adapter

    def losses(self, method: str, data: str) -> list[float]:
        """Held-out loss after training."""
        return [run["loss"] for run in self.runs(method, data)]

    def starts(self, method: str, data: str) -> list[float]:
        """Held-out loss before training."""
        return [run["start"] for run in self.runs(method, data)]

    def first_steps(self, method: str, data: str) -> list[float]:
        """Mean training loss of the first quarter of the steps."""
        return [mean(first_part(run["losses"])) for run in self.runs(method, data)]

    def step_seconds(self, method: str, data: str) -> list[float]:
        """Seconds of a run's median step."""
        return [run["step_seconds"] for run in self.runs(method, data)]

    def by_rank(self, method: str, data: str) -> list[list[float]]:
        """Held-out losses of an adapter truncated to ranks 1, 2, ... 8."""
        keys = [Key("ranks", method, data, seed) for seed in range(self.seeds)]
        return [self._one(key)["losses"] for key in keys]

    def rate(self, kind: str) -> float:
        """The learning rate of a method."""
        if not rates.tried(self.results, kind):
            raise Missing(kind)
        return rates.best_rate(self.results, kind)

    def failures(self, method: str, data: str) -> list[str]:
        """Why runs of a method stopped."""
        keys = [Key("run", method, data, seed) for seed in range(self.seeds)]
        found = [self.results.values(key) or {} for key in keys]
        return [values["failed"] for values in found if "failed" in values]

    def _settings(self, method: str, data: str) -> Values:
        key = Key("run", method, data)
        self._one(key)
        settings: Values = self.results.lines[key]["settings"]
        return settings

    def _one(self, key: Key) -> Values:
        values = self.results.values(key)
        if values is None or "failed" in values:
            raise Missing(str(key))
        return values


def first_part(losses: Sequence[float]) -> Sequence[float]:
    """The losses of the first steps."""
    return losses[: max(1, math.ceil(len(losses) * FIRST_SHARE))]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)
