"""The cost of a step: seconds relative to LoRA, and bytes of tensors."""

import gc
import time

import torch
from live_bytes import LiveBytes
from torch import Tensor

from method_study.results import Values
from qlora_lite.adapters.method import StepInfo
from qlora_lite.data.load import PreparedData, load_data
from qlora_lite.foundation import device as devices
from qlora_lite.foundation.seeds import generator
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.model.checkpointing import enable_checkpointing
from qlora_lite.model.tokenizer import load_tokenizer
from qlora_lite.recipe import Recipe
from qlora_lite.run.job import training_batches
from qlora_lite.run.loading import load_adapted
from qlora_lite.run.setup import set_up
from qlora_lite.training.engine import TorchEngine
from qlora_lite.training.optimizer import AdamW
from qlora_lite.training.step import optimizer_step

PAIRS = 12
"""Timed steps of LoRA and of the method, alternating, after one warm-up step of each."""


class Stepper:
    """A method on the base, ready for optimizer steps; its schedule covers all of them."""

    def __init__(self, recipe: Recipe, data: PreparedData) -> None:
        optim = recipe.optim
        rule = devices.choose(recipe.device, recipe.base.compute)
        loaded = load_adapted(set_up(recipe, rule), load_tokenizer(recipe.base), Watcher())
        assert loaded.attached is not None
        self.recipe, self.attached, self.model = recipe, loaded.attached, loaded.causal
        if optim.checkpointing:
            enable_checkpointing(loaded.base.model)
        self.attached.train()
        optimizer = AdamW(
            self.attached.groups(),
            weight_decay=optim.weight_decay,
            betas=optim.betas,
            eps=optim.eps,
            states="32bit",
            rounding=optim.rounding,
        )
        self.engine = TorchEngine(optimizer, rule.compute)
        self.batches = training_batches(recipe, data, optim.micro_batch_tokens or 0, loaded.packs)
        self.number = 0

    def step(self) -> float:
        """Do the next step; return its seconds."""
        batches = self.batches.step(self.number)
        draws = generator(self.recipe.seed, "method", self.number)
        info = StepInfo(self.number, self.batches.steps, self.recipe.optim.lr, draws)
        limit = self.recipe.optim.max_grad_norm
        start = time.perf_counter()
        optimizer_step(
            self.model, batches, self.attached, self.engine, info, limit, lambda loss, batch: None
        )
        self.number += 1
        return time.perf_counter() - start


def cost(recipe: Recipe, reference: Recipe) -> Values:
    """Bytes of a step, and seconds relative to `reference`; both recipes have PAIRS + 1 steps."""
    data = load_data(recipe.data, load_tokenizer(recipe.base), recipe.seed)
    return step_bytes(recipe, data) | {"ratios": time_ratios(recipe, reference, data)}


def time_ratios(recipe: Recipe, reference: Recipe, data: PreparedData) -> list[float]:
    """Seconds of a step relative to the reference on the same batch, pair by pair.

    The two alternate, and alternate in going first, so that a busy machine slows both equally.
    """
    ours, theirs = Stepper(recipe, data), Stepper(reference, data)
    ours.step()
    theirs.step()
    ratios = []
    for pair in range(PAIRS):
        if pair % 2:
            below, above = theirs.step(), ours.step()
        else:
            above, below = ours.step(), theirs.step()
        ratios.append(above / below)
    return ratios


def step_bytes(recipe: Recipe, data: PreparedData) -> Values:
    """Bytes of base, adapter, optimizer and method between two steps, and the additional peak
    during the second step (when the Adam states exist)."""
    before = storages()
    stepper = Stepper(recipe, data)
    stepper.step()
    between_steps = storages()
    with LiveBytes(living_tensors()) as live:
        stepper.step()
    parameters = stepper.attached.parameters().values()
    return {
        "rest_bytes": sum(size for key, size in between_steps.items() if key not in before),
        "peak_bytes": live.peak,
        "trained_at_a_time": sum(p.numel() for p in parameters if p.requires_grad),
    }


def living_tensors() -> list[Tensor]:
    """Every tensor known to the garbage collector."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


def storages() -> dict[int, int]:
    """Bytes of every live storage, by its address."""
    kept = [tensor.untyped_storage() for tensor in living_tensors()]
    return {storage._cdata: storage.nbytes() for storage in kept}
