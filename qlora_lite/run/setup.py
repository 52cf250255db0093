"""What follows from a recipe on this machine: device, facts of the base, and what is trained.

Made once per command, and passed to the memory plan, the checks, loading and attaching.
"""

from dataclasses import dataclass

import torch

from qlora_lite.adapters.method import Method, Requirement
from qlora_lite.adapters.plan import AdapterPlan, plan_adapter
from qlora_lite.adapters.split_state import require_original
from qlora_lite.foundation import device as devices
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.foundation.errors import RecipeError
from qlora_lite.memory.known import known_config
from qlora_lite.methods.catalogue import method_for
from qlora_lite.model.facts import BaseFacts, read_facts
from qlora_lite.model.prequantised import own_quant
from qlora_lite.model.quant import BF16, FP32
from qlora_lite.recipe import Recipe


@dataclass(frozen=True)
class RunSetup:
    """A recipe, and what follows from it before a weight is read."""

    recipe: Recipe
    rule: DeviceRule
    facts: BaseFacts
    method: Method
    adapter: AdapterPlan

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Storage dtype of the trained parameters. ZeRO keeps masters of others by itself, and
        refuses groups of several dtypes."""
        if self.recipe.offload.kind != "none":
            return torch.float32
        return devices.DTYPES.get(self.recipe.adapter.dtype, self.rule.adapters)


def set_up(
    recipe: Recipe,
    rule: DeviceRule,
    *,
    needs_config: bool = True,
    facts: BaseFacts | None = None,
) -> RunSetup:
    """Read the base's config and decide what will be trained.

    Args:
        needs_config: False if the dimensions of a known model are enough, so that a plan needs no
            network.
        facts: of the base; read here unless given.

    Raises:
        BaseModelError: if the base cannot be found.
        AdapterError: if the targets match nothing.
        RecipeError: if the method needs another kind of base.
    """
    method = method_for(recipe.adapter)
    _require_quantised_base(recipe, method)
    known = None if needs_config else known_config(recipe.base.model)
    facts = facts or read_facts(recipe.base, known)
    require_original(method, is_packed=own_quant(facts.config) is not None)
    return RunSetup(recipe, rule, facts, method, plan_adapter(method, facts))


def _require_quantised_base(recipe: Recipe, method: Method) -> None:
    quant = recipe.base.quant
    if Requirement.QUANTISATION_ERROR in method.requires and isinstance(quant, BF16 | FP32):
        raise RecipeError(
            f"adapter={recipe.adapter.kind} starts from the quantisation error, and "
            f"base.quant={quant.kind} has none. Use base.quant=nf4, fp4 or int8, or adapter=lora"
        )
