"""What all runs share: base, rows and their order, steps, tokens and rank."""

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
    """Length and number of repetitions of every run."""

    steps: int = 40
    seeds: int = 3


def recipe_of(
    contender: Contender, material: Material, steps: int, seed: int, lr: float, output: Path
) -> Recipe:
    """The recipe of one run. Its held-out rows are scored only before and after training.

    Fields that a method shares with LoRA are kept (rank 8, alpha 16, no dropout); its own fields
    have their defaults.
    """
    optim = Optim(
        tokens_per_step=TOKENS_PER_STEP,
        # explicit, since the choice of the planner depends on the free memory
        micro_batch_tokens=TOKENS_PER_STEP,
        # same results in three quarters of the time; cost.py measures with checkpointing
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
    """What a measurement depends on, besides its key and the paths of its files."""
    values = recipe.to_dict()
    data = {name: value for name, value in values["data"].items() if name not in FILES}
    return {
        "adapter": values["adapter"],
        "data": data,
        "lr": recipe.optim.lr,
        "steps": recipe.optim.steps,
        "tokens_per_step": recipe.optim.tokens_per_step,
    }
