"""How a run computes: chosen when it starts, and read from its record from then on.

On a CPU, `base.compute=auto` is bf16 if that is clearly faster here, and fp32 otherwise. The
library of fp32 products is chosen in the same way. To resume, merge, score or chat, nothing is
chosen again: it would change results, also on a processor where another choice is faster.
"""

import dataclasses

import torch

from qlora_lite.foundation import device as devices
from qlora_lite.foundation.device import DTYPES, NAMES, DeviceRule
from qlora_lite.foundation.errors import DeviceError
from qlora_lite.foundation.processes import current
from qlora_lite.kernels.product import has_onednn
from qlora_lite.kernels.speed import bf16_speedup, has_bf16_units, onednn_speedup
from qlora_lite.recipe import Recipe
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.records import Computing

CLEARLY_FASTER = 1.5
"""Speed-up from which bf16 is worth its roundings. It is above 4 with bf16 units, and below 1
without."""
FASTER_PRODUCTS = 1.25
"""Speed-up from which oneDNN multiplies in fp32. It is 2.3 on AMD with AVX-512. A small one, as
with AVX2, would differ between two measurements."""


def new_rule(recipe: Recipe, *, allow_absent: bool = False) -> DeviceRule:
    """The rule for a run that starts on this machine, or for its plan.

    Raises:
        DeviceError: as `device.choose`.
    """
    rule = devices.choose(recipe.device, recipe.base.compute, allow_absent=allow_absent)
    if rule.device.type == "cpu" and recipe.base.compute == "auto":
        rule = _with_fast_compute(rule)
    return with_fast_products(rule)


def _with_fast_compute(rule: DeviceRule) -> DeviceRule:
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


def with_fast_products(rule: DeviceRule) -> DeviceRule:
    """The rule with the faster library for fp32 products on CPU."""
    if rule.device.type != "cpu" or rule.compute != torch.float32:
        return rule
    if (speedup := onednn_speedup()) < FASTER_PRODUCTS:
        return rule
    why = f"oneDNN is {speedup:.1f} times as fast as torch's own products"
    reason = f"{rule.reason}; {why}" if rule.reason else why
    return dataclasses.replace(rule, products="onednn", reason=reason)


def rule_of_run(recipe: Recipe, folder: RunFolder, device: str | None = None) -> DeviceRule:
    """The rule of a run that may have started: as recorded, if it started on a CPU and is on one.

    Args:
        device: instead of the recipe's.

    Raises:
        RunError: if the record is damaged.
        DeviceError: as `device.choose`; or if one card is named for several processes.
    """
    recipe = recipe.model_copy(update={"device": device or recipe.device})
    if current().world > 1 and ":" in recipe.device:
        raise DeviceError(
            f"got device={recipe.device} for {current().world} processes, and each uses a card of "
            "its own. Use device=cuda, and CUDA_VISIBLE_DEVICES to choose cards"
        )
    recorded = folder.computing
    rule = devices.choose(recipe.device, recipe.base.compute)
    if rule.device.type != "cpu" or recorded is None or recorded.device != "cpu":
        return new_rule(recipe)
    return dataclasses.replace(
        rule,
        compute=DTYPES[recorded.compute],
        products=recorded.products if has_onednn() else "torch",
        reason="as when the run started",
    )


def computing_of(rule: DeviceRule) -> Computing:
    """What is recorded of a rule."""
    return Computing.model_validate(
        {
            "device": rule.device.type,
            "compute": NAMES[rule.compute],
            "products": rule.products,
        }
    )


def slow_bf16(rule: DeviceRule) -> list[str]:
    """A note if a run computes in bf16 on a processor without units for it."""
    if rule.device.type != "cpu" or rule.compute != torch.bfloat16 or has_bf16_units():
        return []
    return [
        "the run computes in bf16, and this processor has no bf16 units: products are 10 to 80 "
        "times as slow as in fp32. Use a processor with them, or a run with base.compute=fp32"
    ]
