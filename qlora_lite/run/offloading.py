"""Start what `offload` asks for, and refuse what does not go together with it."""

from collections.abc import Callable

import torch
from torch import nn

from qlora_lite.adapters.method import Requirement
from qlora_lite.foundation.errors import RecipeError
from qlora_lite.memory.formulas import FP32
from qlora_lite.memory.zero_terms import ZeroShape
from qlora_lite.offload.settings import NoOffload
from qlora_lite.offload.zero import (
    configuration,
    partitioner,
    require_available,
    require_valid,
    start,
)
from qlora_lite.run.setup import RunSetup


def start_offload(setup: RunSetup) -> Callable[[nn.Module], None] | None:
    """Start DeepSpeed if the recipe asks for it. Returns the function that divides the base's
    weights among the processes, under stage 3.

    Raises:
        RecipeError: if other settings contradict `offload`.
        DeviceError: if a package is missing.
    """
    offload = setup.recipe.offload
    if isinstance(offload, NoOffload):
        return None
    require_compatible(setup)
    config = configuration(offload, setup.recipe.optim.max_grad_norm, setup.rule.device)
    require_available(config)
    start(setup.rule.device)
    if offload.config is not None:
        require_valid(config, offload.config)
    return partitioner(config) if offload.stage == 3 else None


def zero_shape(setup: RunSetup, num_trained: int) -> ZeroShape | None:
    """What the memory of a run depends on in its DeepSpeed configuration; None without DeepSpeed.

    Raises:
        RecipeError: if `offload.config` contradicts the recipe.
    """
    offload, device = setup.recipe.offload, setup.rule.device
    if isinstance(offload, NoOffload):
        return None
    config = configuration(offload, setup.recipe.optim.max_grad_norm, device, num_trained)
    zero = config["zero_optimization"]
    moved = {name: zero.get(f"offload_{name}") or {} for name in ("optimizer", "param")}
    swaps = moved["param"] if moved["param"].get("device") == "nvme" else {}
    return ZeroShape(
        stage=zero["stage"],
        optimizer=moved["optimizer"].get("device", "none"),
        parameters=moved["param"].get("device", "none"),
        bucket_numbers=int(zero["reduce_bucket_size"]),
        num_buckets=2 if zero["overlap_comm"] and zero["stage"] < 3 else 1,
        live_numbers=int(zero.get("stage3_max_live_parameters", 0)),
        swap_bytes=FP32 * int(swaps.get("buffer_count", 0)) * int(swaps.get("buffer_size", 0)),
    )


def require_compatible(setup: RunSetup) -> None:
    """Check the settings that ZeRO does not support.

    Raises:
        RecipeError: naming the setting and the nearest one that works.
    """
    recipe, compute = setup.recipe, setup.rule.compute
    kind = recipe.offload.kind
    if compute is torch.float16:
        raise RecipeError(
            f"offload={kind} does not scale the loss, which fp16 needs. Use base.compute=fp32, or "
            "offload=none"
        )
    if recipe.adapter.dtype == "bf16":
        raise RecipeError(
            f"got adapter.dtype=bf16, and offload={kind} trains adapters in fp32. Use "
            "adapter.dtype=auto"
        )
    if recipe.optim.states not in ("auto", "32bit"):
        raise RecipeError(
            f"got optim.states={recipe.optim.states}, and offload={kind} keeps states in fp32, "
            "divided among the processes. Use optim.states=auto"
        )
    if recipe.optim.rounding == "stochastic":
        raise RecipeError(
            f"got optim.rounding=stochastic, and offload={kind} trains adapters in fp32, which "
            "need no rounding. Use optim.rounding=master"
        )
    if kind == "zero3":
        _require_head_in_forward_only(setup)


def _require_head_in_forward_only(setup: RunSetup) -> None:
    """Check that backward does not compute logits again with a frozen head: it is gathered in
    forward only, and processes have different numbers of chunks.

    Raises:
        RecipeError: if it would.
    """
    head, adapter = setup.facts.shape.head.module, setup.adapter
    if any(spec.path == head for spec in adapter.specs):
        raise RecipeError(
            f"adapter.targets includes the head ({head}), whose weight offload=zero3 divides among "
            f"the processes. Use offload=zero2, or adapter.train_modules='[\"{head}\"]'"
        )
    if head in adapter.full_modules and Requirement.TEACHER_OUTPUT in setup.method.requires:
        raise RecipeError(
            f"adapter={setup.recipe.adapter.kind} compares with the frozen head, which "
            f"offload=zero3 divides among the processes, and {head} is trained. Use offload=zero2, "
            f"or leave {head} out of adapter.train_modules"
        )
