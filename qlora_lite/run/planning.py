"""The memory plan of a recipe, and checks of its settings. Downloads only `config.json`."""

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from qlora_lite.adapters.method import Requirement
from qlora_lite.adapters.ranks import beyond_the_last, last_block
from qlora_lite.adapters.warm_start import require_adapter
from qlora_lite.data.source_names import require_source, to_path
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.foundation.errors import BudgetError, RecipeError
from qlora_lite.foundation.files import is_file, require_possible_folder
from qlora_lite.foundation.processes import current
from qlora_lite.foundation.units import format_bytes, parse_bytes
from qlora_lite.memory.formulas import packed_bytes
from qlora_lite.memory.ledger import RunShape, num_trained
from qlora_lite.memory.measure import available_bytes, resident_bytes
from qlora_lite.memory.plan import Plan, make_plan
from qlora_lite.model.base_files import BaseFiles, open_checkpoint
from qlora_lite.model.load import require_possible_head
from qlora_lite.model.prequantised import (
    is_skipped,
    require_readable_dtypes,
    skipped_layers,
    stored_quant,
)
from qlora_lite.model.quant import BF16, FP32, NF4, FourBit
from qlora_lite.recipe import Recipe
from qlora_lite.run.computing import new_rule
from qlora_lite.run.offloading import require_compatible, zero_shape
from qlora_lite.run.savings import alternatives
from qlora_lite.run.setup import RunSetup, set_up
from qlora_lite.shards.gguf.header import find_gguf
from qlora_lite.shards.reader import INDEX, SINGLE

NO_BUDGET = "no budget=... is given, so the memory that is free now is the limit"


def plan_recipe(recipe: Recipe, rule: DeviceRule | None = None) -> Plan:
    """The memory plan of a recipe, against its budget or the device's free memory.

    Raises:
        QloraLiteError: if the base cannot be found, the targets match nothing, or the method needs
            another kind of base.
    """
    rule = rule or new_rule(recipe, allow_absent=True)
    return plan_memory(set_up(recipe, rule, needs_config=False))


def plan_memory(
    setup: RunSetup, micro_batch_tokens: int | None = None, processes: int | None = None
) -> Plan:
    """The memory plan of one process of a recipe that is set up.

    Args:
        micro_batch_tokens: what an earlier process of this run chose; the recipe's wins.
        processes: how many will train, on this machine; by default those that are running now.

    Raises:
        BudgetError: if there is no budget and no card to read the free memory from.
        RecipeError: if `offload.config` contradicts the recipe.
    """
    run = run_shape(setup, micro_batch_tokens, processes or current().world)
    budget = _budget(setup.recipe, setup.rule, processes)
    return make_plan(setup.facts.shape, run, budget, alternatives)


def _budget(recipe: Recipe, rule: DeviceRule, processes: int | None) -> int:
    if recipe.budget:
        return parse_bytes(recipe.budget)
    if not rule.is_available:
        raise BudgetError(
            "got device=cuda on a machine without a CUDA card, so its memory is unknown. Set the "
            'budget: budget="22GiB" for a card of 24 GB'
        )
    free = available_bytes(rule.device)
    if rule.device.type == "cuda":
        return free
    if processes is not None:
        return free // processes
    running = int(os.environ.get("LOCAL_WORLD_SIZE") or current().world)
    if running == 1:
        return free
    own = resident_bytes()  # the others have as much
    return (free - own) // running + own


def check_settings(setup: RunSetup) -> list[str]:
    """Check settings that depend on each other, before anything large is read.

    Returns notes about settings that have no effect.

    Raises:
        AdapterError: if there is no adapter to start from.
        BaseModelError: if loading would refuse the base, or `base.head`.
        DataError: if `data.train` or `data.heldout` is here, and is not a file.
        RecipeError: if rows may be longer than the model can read, FlashAttention cannot run, or
            `offload` does not support another setting.
        RunError: if `output` cannot be a folder.
    """
    recipe = setup.recipe
    if recipe.adapter.start:
        require_adapter(Path(recipe.adapter.start))
    for setting, name in (("train", recipe.data.train), ("heldout", recipe.data.heldout)):
        if name is not None and os.path.lexists(to_path(name)):  # a plan does not need the rows
            require_source(f"data.{setting}", name)
    require_possible_folder(Path(recipe.output))
    _check_attention(setup)
    require_possible_head(recipe.base, setup.facts)
    check_files(setup)
    if recipe.offload.kind != "none":
        require_compatible(setup)
    notes = [*_check_context(setup), *_check_ranks(setup), *_unquantised_experts(setup)]
    if getattr(setup.facts.config.get_text_config(), "output_router_logits", False):
        notes.append(
            f"{recipe.base.model} has output_router_logits=true, with which transformers adds a "
            "loss that balances the experts. It is not part of the loss here"
        )
    if tokens_of_a_step(recipe) > recipe.optim.tokens_per_step:
        notes.append(
            f"optim.tokens_per_step={recipe.optim.tokens_per_step} is less than one bin of "
            f"data.max_tokens={recipe.data.max_tokens}: every step has one bin"
        )
    if not setup.facts.packs and recipe.data.packing:
        notes.append(not_packed(recipe))
    if Requirement.ORIGINAL_WEIGHTS in setup.method.requires:
        notes.append(
            f"adapter={recipe.adapter.kind} with these settings changes the base weights: the "
            "result can be merged (qlora-lite merge), but not used as a PEFT adapter"
        )
    if recipe.evaluation.patience and not recipe.data.heldout and not recipe.data.heldout_share:
        notes.append("evaluation.patience has no effect: no rows are held out to score")
    return notes


def _check_attention(setup: RunSetup) -> None:
    """Check that FlashAttention can run, if the device is here.

    Raises:
        RecipeError: if it needs another device, or its package is missing.
    """
    if setup.recipe.base.attention != "flash_attention_2" or not setup.rule.is_available:
        return
    if setup.rule.device.type != "cuda":
        problem = "FlashAttention runs on CUDA cards only"
    elif find_spec("flash_attn") is None:
        problem = "the package flash-attn is not installed"
    else:
        return
    raise RecipeError(
        f"got base.attention=flash_attention_2, and {problem}. Use base.attention=auto"
    )


def check_files(setup: RunSetup) -> None:
    """Check the names, dtypes and quantisation of a checkpoint that is here, as loading does; for
    one that is not, the layout that transformers writes.

    Raises:
        BaseModelError: if training would refuse it.
    """
    base = setup.recipe.base
    stored_quant(setup.facts.config, base.quant)
    directory = Path(base.model)
    gguf = find_gguf(directory)
    if gguf or is_file(directory / SINGLE) or is_file(directory / INDEX):
        files = BaseFiles(gguf.parent, gguf) if gguf else BaseFiles.of(directory)
        checkpoint = open_checkpoint(files, setup.facts)
        setup.facts.places(checkpoint)
        require_readable_dtypes(checkpoint)
        checkpoint.close()
    else:
        setup.facts.conversion.require_supported()


def tokens_of_a_step(recipe: Recipe) -> int:
    """About how many tokens a step has: packed rows at least fill one bin."""
    smallest = recipe.data.max_tokens if recipe.data.packing else 0
    return max(recipe.optim.tokens_per_step, smallest)


def not_packed(recipe: Recipe) -> str:
    """The note about a model whose packed rows would see each other."""
    return (
        f"rows are not packed: in {recipe.base.model} packed rows would see each other, because "
        "its architecture does not use transformers' mask. A step has about as many tokens, and "
        "more padding"
    )


def _unquantised_experts(setup: RunSetup) -> list[str]:
    """A note about experts, which are frozen without being quantised."""
    experts, base, compute = setup.facts.shape.experts, setup.recipe.base, setup.rule.compute
    if not experts or isinstance(base.quant, BF16 | FP32):
        return []
    run, num = run_shape(setup), sum(p.num_weights for p in experts)
    packed = sum(
        packed_bytes(
            p.num_weights // p.shape[-1], p.shape[-1], run.quant, run.block_size, run.double_quant
        )
        for p in experts
    )
    return [
        f"the experts of {base.model} stay in {str(compute).removeprefix('torch.')}, without "
        f"adapters: {num:,} weights, {format_bytes(num * compute.itemsize)}. In {run.quant} they "
        f"would take {format_bytes(packed)}, which needs a layer for quantised experts and is not "
        "supported yet"
    ]


def _check_context(setup: RunSetup) -> list[str]:
    """A note if rows may be longer than the model's context.

    Raises:
        RecipeError: if its position embeddings are learned, so that longer rows are impossible.
    """
    context, longest = setup.facts.context, setup.recipe.data.max_tokens
    if context is None or longest <= context:
        return []
    model = setup.recipe.base.model
    fact = f"data.max_tokens={longest}, and {model} was trained on {context} positions"
    # positions restart with every row of a bin, so what matters is the longest row
    if sum(p.role == "embedding" for p in setup.facts.shape.parameters) > 1:
        raise RecipeError(
            f"{fact}. Its position embeddings are learned, so longer rows are impossible. "
            f"Set data.max_tokens={context} or less"
        )
    return [f"{fact}: the model may do worse on the positions beyond that"]


def _check_ranks(setup: RunSetup) -> list[str]:
    """Notes about ranks above a matrix's full rank, and about blocks that do not exist."""
    adapter, settings = setup.adapter, setup.recipe.adapter
    notes = [
        f"adapter.ranks: {pattern!r} includes blocks beyond the last one with adapted layers, "
        f"which is {last_block(adapter.specs)}"
        for pattern in beyond_the_last(adapter.specs, settings.ranks)
    ]
    above = [s for s in adapter.specs if adapter.layers[s.path].rank > min(s.d_in, s.d_out)]
    if above:
        smallest = min(min(s.d_in, s.d_out) for s in above)
        notes.append(
            f"adapter.rank={settings.rank} is more than the full rank of {len(above)} layers "
            f"({above[0].path}: {smallest}); the excess only costs memory"
        )
    return notes


def run_shape(
    setup: RunSetup, micro_batch_tokens: int | None = None, processes: int = 1
) -> RunShape:
    """The numbers of a recipe that its memory depends on."""
    recipe, rule, method = setup.recipe, setup.rule, setup.method
    adapter, quant, optim = recipe.adapter, recipe.base.quant, recipe.optim
    four_bit = quant if isinstance(quant, FourBit) else NF4()
    layers, skipped = setup.adapter.layers, skipped_layers(setup.facts.config)
    full_modules = set(setup.adapter.full_modules)
    full_parameters = [p for p in setup.facts.shape.parameters if p.module in full_modules]
    run = RunShape(
        processes=processes,
        device="cuda" if rule.device.type == "cuda" else "cpu",
        quant=quant.kind,
        double_quant=four_bit.double_quant,
        block_size=four_bit.block_size,
        adapters={
            spec.path: method.footprint(spec, layers[spec.path]) for spec in setup.adapter.specs
        },
        rank=adapter.rank,
        logit_copies=method.logit_copies,
        has_teacher=Requirement.TEACHER_OUTPUT in method.requires,
        max_tokens=recipe.data.max_tokens,
        tokens_per_step=optim.tokens_per_step,
        head=recipe.base.head,
        compute_bytes=rule.compute.itemsize,
        storage_bytes=4 if quant.kind == "fp32" else rule.storage.itemsize,
        norm_bytes=rule.norms.itemsize,
        adapter_bytes=setup.adapter_dtype.itemsize,
        states=rule.optimizer_states if optim.states == "auto" else optim.states,
        rounding=optim.rounding,
        embedding_rank=adapter.embedding_rank,
        full_parameters=sum(p.num_weights for p in full_parameters),
        checkpointing=optim.checkpointing,
        attention="sdpa" if recipe.base.attention == "auto" else recipe.base.attention,
        micro_batch_tokens=optim.micro_batch_tokens or micro_batch_tokens,
        unquantised=frozenset(
            path for path in setup.facts.shape.linears if is_skipped(path, skipped)
        ),
        unquantised_bytes=(setup.facts.config.dtype or torch.bfloat16).itemsize,
    )
    return replace(run, zero=zero_shape(setup, num_trained(setup.facts.shape, run)))
