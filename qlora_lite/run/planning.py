"""Will a recipe fit? Nothing is downloaded but `config.json`."""

import fnmatch

from qlora_lite.adapters.attach import choose
from qlora_lite.adapters.catalogue import method_for
from qlora_lite.foundation import device as devices
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.foundation.errors import BudgetError
from qlora_lite.foundation.units import parse_bytes
from qlora_lite.memory.known import known_config
from qlora_lite.memory.ledger import RunShape
from qlora_lite.memory.measure import available_bytes
from qlora_lite.memory.plan import Plan, make_plan
from qlora_lite.model.quant import NF4, FourBit
from qlora_lite.model.shape import ModelShape, model_shape, read_config
from qlora_lite.model.targets import specs_of_shape
from qlora_lite.recipe import Recipe


def plan_recipe(recipe: Recipe, rule: DeviceRule | None = None) -> Plan:
    """The memory plan of a recipe, against its budget or what the device has free.

    Raises:
        QloraLiteError: if the base cannot be found, or the targets match nothing.
    """
    rule = rule or devices.choose(recipe.device, recipe.base.compute, is_imagined=True)
    config = read_config(
        recipe.base.model,
        recipe.base.revision,
        recipe.base.trust_remote_code,
        known=known_config(recipe.base.model),
    )
    shape = model_shape(config, recipe.base.trust_remote_code)
    return make_plan(shape, run_shape(recipe, shape, rule), _budget(recipe, rule))


def _budget(recipe: Recipe, rule: DeviceRule) -> int:
    if recipe.budget:
        return parse_bytes(recipe.budget)
    if not rule.is_here:
        raise BudgetError(
            "got device=cuda on a machine without a CUDA card, so its memory is not known. "
            'Say how much there is: budget="22GiB" for a card of 24 GB'
        )
    return available_bytes(rule.device)


def run_shape(recipe: Recipe, model: ModelShape, rule: DeviceRule) -> RunShape:
    """What a recipe's settings mean for memory."""
    adapter, quant, optim = recipe.adapter, recipe.base.quant, recipe.optim
    method = method_for(adapter)
    whole = _whole_modules(model, adapter.train_modules)
    choose(specs_of_shape(model), method, whole)
    adapter_dtype = devices.DTYPES.get(adapter.dtype, rule.adapters)
    four_bit = quant if isinstance(quant, FourBit) else NF4()
    return RunShape(
        device="cuda" if rule.device.type == "cuda" else "cpu",
        quant=quant.kind,
        double_quant=four_bit.double_quant,
        block_size=four_bit.block_size,
        ranks={path: plan.rank for path, plan in method.plans.items()},
        max_tokens=recipe.data.max_tokens,
        tokens_per_step=optim.tokens_per_step,
        head=recipe.base.head,
        compute_bytes=rule.compute.itemsize,
        storage_bytes=4 if quant.kind == "fp32" else rule.storage.itemsize,
        norm_bytes=rule.norms.itemsize,
        adapter_bytes=adapter_dtype.itemsize,
        states=rule.optimizer_states if optim.states == "auto" else optim.states,
        rounding=optim.rounding,
        embedding_rank=adapter.embedding_rank,
        whole_parameters=_num_whole(model, whole, adapter.train_norms),
        checkpointing=optim.checkpointing,
        attention="sdpa" if recipe.base.attention == "auto" else recipe.base.attention,
        micro_batch_tokens=optim.micro_batch_tokens,
    )


def _whole_modules(model: ModelShape, names: list[str]) -> list[str]:
    modules = dict.fromkeys(p.module for p in model.parameters)
    return [
        path
        for path in modules
        for name in names
        if fnmatch.fnmatch(path, name) or path.rpartition(".")[2] == name
    ]


def _num_whole(model: ModelShape, modules: list[str], norms: bool) -> int:
    return sum(
        p.num_weights
        for p in model.parameters
        if p.module in modules or (norms and p.role == "norm")
    )
