"""Adapters stored in bf16 reach the loss of fp32 adapters: every method, on the embedded base.

The difference of the mean held-out losses over three seeds is below the standard deviation of the
fp32 runs over the seeds.
"""

import statistics

import pytest

from qlora_lite.demo import BASE, HELDOUT, TRAIN
from qlora_lite.recipe import Recipe
from qlora_lite.run.training import run_recipe
from tests.properties.cases import CASES

SEEDS = (0, 1, 2)
STEPS = 24


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_bf16_parameters_reach_the_loss_of_fp32_ones(tmp_path, name):
    losses = {
        dtype: [heldout_loss(tmp_path, name, dtype, seed) for seed in SEEDS]
        for dtype in ("fp32", "bf16")
    }
    difference = abs(statistics.mean(losses["bf16"]) - statistics.mean(losses["fp32"]))
    assert difference < statistics.stdev(losses["fp32"]), losses


def heldout_loss(folder, name, dtype, seed):
    recipe = Recipe.model_validate(
        {
            "base": {"model": BASE, "compute": "fp32"},
            "adapter": CASES[name].model_settings.model_copy(update={"dtype": dtype}).model_dump(),
            "data": {"train": TRAIN, "heldout": HELDOUT, "max_tokens": 256},
            "optim": {"lr": 2e-3, "tokens_per_step": 2048, "steps": STEPS},
            "evaluation": {"every": STEPS, "samples": 0},
            "checkpoints": {"every": STEPS, "keep": 1},
            "output": str(folder / f"{dtype}-{seed}"),
            "device": "cpu",
            "seed": seed,
        }
    )
    scores = run_recipe(recipe).scores
    assert scores["loss"] < scores["loss_before"]
    return scores["loss"]
