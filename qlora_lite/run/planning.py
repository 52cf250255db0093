"""Will a recipe fit? Nothing is downloaded but `config.json`."""

from pathlib import Path

from transformers.configuration_utils import PretrainedConfig

from qlora_lite.adapters.attach import choose, match_modules
from qlora_lite.adapters.method import Requirement
from qlora_lite.adapters.ranks import beyond_the_last, last_block
from qlora_lite.adapters.warm_start import require_adapter
from qlora_lite.foundation import device as devices
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.foundation.errors import BudgetError, RecipeError
from qlora_lite.foundation.units import parse_bytes
from qlora_lite.memory.known import known_config
from qlora_lite.memory.ledger import RunShape
from qlora_lite.memory.measure import available_bytes
from qlora_lite.memory.plan import Plan, make_plan
from qlora_lite.methods.catalogue import method_for
from qlora_lite.model.config import read_config
from qlora_lite.model.quant import BF16, FP32, NF4, FourBit
from qlora_lite.model.shape import ModelShape, model_shape
from qlora_lite.model.targets import specs_of_shape
from qlora_lite.recipe import Recipe

NO_BUDGET = "no budget=... is given, so that is what the device has free now"


def plan_recipe(recipe: Recipe, rule: DeviceRule | None = None) -> Plan:
    """The memory plan of a recipe, against its budget or what the device has free.

    Raises:
        QloraLiteError: if the base cannot be found, the targets match nothing, or the method needs
            another kind of base.
    """
    _require_what_the_method_needs(recipe)
    rule = rule or devices.choose(recipe.device, recipe.base.compute, is_imagined=True)
    shape = model_shape(_config(recipe), recipe.base.trust_remote_code)
    return make_plan(shape, run_shape(recipe, shape, rule), _budget(recipe, rule))


def _require_what_the_method_needs(recipe: Recipe) -> None:
    requires, quant = method_for(recipe.adapter).requires, recipe.base.quant
    if Requirement.QUANTISATION_ERROR in requires and isinstance(quant, BF16 | FP32):
        raise RecipeError(
            f"adapter={recipe.adapter.kind} starts at the quantisation error, and with "
            f"base.quant={quant.kind} there is none. Take base.quant=nf4, fp4 or int8, or "
            "adapter=lora"
        )


def _config(recipe: Recipe) -> PretrainedConfig:
    base = recipe.base
    known = known_config(base.model)
    return read_config(base.model, base.revision, base.trust_remote_code, known=known)


def _budget(recipe: Recipe, rule: DeviceRule) -> int:
    if recipe.budget:
        return parse_bytes(recipe.budget)
    if not rule.is_here:
        raise BudgetError(
            "got device=cuda on a machine without a CUDA card, so its memory is not known. "
            'Say how much there is: budget="22GiB" for a card of 24 GB'
        )
    return available_bytes(rule.device)


def check_settings(recipe: Recipe) -> list[str]:
    """What is wrong with settings that depend on each other, before anything large is read.

    Returns notes about settings that have no effect.

    Raises:
        AdapterError: if there is no adapter to start from.
        RecipeError: if rows may be longer than the model can read.
    """
    if recipe.adapter.start:
        require_adapter(Path(recipe.adapter.start))
    notes = [*_check_context(recipe), *_check_ranks(recipe)]
    if Requirement.ORIGINAL_WEIGHTS in method_for(recipe.adapter).requires:
        notes.append(
            f"adapter={recipe.adapter.kind} with these settings changes the base's own weights: it "
            "leaves as merged weights (qlora-lite merge), not as a PEFT adapter"
        )
    if recipe.evaluation.patience and not recipe.data.heldout and not recipe.data.heldout_share:
        notes.append("evaluation.patience has no effect: no rows are held out to score")
    return notes


def _check_context(recipe: Recipe) -> list[str]:
    """Rows that are longer than the model's context: a note where it may still read them.

    Raises:
        RecipeError: if its positions are learned, so that there is none for a longer row.
    """
    config = _config(recipe)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = recipe.data.max_tokens
    if context is None or longest <= context:
        return []
    told = f"data.max_tokens={longest}, and {recipe.base.model} was trained on {context} positions"
    shape = model_shape(config, recipe.base.trust_remote_code)
    # a packed bin may be longer than the context; a row must not be, and a row may fill a bin
    if sum(p.role == "embedding" for p in shape.parameters) > 1:
        raise RecipeError(
            f"{told}, which are learned: it has none for a longer row. "
            f"Take data.max_tokens={context} or less"
        )
    return [f"{told}: longer rows are read as well as its rotary positions extrapolate"]


def _check_ranks(recipe: Recipe) -> list[str]:
    """Notes about ranks above what a matrix can have, and about blocks that there are not."""
    shape = model_shape(_config(recipe), recipe.base.trust_remote_code)
    method = method_for(recipe.adapter)
    modules = [p.module for p in shape.parameters]
    whole = match_modules(modules, recipe.adapter.train_modules)
    specs = choose(specs_of_shape(shape), method, whole)
    notes = [
        f"adapter.ranks: {pattern!r} reaches beyond the last block with adapted layers, which is "
        f"{last_block(specs)}"
        for pattern in beyond_the_last(specs, recipe.adapter.ranks)
    ]
    full = [s for s in specs if method.plans[s.path].rank > min(s.d_in, s.d_out)]
    if full:
        widest = min(min(s.d_in, s.d_out) for s in full)
        notes.append(
            f"adapter.rank={recipe.adapter.rank} is more than the full rank of {len(full)} layers "
            f"({full[0].path}: {widest}); what is above it only costs memory"
        )
    return notes


def run_shape(recipe: Recipe, model: ModelShape, rule: DeviceRule) -> RunShape:
    """What a recipe's settings mean for memory."""
    adapter, quant, optim = recipe.adapter, recipe.base.quant, recipe.optim
    method = method_for(adapter)
    whole = match_modules([p.module for p in model.parameters], adapter.train_modules)
    planned = choose(specs_of_shape(model), method, whole)
    adapter_dtype = devices.DTYPES.get(adapter.dtype, rule.adapters)
    four_bit = quant if isinstance(quant, FourBit) else NF4()
    return RunShape(
        device="cuda" if rule.device.type == "cuda" else "cpu",
        quant=quant.kind,
        double_quant=four_bit.double_quant,
        block_size=four_bit.block_size,
        adapters={spec.path: method.footprint(spec) for spec in planned},
        rank=adapter.rank,
        logit_copies=method.logit_copies,
        has_teacher=Requirement.TEACHER_OUTPUT in method.requires,
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


def _num_whole(model: ModelShape, modules: list[str], norms: bool) -> int:
    return sum(
        p.num_weights
        for p in model.parameters
        if p.module in modules or (norms and p.role == "norm")
    )
