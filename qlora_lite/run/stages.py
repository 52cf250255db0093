"""The memory of every ZeRO stage for a recipe, and which stage to use."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qlora_lite.foundation.errors import RecipeError
from qlora_lite.memory.measure import available_bytes
from qlora_lite.memory.plan import Plan
from qlora_lite.offload.settings import NoOffload, ZeRO1, ZeRO2, ZeRO3
from qlora_lite.run.offloading import require_compatible
from qlora_lite.run.planning import plan_memory
from qlora_lite.run.setup import RunSetup

STAGES: dict[str, NoOffload | ZeRO1 | ZeRO2 | ZeRO3] = {
    "offload=none": NoOffload(),
    "offload=zero1": ZeRO1(),
    "offload=zero2": ZeRO2(),
    "offload=zero3": ZeRO3(),
    "offload=zero3 offload.parameters=cpu": ZeRO3(parameters="cpu"),
    "offload=zero3 offload.parameters=cpu offload.optimizer=cpu": ZeRO3(
        parameters="cpu", optimizer="cpu"
    ),
}
"""By the settings on the command line, fastest first: each moves more between processes, or between
the card and the host."""


@dataclass(frozen=True)
class Stage:
    """A stage with the memory of one of its processes."""

    setting: str
    """As on the command line."""
    plan: Plan | None
    """None if the recipe cannot use this stage."""
    problem: str
    """Why it cannot."""
    num_processes: int
    """On one machine."""
    is_on_cpu: bool
    host_budget_bytes: int | None
    """Main memory of this machine that is free; None if the card is in another one."""

    @property
    def card_bytes(self) -> int:
        """Memory of a card: 0 on CPU."""
        return 0 if self.plan is None or self.is_on_cpu else self.plan.peak_bytes

    @property
    def host_bytes(self) -> int:
        """Main memory of all processes."""
        if self.plan is None:
            return 0
        ledger = self.plan.ledger
        return self.num_processes * (ledger.peak_bytes if self.is_on_cpu else ledger.host_bytes)

    @property
    def fits(self) -> bool:
        """Whether every process fits into its budget, and all of them into this machine."""
        if self.plan is None or not self.plan.fits:
            return False
        return self.host_budget_bytes is None or self.host_bytes <= self.host_budget_bytes


def plan_stages(setup: RunSetup, processes: int) -> list[Stage]:
    """The plans of `STAGES` for so many processes on one machine.

    Raises:
        BudgetError: if there is no budget and no card to read the free memory from.
    """
    on_cpu = setup.rule.device.type == "cpu"
    has_host = setup.rule.is_available and not on_cpu
    free = available_bytes(torch.device("cpu")) if has_host else None
    stages = []
    for setting, offload in STAGES.items():
        changed = replace(setup, recipe=setup.recipe.model_copy(update={"offload": offload}))
        plan, problem = None, ""
        try:
            if not isinstance(offload, NoOffload):
                require_compatible(changed)
            plan = plan_memory(changed, processes=processes)
        except RecipeError as error:
            problem = str(error)
        stages.append(Stage(setting, plan, problem, processes, on_cpu, free))
    return stages


def recommended(stages: Sequence[Stage]) -> Stage | None:
    """The fastest stage that fits; None if none does."""
    return next((stage for stage in stages if stage.fits), None)
