"""What every run gets: the same base, the same rows in the same order, steps, tokens and rank."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from method_study.contenders import RANK, Contender
from method_study.material import Material
from qlora_lite.data.settings import Data
from qlora_lite.demo import BASE, HELDOUT, TRAIN
from qlora_lite.methods.lora import LoRA
from qlora_lite.model.quant import NF4
from qlora_lite.model.settings import Base
from qlora_lite.recipe import Recipe
from qlora_lite.training.settings import Optim

TOKENS_PER_STEP = 1024
HELDOUT_ROWS = 200
FILES = ("train", "heldout")


@dataclass(frozen=True)
class Budget:
    """How long every run is, and how often it is repeated."""

    steps: int = 40
    seeds: int = 3


def recipe_of(
    contender: Contender, material: Material, steps: int, seed: int, lr: float, output: Path
) -> Recipe:
    """The recipe of one run. Its held-out rows are scored before and after, and at no other time.

    Fields that a method shares with LoRA (rank 8, alpha 16, no dropout) are kept, its own take
    their defaults.
    """
    optim = Optim(
        tokens_per_step=TOKENS_PER_STEP,
        # said, since the planner's choice depends on the memory that is free
        micro_batch_tokens=TOKENS_PER_STEP,
        # the same bits a quarter sooner; what a step costs is measured with it
        checkpointing=False,
    )
    recipe = Recipe(
        base=Base(model=BASE, quant=NF4()),
        adapter=LoRA(rank=RANK, alpha=2 * RANK, dropout=0.0),
        data=Data(train=TRAIN, heldout=HELDOUT, max_heldout_rows=HELDOUT_ROWS),
        optim=optim,
        output=str(output),
        device="cpu",
    )
    return recipe.but(
        *material.settings,
        *contender.assignments,
        f"optim.steps={steps}",
        f"optim.lr={lr}",
        f"evaluation.every={steps}",
        f"checkpoints.every={steps}",
        "checkpoints.keep=1",
        f"seed={seed}",
    )


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What a measurement depends on, beside its key and the place of its files."""
    values = recipe.to_dict()
    data = {name: value for name, value in values["data"].items() if name not in FILES}
    return {
        "adapter": values["adapter"],
        "data": data,
        "lr": recipe.optim.lr,
        "steps": recipe.optim.steps,
        "tokens_per_step": recipe.optim.tokens_per_step,
    }
