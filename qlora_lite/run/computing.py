"""The device rule of a run: chosen when it starts, and read from its record from then on.

On a CPU, `base.compute=auto` is bf16 if that is clearly faster here, and fp32 otherwise. To resume,
merge, score or chat, the choice is not made again: it would change results, also on a processor
where the other one is faster.
"""

import dataclasses

import torch

from qlora_lite.foundation import device as devices
from qlora_lite.foundation.device import DTYPES, NAMES, DeviceRule
from qlora_lite.kernels.speed import bf16_speedup, has_bf16_units
from qlora_lite.recipe import Recipe
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.records import Computing

CLEARLY_FASTER = 1.5
"""Speed-up from which bf16 is worth its roundings. It is above 4 with bf16 units, and below 1
without."""


def new_rule(recipe: Recipe, *, allow_absent: bool = False) -> DeviceRule:
    """The rule for a run that starts on this machine, or for its plan.

    Raises:
        DeviceError: as `device.choose`.
    """
    rule = devices.choose(recipe.device, recipe.base.compute, allow_absent=allow_absent)
    if rule.device.type != "cpu" or recipe.base.compute != "auto":
        return rule
    speedup = bf16_speedup()
    if not speedup:
        return dataclasses.replace(rule, reason="base.compute=auto: no bf16 units here")
    is_faster = speedup >= CLEARLY_FASTER
    times = f"{speedup:.1f} times" if is_faster else f"only {speedup:.1f} times"
    return dataclasses.replace(
        rule,
        compute=torch.bfloat16 if is_faster else torch.float32,
        reason=f"base.compute=auto: bf16 is {times} as fast as fp32 here",
    )


def rule_of_run(recipe: Recipe, folder: RunFolder, device: str | None = None) -> DeviceRule:
    """The rule of a run that may have started: as recorded, if it started on a CPU and is on one.

    Args:
        device: instead of the recipe's.

    Raises:
        RunError: if the record is damaged.
        DeviceError: as `device.choose`.
    """
    recipe = recipe.model_copy(update={"device": device or recipe.device})
    recorded = folder.computing
    rule = devices.choose(recipe.device, recipe.base.compute)
    if rule.device.type != "cpu" or recorded is None or recorded.device != "cpu":
        return new_rule(recipe)
    return dataclasses.replace(
        rule, compute=DTYPES[recorded.compute], reason="compute as when the run started"
    )


def computing_of(rule: DeviceRule) -> Computing:
    """What is recorded of a rule."""
    return Computing.model_validate({"device": rule.device.type, "compute": NAMES[rule.compute]})


def slow_bf16(rule: DeviceRule) -> list[str]:
    """A note if a run computes in bf16 on a processor without units for it."""
    if rule.device.type != "cpu" or rule.compute != torch.bfloat16 or has_bf16_units():
        return []
    return [
        "the run computes in bf16, and this processor has no bf16 units: products are 10 to 80 "
        "times as slow as in fp32. Use a processor with them, or a run with base.compute=fp32"
    ]
