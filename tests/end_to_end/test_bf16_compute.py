"""Computing in bf16 on a CPU reaches the loss of fp32: the real chat model, on the demo's rows.

The mean held-out losses over three seeds differ by less than the standard deviation of the fp32
runs over the seeds.
"""

import statistics

import pytest

from qlora_lite.demo.lessons import Lesson
from qlora_lite.kernels.speed import has_bf16_units
from qlora_lite.run.training import run_recipe

SEEDS = (0, 1, 2)
STEPS = 8


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not has_bf16_units(), reason="without bf16 units a step takes minutes")
def test_bf16_compute_reaches_the_loss_of_fp32(real_base, tmp_path):
    losses = {
        compute: [heldout_loss(real_base, tmp_path, compute, seed) for seed in SEEDS]
        for compute in ("fp32", "bf16")
    }
    difference = abs(statistics.mean(losses["bf16"]) - statistics.mean(losses["fp32"]))
    assert difference < statistics.stdev(losses["fp32"]), losses


def heldout_loss(base, folder, compute, seed):
    recipe = Lesson(str(base), is_real=True).recipe(folder, STEPS)
    changed = recipe.but(
        f"base.compute={compute}",
        f"seed={seed}",
        "optim.tokens_per_step=512",
        "optim.micro_batch_tokens=512",
        "data.max_tokens=512",
        "evaluation.samples=0",
        f"output={folder / f'{compute}-{seed}'}",
    )
    return run_recipe(changed).scores["loss"]
